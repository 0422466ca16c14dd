"""Episodes that go: forgotten when somebody asks, pruned when they are old. What was made of them is named, and needed ones are kept.

Datasets, runs and models are frozen: forgetting an episode does not change them. Their names tell what to delete and make anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from loraloop.dataset import Dataset
from loraloop.dataset.manifest import HELD_OUT_FILE, TRAIN_FILE
from loraloop.episode import EpisodeFilter, Frozen
from loraloop.files import read_jsonl
from loraloop.lora.model import TrainedModel
from loraloop.lora.runs import Run
from loraloop.plugins import EpisodeStore

PAGE_EPISODES = 5_000
BATCH_EPISODES = 2_000
"""How many are removed in one transaction; each looks through the keys of all episodes."""


class Uses(Frozen):
    """What was made of some episodes: ids."""

    datasets: tuple[str, ...] = ()
    """Those with a sample of one of them, held-out ones too."""
    runs: tuple[str, ...] = ()
    """Those whose training data has one, finished or not."""
    models: tuple[str, ...] = ()
    """Those that were trained on one."""


class ForgetReport(Frozen):
    """What was forgotten."""

    forgotten: int
    """Episodes that were there and are no more."""
    missing: tuple[str, ...] = ()
    """Ids that were not there; they are kept out from now on all the same."""
    made_from: Uses = Uses()
    """What still holds them."""


class PruneReport(Frozen):
    """What was too old: `older` = `removed` + `kept`."""

    older: int
    removed: int
    """Of a dry run, those that would be."""
    kept: int
    """Those that a dataset, a run or a model was made from."""
    dry_run: bool


Made = tuple[Iterable[Dataset], Iterable[Run], Iterable[TrainedModel]]


def forget(store: EpisodeStore, episode_ids: Sequence[str], made: Made) -> ForgetReport:
    """Remove episodes and name what was made from them. Raises DatasetError and LoraTrainerError, and removes nothing, when that
    cannot be read.
    """
    wanted = set(episode_ids)
    found: dict[str, list[str]] = {"datasets": [], "runs": [], "models": []}
    for kind, name, used in _iter_uses(made):
        if not wanted.isdisjoint(used):
            found[kind].append(name)
    missing = tuple(each for each in dict.fromkeys(episode_ids) if store.find(each) is None)
    forgotten = store.forget(list(episode_ids))
    return ForgetReport(forgotten=forgotten, missing=missing, made_from=Uses(**{kind: tuple(names) for kind, names in found.items()}))


def prune(store: EpisodeStore, before_ms: int, made: Made | None, *, dry_run: bool = False) -> PruneReport:
    """Remove the episodes that were stored before `before_ms` (Unix milliseconds), but none that anything of `made` was made from.

    They are kept out by their ids, so reading an old folder again does not bring them back. Raises DatasetError and LoraTrainerError,
    and removes nothing, when something cannot be read.
    """
    needed: set[str] = set()
    for _, _, used in _iter_uses(made or ((), (), ())):
        needed.update(used)
    old = list(_iter_ids(store, before_ms))
    gone = [each for each in old if each not in needed]
    if not dry_run:
        for start in range(0, len(gone), BATCH_EPISODES):
            store.forget(gone[start : start + BATCH_EPISODES], by_content=False)
    return PruneReport(older=len(old), removed=len(gone), kept=len(old) - len(gone), dry_run=dry_run)


def _iter_uses(made: Made) -> Iterator[tuple[str, str, set[str]]]:
    """(kind, id, the episodes it was made from) of every dataset, run and model."""
    datasets, runs, models = made
    for dataset in datasets:
        lines = (line for file in (TRAIN_FILE, HELD_OUT_FILE) for line in read_jsonl(dataset.path / file))
        yield "datasets", dataset.id, {str(line[key]) for line in lines for key in ("episode_id", "rejected_episode_id") if line.get(key)}
    for run in runs:
        yield "runs", run.id, set(run.plan.episode_ids)
    for model in models:
        yield "models", str(model.id), {str(each) for each in model.episode_ids}


def _iter_ids(store: EpisodeStore, before_ms: int) -> Iterator[str]:
    offset = 0
    while page := store.list_meta(EpisodeFilter(until=before_ms, offset=offset, limit=PAGE_EPISODES)):
        yield from (str(dto.id) for dto in page)
        offset += len(page)
