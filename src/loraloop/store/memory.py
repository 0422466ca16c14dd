"""An episode store in memory, and the text form of an episode that every store of ours shares.

The text form keeps what was recorded to the letter: the order of keys in tool schemas (a chat template renders them in that
order), `content` None apart from "", and lone surrogates, which a cut-off emoji leaves behind. What JSON cannot hold is refused,
never bent.
"""

from __future__ import annotations

import bisect
import json
import threading
from collections.abc import Iterator, Sequence
from typing import TypeVar

from loraloop.episode import Episode, EpisodeDto, EpisodeFilter
from loraloop.errors import StoreError
from loraloop.files import json_line

Stored = TypeVar("Stored", Episode, EpisodeDto)


class InMemoryEpisodeStore:
    """Keeps episodes until the process ends; for tests, notebooks and short scripts. Safe to use from several threads.

    Stored episodes are copies, and so is what it gives: nothing done to an episode outside changes what is kept.
    An iteration gives the episodes that were there when it began.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._episodes: dict[str, Episode] = {}
        self._order: list[tuple[int, str]] = []  # (created_at, id), sorted

    def append(self, episode: Episode) -> bool:
        """Keep `episode`; False when the very same is there already, whatever its `created_at`, or one that continues it.

        One that continues an open episode takes its place. Raises StoreError when another episode has its id, or when it holds what
        JSON cannot (NaN, infinity).
        """
        return self.append_many([episode])[0]

    def append_many(self, episodes: Sequence[Episode]) -> list[bool]:
        """`append` for each in order, all or none; an empty sequence gives an empty list."""
        copies = [from_body(Episode, to_body(episode)) for episode in episodes]
        with self._lock:
            changed: dict[str, Episode] = {}
            added = []
            for episode in copies:
                kept = changed.get(episode.id) or self._episodes.get(episode.id)
                following = episode if kept is None else follow(kept, episode, "the store in memory")
                if following is not None:
                    changed[episode.id] = following
                added.append(following is not None)
            for episode in changed.values():
                if episode.id not in self._episodes:
                    bisect.insort(self._order, _position(episode))
            self._episodes.update(changed)
            return added

    def get(self, episode_id: str) -> Episode:
        """The episode; raises StoreError when there is none."""
        episode = self.find(episode_id)
        if episode is None:
            raise StoreError(f"no episode {str(episode_id)!r} in the store in memory, which has {self.count()}")
        return episode

    def find(self, episode_id: str) -> Episode | None:
        """The episode, or None."""
        with self._lock:
            episode = self._episodes.get(episode_id)
        return episode.model_copy(deep=True) if episode else None

    def iter_episodes(self, episode_filter: EpisodeFilter | None = None) -> Iterator[Episode]:
        """The episodes that match, in order; those that were there at the first step."""
        for episode in self._select(episode_filter or EpisodeFilter()):
            yield episode.model_copy(deep=True)

    def query(self, episode_filter: EpisodeFilter | None = None) -> list[Episode]:
        """`iter_episodes` as a list."""
        return list(self.iter_episodes(episode_filter))

    def list_meta(self, episode_filter: EpisodeFilter | None = None) -> list[EpisodeDto]:
        """The episodes that match, without messages and records, in order."""
        return [episode.to_dto().model_copy(deep=True) for episode in self._select(episode_filter or EpisodeFilter())]

    def count(self, episode_filter: EpisodeFilter | None = None) -> int:
        """How many match; `limit` and `offset` do not change it."""
        unlimited = (episode_filter or EpisodeFilter()).model_copy(update={"limit": None, "offset": 0})
        return len(self._select(unlimited))

    def _select(self, wanted: EpisodeFilter) -> list[Episode]:
        with self._lock:
            episodes = [self._episodes[episode_id] for _, episode_id in self._order]
        matching = [episode for episode in episodes if wanted.matches(episode)]
        end = None if wanted.limit is None else wanted.offset + wanted.limit
        return matching[wanted.offset : end]


def to_body(model: Episode | EpisodeDto) -> str:
    """`model` as one JSON text that `from_body` reads back equal, keys in their order.

    Only the two halves of one character that came apart, as in a stream of pieces, are put together again: JSON reads them as one.
    Raises StoreError when it holds what JSON cannot (NaN, infinity) or what is no valid value (`model_copy` checks nothing).
    """
    try:
        # not mode="json" and not model_dump_json: both turn some lone surrogates into U+FFFD, and the latter infinity into null
        return _escape_surrogates(json_line(model.model_dump(warnings="error")))
    except (ValueError, TypeError) as error:  # pydantic's own serialization error is a ValueError
        raise StoreError(f"episode {model.id} cannot be stored as JSON: {error}; correct that value and append it again") from error


def from_body(kind: type[Stored], body: str) -> Stored:
    """What `to_body` made `body` of; raises ValueError when that was no `kind`."""
    # not model_validate_json: it refuses the escapes of lone surrogates
    return kind.model_validate(json.loads(body))


def follow(kept: Episode, episode: Episode, where: str) -> Episode | None:
    """What to keep instead of `kept` when `episode` comes with its id: None for the same, or for an earlier state of it.

    Raises StoreError when it neither equals nor continues what is there. Its place in the order stays.
    """
    if same_content(kept, episode):
        return None
    if not continues(kept, episode):
        if continues(episode, kept):
            return None
        raise StoreError(conflict(episode.id, where))
    return episode.model_copy(update={"metadata": episode.metadata.model_copy(update={"created_at": kept.metadata.created_at})})


def continues(earlier: Episode, later: Episode) -> bool:
    """True when `earlier` is open and `later` begins with all of its records; without records, with all of its messages.

    What was not known before may have come since: the group, the outcome, that it is over; what was known stays known.
    """
    same_run = (earlier.learn_model, earlier.task_id) == (later.learn_model, later.task_id)
    still_known = earlier.group_id in (None, later.group_id) and (earlier.outcome.is_unknown or not later.outcome.is_unknown)
    if earlier.records:
        begins = later.records[: len(earlier.records)] == earlier.records
    else:
        begins = later.messages[: len(earlier.messages)] == earlier.messages
    return earlier.is_open and same_run and still_known and begins


def same_content(one: Episode, other: Episode) -> bool:
    """True when both are equal to the letter but for `metadata.created_at`, which an importer sets to its present."""
    return _without_creation(one) == _without_creation(other)


def conflict(episode_id: str, where: str) -> str:
    """The message for two different episodes with one id."""
    return (
        f"{where} has an episode {episode_id} already, with other content; episodes are never changed: "
        "give the new one an id of its own, or leave out `id`"
    )


def _without_creation(episode: Episode) -> str:
    return to_body(episode.model_copy(update={"metadata": episode.metadata.model_copy(update={"created_at": 0})}))


def _position(episode: Episode) -> tuple[int, str]:
    return episode.metadata.created_at, episode.id


def _escape_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        return joined.encode("utf-8", "backslashreplace").decode()
    return text
