"""An episode store in memory."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterator, Sequence

from loraloop.episode import Episode, EpisodeDto, EpisodeFilter, Label
from loraloop.errors import StoreError
from loraloop.store.labelling import Followed, as_kept, follow_labelled, from_json, labelled, recorded_label, to_json
from loraloop.store.parts import encode
from loraloop.store.text import from_body, to_body


class InMemoryEpisodeStore:
    """Keeps episodes until the process ends; for tests, notebooks and short scripts. Safe to use from several threads.

    Stored episodes are copies, and so is what it gives: nothing done to an episode outside changes what is kept.
    An iteration gives the episodes that were there when it began.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._episodes: dict[str, Episode] = {}
        self._order: list[tuple[int, str]] = []  # (created_at, id), sorted
        self._labels: dict[str, list[Label]] = {}  # of those that have got any; the first is the recorded one
        self._forgotten: dict[str, bytes] = {}  # digests by id

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
            forgotten = self.find_forgotten(copies)
            changed: dict[str, Followed] = {}
            added = []
            for episode, is_forgotten in zip(copies, forgotten, strict=True):
                kept, labels = self._get_with_labels(episode.id, changed)
                following = None
                if not is_forgotten:
                    following = Followed(episode) if kept is None else follow_labelled(kept, labels, episode, "the store in memory")
                if following is not None:
                    changed[episode.id] = following
                added.append(following is not None)
            for episode_id, following in changed.items():
                if episode_id not in self._episodes:
                    bisect.insort(self._order, _position(following.episode))
                self._episodes[episode_id] = following.episode
                if following.labels:
                    self._labels[episode_id] = list(following.labels)
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

    def add_labels(self, labels: Sequence[Label]) -> None:
        """Say how episodes ended, or their terms, in order, all or none. Raises StoreError when one of them is not there."""
        copies = [from_json(to_json(label)) for label in labels]
        with self._lock:
            for label in copies:
                self.get(label.episode_id)
            for label in copies:
                episode = self._episodes[label.episode_id]
                kept = as_kept(label, episode.outcome)
                self._labels.setdefault(label.episode_id, [recorded_label(episode)]).append(kept)
                self._episodes[label.episode_id] = labelled(episode, kept)

    def get_labels(self, episode_id: str) -> list[Label]:
        """What was said of its outcome, oldest first; the first is what it was recorded with. Raises StoreError when it is not there."""
        with self._lock:
            return list(self._labels.get(episode_id) or [recorded_label(self.get(episode_id))])

    def forget(self, episode_ids: Sequence[str], *, by_content: bool = True) -> int:
        """Remove episodes for good and keep out what has their id and, `by_content`, what is the same; how many were there."""
        with self._lock:
            found = [self._episodes[each] for each in dict.fromkeys(episode_ids) if each in self._episodes]
            self._forgotten |= dict.fromkeys(episode_ids, b"")
            if by_content:
                self._forgotten |= {episode.id: encode(episode).digest for episode in found}
            for episode in found:
                self._order.remove(_position(episode))
                self._labels.pop(episode.id, None)
                del self._episodes[episode.id]
            return len(found)

    def find_forgotten(self, episodes: Sequence[Episode]) -> list[bool]:
        """Of each whether it is kept out."""
        with self._lock:
            digests = set(self._forgotten.values()) - {b""}
            return [each.id in self._forgotten or (bool(digests) and encode(each).digest in digests) for each in episodes]

    def readmit(self, episodes: Sequence[Episode]) -> None:
        """Keep these out no longer."""
        with self._lock:
            taken = {encode(episode).digest for episode in episodes}
            ids = {str(episode.id) for episode in episodes}
            self._forgotten = {each: digest for each, digest in self._forgotten.items() if each not in ids and digest not in taken}

    def _get_with_labels(self, episode_id: str, changed: dict[str, Followed]) -> tuple[Episode | None, Sequence[Label]]:
        if episode_id in changed:
            return changed[episode_id].episode, changed[episode_id].labels
        return self._episodes.get(episode_id), self._labels.get(episode_id, ())

    def _select(self, wanted: EpisodeFilter) -> list[Episode]:
        with self._lock:
            episodes = [self._episodes[episode_id] for _, episode_id in self._order]
        matching = [episode for episode in episodes if wanted.matches(episode)]
        end = None if wanted.limit is None else wanted.offset + wanted.limit
        return matching[wanted.offset : end]


def _position(episode: Episode) -> tuple[int, str]:
    return episode.metadata.created_at, episode.id
