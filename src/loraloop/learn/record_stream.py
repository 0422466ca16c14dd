"""From a stream of records to episodes, so that it does not matter where the stream was cut into batches.

An episode that has not ended stays open, and is continued under its id with the next records. Its id comes from its first record:
cut otherwise, the same stream gives the same episodes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from loraloop.episode import ActionRecord, AnyRecord, Episode, EpisodeId, EpisodeMetadata, LlmCallRecord, Message, Outcome, Unknown
from loraloop.files import content_hash

DONE = "done"
"""The action that ends a task."""


class RecordStream(ABC):
    """What belongs to one episode, where it begins, and where it ends."""

    name: str
    """The learn model that the episodes are for."""

    @abstractmethod
    def key(self, record: AnyRecord) -> str | None:
        """Records with equal keys belong together; None: to no episode."""

    @abstractmethod
    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        """How the episode made of these records ended."""

    def begins(self, record: AnyRecord) -> bool:
        """Whether an episode may begin with it; otherwise it only joins one that is open."""
        del record
        return True

    def ends_before(self, so_far: Sequence[AnyRecord], record: AnyRecord) -> bool:
        """Whether the episode is over when `record` comes, which then begins another."""
        del so_far, record
        return False

    def ends_with(self, record: AnyRecord) -> bool:
        """Whether it is the last of its episode."""
        return is_done(record)

    def messages(self, records: Sequence[AnyRecord]) -> tuple[tuple[Message, ...], LlmCallRecord | None]:
        """What was said, and the call that tells it; nothing for records of actions."""
        del records
        return (), None

    def build(self, records: Iterable[AnyRecord], open_episodes: Sequence[Episode]) -> list[Episode]:
        """Those of `open_episodes` that are this learn model's, continued, then new ones in the order they first appear."""
        threads: list[_Thread] = []
        current: dict[str, _Thread] = {}
        for episode in open_episodes:
            if episode.is_open and episode.learn_model == self.name and episode.records:
                threads.append(_Thread(list(episode.records), episode))
                current[self.key(episode.records[0]) or ""] = threads[-1]
        for record in records:
            key = self.key(record)
            if key is None:
                continue
            thread = current.get(key)
            if thread is not None and self.ends_before(thread.records, record):
                thread.is_open, thread = False, None
                del current[key]
            if thread is None:
                if not self.begins(record):
                    continue
                threads.append(thread := _Thread([], None))
                current[key] = thread
            thread.records.append(record)
            if self.ends_with(record):
                thread.is_open = False
                del current[key]
        return self._episodes(threads)

    def _episodes(self, threads: Sequence[_Thread]) -> list[Episode]:
        episodes, seen = [], set[str]()
        for thread in threads:
            first = json.dumps(thread.records[0].model_dump(), sort_keys=True)  # ASCII, and takes any number and half an emoji
            number = 0
            while (new_id := EpisodeId.from_content(content_hash([self.name, first, number]))) in seen:
                number += 1  # two runs that begin with equal records, to the millisecond
            episode_id = thread.continued.id if thread.continued else new_id
            seen.add(episode_id)
            episodes.append(self._episode(episode_id, thread))
        return episodes

    def _episode(self, episode_id: EpisodeId, thread: _Thread) -> Episode:
        records, old = thread.records, thread.continued
        messages, call = self.messages(records)
        last = records[-1]
        ended_at = last.timestamp_ms + (last.duration_ms if isinstance(last, ActionRecord) else 0)
        times = {"started_at": records[0].timestamp_ms, "ended_at": None if thread.is_open else ended_at}
        outcome = Unknown() if thread.is_open else self.evaluate(records)
        return Episode(
            id=episode_id,
            learn_model=self.name,
            task_id=records[0].task_id,
            group_id=next((record.group_id for record in records if record.group_id is not None), None),
            messages=messages,
            tools=call.tools if call else (),
            records=tuple(records),
            # who labelled it while it was open knows more than records that do not say
            outcome=old.outcome if old and outcome.is_unknown else outcome,
            is_open=thread.is_open,
            metadata=old.metadata.model_copy(update=times) if old else EpisodeMetadata.model_validate(times),
        )


class _Thread:
    """An episode while its records come in."""

    def __init__(self, records: list[AnyRecord], continued: Episode | None) -> None:
        self.records = records
        self.continued = continued
        self.is_open = True


def is_done(record: AnyRecord) -> bool:
    """Whether it is the action that ends a task."""
    return isinstance(record, ActionRecord) and record.action == DONE
