"""From lines of the journal to episodes of the store: each line once, however often it is read.

An episode is open while its calls come in; an outcome or an hour of silence closes it. What comes for a closed one begins its next part,
`<id>.2` and so on, as a closed episode is never changed. Outcomes are labels, so they come at any time and none is lost.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from loraloop.episode import (
    CONVERSATION,
    AnyOutcome,
    Episode,
    EpisodeId,
    EpisodeMetadata,
    Label,
    LlmCallRecord,
    Outcome,
    longest_call,
    now_ms,
)
from loraloop.files import append_jsonl, write_json
from loraloop.plugins import EpisodeStore
from loraloop.serve.call_record import to_records

SCENARIO = "serve"
"""The scenario of episodes that the router recorded."""
ROUTER = "router"
"""The source of labels that it was told."""
MAX_CACHED = 256
MAX_PARTS = 1000
_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(AnyOutcome)


class EpisodeBook:
    """The episodes that calls are written into. Used by one thread; `folder` also holds which of them are open."""

    def __init__(self, folder: Path, store: EpisodeStore) -> None:
        self._store = store
        self._open_path = folder / "open.json"
        self._aside_path = folder / "unreadable.jsonl"
        self._open: dict[str, int] = {}  # part -> when its last call came, Unix ms
        self._written: dict[str, int] = {}  # what the file says of them
        self._cached: OrderedDict[str, Episode] = OrderedDict()

    def load(self) -> list[Episode]:
        """The episodes that were open when the router ended."""
        if self._open_path.exists():
            self._open = json.loads(self._open_path.read_text(encoding="utf-8"))
            self._written = dict(self._open)
        found = [self._find(part) for part in self._open]
        return [episode for episode in found if episode is not None and episode.is_open]

    def store(self, lines: Iterable[Mapping[str, Any]]) -> int:
        """Put all of a segment into the store; how many lines could not be read as what they should be, which are put aside.

        Raises StoreError or OSError; repeating it then does what is left to do.
        """
        changed: dict[str, Episode] = {}
        said: list[tuple[str, Mapping[str, Any]]] = []
        n_unreadable = 0
        for line in lines:
            try:
                if line["kind"] == "call":
                    self._add_call(line, changed)
                elif (part := self._add_outcome(line, changed)) is not None:
                    said.append((part, line))
            except (ValueError, TypeError, KeyError) as error:
                n_unreadable += 1
                append_jsonl(self._aside_path, {"why": str(error), "line": line})
        closing = {part for part, line in said if line["outcome"] is not None and part in changed}
        self._save({part: _opened(episode) if part in closing else episode for part, episode in changed.items()})
        for part, line in said:
            self._label(part, line)
        self._save({part: changed[part] for part in closing})  # last, so that none is over and its outcome not yet known
        return n_unreadable

    def close_idle(self, idle_ms: int) -> None:
        """Close the episodes that nothing has come for since. Raises StoreError."""
        before = now_ms() - idle_ms
        idle = {part for part, last in self._open.items() if last < before}
        found = {part: episode for part in idle if (episode := self._find(part)) is not None and episode.is_open}
        self._save({part: _closed(episode) for part, episode in found.items()}, gone=idle - found.keys())

    def _add_call(self, line: Mapping[str, Any], changed: dict[str, Episode]) -> None:
        records = to_records(line)
        for part in _parts(line["episode"]):
            kept = changed.get(part) or self._find(part)
            if kept is None:
                changed[part] = _begin(part, line["episode"], records)
                break
            if any(_receipt(record) == line["id"] for record in kept.records):
                break
            if kept.is_open and kept.metadata.scenario == SCENARIO:
                changed[part] = _continue(kept, records)
                break
        self._open[part] = max(self._open.get(part, 0), line["started_ms"] + line["latency_ms"])

    def _add_outcome(self, line: Mapping[str, Any], changed: dict[str, Episode]) -> str | None:
        """Close the newest part, which the outcome is of; None when there is none. A comment alone closes nothing."""
        newest = None
        for part in _parts(line["episode"]):
            kept = changed.get(part) or self._find(part)
            if kept is None:
                break
            newest = kept
        if newest is None:
            return None
        if line["outcome"] is not None:
            _OUTCOME.validate_python(line["outcome"])
            if newest.is_open:
                changed[str(newest.id)] = _closed(newest)
        return str(newest.id)

    def _label(self, part: str, line: Mapping[str, Any]) -> None:
        """Say what a line says of `part`; nothing where it was said before, or the episode is forgotten. A comment keeps the outcome."""
        if self._store.find(part) is None:
            return
        before = self._store.get_labels(part)
        if any((label.at, label.source, label.comment) == (line["at"], ROUTER, line["comment"]) for label in before):
            return
        outcome = before[-1].outcome if line["outcome"] is None else line["outcome"]
        label = {"episode_id": part, "outcome": outcome, "at": line["at"], "source": ROUTER, "comment": line["comment"]}
        self._store.add_labels([Label.model_validate(label)])

    def _save(self, changed: Mapping[str, Episode], gone: Iterable[str] = ()) -> None:
        if changed:
            self._store.append_many(list(changed.values()))
        for part, episode in changed.items():
            self._cached[part] = episode
            self._cached.move_to_end(part)
        is_over = {part for part in self._open if part in self._cached and not self._cached[part].is_open}
        for part in (*is_over, *gone):
            self._open.pop(part, None)
        while len(self._cached) > MAX_CACHED:
            self._cached.popitem(last=False)
        if self._open != self._written:
            write_json(self._open_path, self._open)
            self._written = dict(self._open)

    def _find(self, part: str) -> Episode | None:
        if part in self._cached:
            self._cached.move_to_end(part)
            return self._cached[part]
        return self._store.find(part)


def find_stored(store: EpisodeStore, episode: str) -> list[LlmCallRecord]:
    """The calls that the store has of an episode, of all its parts; none where it has no such episode. Raises StoreError."""
    records: list[LlmCallRecord] = []
    for part in _parts(episode):
        found = store.find(part)
        if found is None:
            break
        records += [record for record in found.records if isinstance(record, LlmCallRecord)]
    return records


def _parts(episode: str) -> Iterable[str]:
    yield episode
    for number in range(2, MAX_PARTS):
        suffix = f".{number}"
        yield episode[: 128 - len(suffix)] + suffix


def _receipt(record: object) -> str | None:
    return record.served.id if isinstance(record, LlmCallRecord) and record.served else None


def _begin(part: str, episode: str, records: list[LlmCallRecord]) -> Episode:
    tags = {"format": SCENARIO} | ({"part_of": episode} if part != episode else {})
    metadata = EpisodeMetadata(scenario=SCENARIO, created_at=records[0].timestamp_ms, started_at=records[0].timestamp_ms, tags=tags)
    return _continue(Episode(id=EpisodeId.parse(part), learn_model=CONVERSATION, is_open=True, metadata=metadata), records)


def _continue(episode: Episode, records: list[LlmCallRecord]) -> Episode:
    """`episode` with these calls too; told by the call with the longest history, and by the versions that answered."""
    calls = [*(record for record in episode.records if isinstance(record, LlmCallRecord)), *records]
    longest = longest_call([call for call in calls if call.error is None])
    versions = ",".join(dict.fromkeys(call.model for call in calls))
    told = (*longest.messages, longest.response) if longest else ()
    return episode.model_copy(
        update={
            "messages": told,
            "tools": longest.tools if longest else (),
            "records": (*episode.records, *records),
            "metadata": episode.metadata.model_copy(update={"tags": {**episode.metadata.tags, "model": versions}}),
        }
    )


def _opened(episode: Episode) -> Episode:
    return episode.model_copy(update={"is_open": True, "metadata": episode.metadata.model_copy(update={"ended_at": None})})


def _closed(episode: Episode) -> Episode:
    last = max((record.timestamp_ms + record.latency_ms for record in episode.records if isinstance(record, LlmCallRecord)), default=None)
    return episode.model_copy(update={"is_open": False, "metadata": episode.metadata.model_copy(update={"ended_at": last})})
