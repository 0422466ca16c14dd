"""What a plug-in looks like, and the one way to find one by name.

Kinds: `learn_models`, `importers`, `environments` (suites of tasks, evaluate/environment.py) and `appliers` (`serve.applier.Applier`), each
an entry-point group `loraloop.<kind>`. loraloop's own are listed in pyproject.toml like anybody else's and have no privilege. Stores are
given as objects, so they are a protocol without an entry point.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from loraloop.episode import AnyRecord, Episode, EpisodeDto, EpisodeFilter, Label, Outcome
from loraloop.errors import SettingsError
from loraloop.training_data import Method, Refusal, TrainingData

PluginKind = Literal["appliers", "environments", "importers", "learn_models"]


@runtime_checkable
class EpisodeStore(Protocol):
    """Keeps episodes. Order is by time of creation (`metadata.created_at`), then id. Raises StoreError for trouble of its own."""

    def append(self, episode: Episode) -> bool:
        """Keep `episode`; False when the very same is there already, or one that continues it, or when it was forgotten.

        One that continues an open episode takes its place, without a new one in the order. Raises StoreError when another one has
        its id. What it is the same as is the episode as it was recorded, whatever labels it has got since, and whatever terms it names.
        """
        ...

    def append_many(self, episodes: Sequence[Episode]) -> list[bool]:
        """`append` for each, all or none."""
        ...

    def get(self, episode_id: str) -> Episode:
        """The episode; raises StoreError when there is none."""
        ...

    def find(self, episode_id: str) -> Episode | None:
        """The episode, or None."""
        ...

    def iter_episodes(self, episode_filter: EpisodeFilter | None = None) -> Iterator[Episode]:
        """The episodes that match, one at a time; without a filter, all."""
        ...

    def query(self, episode_filter: EpisodeFilter | None = None) -> list[Episode]:
        """`iter_episodes` as a list."""
        ...

    def list_meta(self, episode_filter: EpisodeFilter | None = None) -> list[EpisodeDto]:
        """The episodes that match, without messages and records."""
        ...

    def count(self, episode_filter: EpisodeFilter | None = None) -> int:
        """How many match."""
        ...

    def add_labels(self, labels: Sequence[Label]) -> None:
        """Say how episodes ended, in order, all or none: each is read, listed and filtered with its newest outcome from now on.

        A label that says terms sets the tag `license`, and leaves the outcome; it is kept with the outcome of that time.
        Raises StoreError when one of them is not there.
        """
        ...

    def get_labels(self, episode_id: str) -> list[Label]:
        """What was said of its outcome, oldest first; the first is what it was recorded with. Raises StoreError when it is not there."""
        ...

    def forget(self, episode_ids: Sequence[str], *, by_content: bool = True) -> int:
        """Remove episodes and their labels for good and keep out what has their id; `by_content` what has their very messages, tools and
        records, too.

        How many were there, and are no more; ids that are not there are kept out as well.
        """
        ...

    def find_forgotten(self, episodes: Sequence[Episode]) -> list[bool]:
        """Of each whether it is kept out."""
        ...

    def readmit(self, episodes: Sequence[Episode]) -> None:
        """Keep these out no longer."""
        ...


@runtime_checkable
class LearnModel(Protocol):
    """What to learn from episodes: how records become episodes, how an episode is judged, how it becomes a sample."""

    @property
    def name(self) -> str:
        """A short name; it labels episodes and adapters and is never used as a path."""
        ...

    @property
    def objective(self) -> str:
        """One sentence: what a model trained on it does better."""
        ...

    @property
    def method(self) -> Method:
        """How its samples are trained: each has this kind."""
        ...

    def build_episodes(self, records: Iterable[AnyRecord], open_episodes: Sequence[Episode] = ()) -> list[Episode]:
        """The episodes in `records`, in the order they first appear.

        One that has not come to its end has `is_open`; given back as one of `open_episodes` with the next records, it is continued
        under its id. So a task that lies across batches is one episode, the same as from one batch.
        """
        ...

    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        """How the episode made of these records ended."""
        ...

    def convert(self, episode: Episode) -> TrainingData | Refusal:
        """The sample of `episode`, or why there is none."""
        ...


@runtime_checkable
class GroupLearnModel(LearnModel, Protocol):
    """A learn model that makes samples of several episodes, or several of one."""

    def group_key(self, episode: Episode) -> str:
        """Episodes with equal keys are converted together."""
        ...

    def convert_group(self, episodes: Sequence[Episode]) -> list[TrainingData | Refusal]:
        """The samples of one group, ordered by id. Every episode is in a sample, or has exactly one refusal with its id."""
        ...


def convert_all(learn_model: LearnModel, episodes: Iterable[Episode]) -> Iterator[TrainingData | Refusal]:
    """What `learn_model` makes of `episodes`; of groups, in the order of their keys, so that the order of `episodes` tells nothing."""
    if not isinstance(learn_model, GroupLearnModel):
        for episode in episodes:
            converted = learn_model.convert(episode)
            if isinstance(converted, TrainingData) and converted.episode_id is None:
                converted = converted.with_episode_id(episode.id)
            yield converted
        return
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(learn_model.group_key(episode), []).append(episode)
    for key in sorted(groups):
        yield from learn_model.convert_group(sorted(groups[key], key=lambda episode: episode.id))


class Importer(Protocol):
    """Reads one file format. One class per format; an instance holds no state."""

    name: ClassVar[str]
    """The format's name, as `--format` takes it."""
    description: ClassVar[str]
    """What it looks like, in one line."""

    def detect(self, path: Path, head: str) -> bool:
        """Whether `path`, whose first 64 KiB of text are `head`, looks like this format."""
        ...

    def count(self, path: Path) -> int | None:
        """How many entries the file has where that is cheap to tell, for a progress bar; else None."""
        ...

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """Every entry in order: an Episode, or a Refusal whose detail has file, entry or line, found / expected / do this.

        Raises ImportFailed when the file as a whole cannot be read.
        """
        ...


@runtime_checkable
class LineImporter(Importer, Protocol):
    """An importer of a format whose lines stand for themselves, so that a file can be read while it grows."""

    lines_stand_alone: ClassVar[Literal[True]]


@runtime_checkable
class ScoredImporter(Importer, Protocol):
    """An importer that refuses entries with a verdict of their own, unless it is told that this is what counts."""

    def read_scored(self, path: Path, key: str) -> Iterator[Episode | Refusal]:
        """`read`, with what stands under `key` kept as the tag of that name."""
        ...


def list_names(kind: PluginKind) -> list[str]:
    """The names that `find` knows, sorted."""
    return sorted({point.name for point in _entry_points(kind)})


def find(kind: PluginKind, name: str) -> Any:
    """The class behind `name`. Raises SettingsError naming those that are known, and the nearest."""
    for point in _entry_points(kind):
        if point.name == name:
            return point.load()
    known = list_names(kind)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise SettingsError(f"no {kind.removesuffix('s').replace('_', ' ')} named {name!r}; known: {', '.join(known)}.{hint}")


@lru_cache
def _entry_points(kind: PluginKind) -> tuple[EntryPoint, ...]:
    """Read once: looking through every installed distribution takes a while."""
    return tuple(entry_points(group=f"loraloop.{kind}"))
