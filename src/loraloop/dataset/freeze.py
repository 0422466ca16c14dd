"""From episodes to a frozen dataset, step by step; every episode is accounted for at each.

    terms, secrets   refused: license_unknown, secret_found, personal_data_found
    conversion       the learn model's own samples and refusals
    duplicates       refused: duplicate, near_duplicate
    split            whole clusters of tasks held out, for good
    caps             refused: cap_task, cap_source
    files            train.jsonl, held_out.jsonl, refused.jsonl, and last the manifest

The folder's name is the hash of all that is in it, so the same episodes give the same folder, in any order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from loraloop.dataset.accounts import Accounts, Candidate
from loraloop.dataset.balance import balance, over_cap
from loraloop.dataset.duplicates import find_duplicates
from loraloop.dataset.manifest import (
    HELD_OUT_FILE,
    MANIFEST_FILE,
    REFUSED_FILE,
    TRAIN_FILE,
    Dataset,
    DatasetManifest,
    open_dataset,
)
from loraloop.dataset.scan import Scanner
from loraloop.dataset.settings import DatasetSettings
from loraloop.dataset.split import Clusters, Split, TaskText, cluster_tasks, join_sample, open_ledger, split
from loraloop.episode import Episode
from loraloop.errors import DatasetError, EmptyData
from loraloop.files import content_hash, file_sha256, json_line, new_directory, write_json, write_jsonl
from loraloop.plugins import GroupLearnModel, LearnModel, convert_all
from loraloop.training_data import Refusal, TrainingData

OnProgress = Callable[[str, int], None]
"""Called with a step's name and how many episodes it has behind it."""
PROGRESS_EPISODES = 100
MAX_NAME_CHARS = 80
_Item = TypeVar("_Item")


def freeze(
    episodes: Iterable[Episode],
    learn_model: LearnModel,
    directory: Path,
    settings: DatasetSettings | None = None,
    *,
    others: Iterable[Episode] = (),
    on_progress: OnProgress = lambda step, n_episodes: None,
) -> Dataset:
    """Convert `episodes` and freeze them under `directory`; the same content gives the dataset that is there already, as the newest.

    `others` are episodes that are known and not to be learned from, such as those that a filter left out: tasks that are near-equal
    over one of them are held out together. The order of neither matters. Raises EmptyData, with the counts by reason, when nothing
    is left to train on; DatasetError when a folder is damaged or cannot be written, or when the learn model loses an episode.
    """
    settings = settings or DatasetSettings()
    accounts = Accounts(Scanner(secrets=True, personal=settings.personal_data != "off"))
    admitted = list(accounts.admit(_told(episodes, "scanned", on_progress), settings))
    if not accounts.known:
        raise EmptyData("No episodes found to build from; ingest some first, or widen the filter")
    samples = accounts.add_converted(_convert(_told(admitted, "converted", on_progress), learn_model), learn_model.name)
    if not samples:
        raise EmptyData(_nothing_left(accounts, learn_model), accounts.counts())
    texts = (TaskText.of(other) for other in _told(others, "compared", on_progress))
    clusters = cluster_tasks([*(known.task for known in accounts.known.values()), *texts])
    candidates = _without_duplicates(samples, accounts, clusters, settings.near_duplicate)
    with _as_dataset_error(directory), open_ledger(directory) as ledger:
        keys = [candidate.key for candidate in candidates]
        parts = split(keys, clusters, ledger.held_out, fraction=settings.held_out_fraction, min_tasks=settings.held_out_min_tasks)
        if all(parts.held_out):
            advice = "ingest episodes of other tasks: what was held out once is never trained on"
            raise EmptyData(f"all {len(candidates)} samples are of tasks that an earlier build held out; {advice}", accounts.counts())
        ledger.keep(parts.ledger)
    return _write(candidates, parts, accounts, learn_model, _Place(directory, settings))


@dataclasses.dataclass(frozen=True)
class _Place:
    directory: Path
    settings: DatasetSettings


def _convert(episodes: Iterable[Episode], learn_model: LearnModel) -> Iterator[TrainingData | Refusal]:
    """What the learn model makes of each, traceable to it even when the learn model did not say so."""
    if isinstance(learn_model, GroupLearnModel):
        yield from convert_all(learn_model, episodes)
        return
    for episode in episodes:
        [converted] = convert_all(learn_model, [episode])
        if not (converted.episode_id):
            converted = converted.model_copy(update={"episode_id": episode.id})
        yield converted


def _without_duplicates(samples: list[TrainingData], accounts: Accounts, clusters: Clusters, threshold: float) -> list[Candidate]:
    """The samples that say something new. What is near-equal is on one side of the split, whether it is dropped or not."""
    candidates = []
    for sample in samples:
        texts = [accounts.known[episode_id].task for episode_id in sample.episode_ids]
        candidates.append(accounts.candidate(sample, join_sample(clusters, sample, texts)))
    tasks = [clusters.find(candidate.key) for candidate in candidates]
    found = find_duplicates(samples, [candidate.outcome for candidate in candidates], tasks, threshold)
    for one, other in found.near:
        clusters.join(candidates[one].key, candidates[other].key)
    how = {"duplicate": "the same as", "near_duplicate": "nearly the same as"}
    reasons = {
        position: (reason, f"{how[reason]} {' and '.join(map(str, samples[kept].episode_ids))}")
        for position, (reason, kept) in found.dropped.items()
    }
    return accounts.drop(candidates, reasons)


def _write(candidates: list[Candidate], parts: Split, accounts: Accounts, learn_model: LearnModel, place: _Place) -> Dataset:
    """Cap what is trained on, and write the folder unless it is there."""
    settings = place.settings
    held_out = [candidate for candidate, is_out in zip(candidates, parts.held_out, strict=True) if is_out]
    training = [candidate for candidate, is_out in zip(candidates, parts.held_out, strict=True) if not is_out]
    tasks = {candidate.key: task for candidate, task in zip(candidates, parts.tasks, strict=True)}
    for reason, cap, group_of in (
        ("cap_task", settings.max_per_task, lambda candidate: tasks[candidate.key]),
        ("cap_source", settings.max_per_source, lambda candidate: candidate.source),
    ):
        over = over_cap([one.sample for one in training], [group_of(one) for one in training], cap)
        training = accounts.drop(training, dict.fromkeys(over, (reason, f"beyond {cap}, which are better or drawn")))
    lines = [[candidate.sample.to_line() for candidate in part] for part in (training, held_out)]
    refused = [accounts.refused[episode_id].model_dump(mode="json") for episode_id in sorted(accounts.refused)]
    files = dict(zip((TRAIN_FILE, HELD_OUT_FILE, REFUSED_FILE), (*lines, refused), strict=True))
    told = {
        **_describe_parts(training, held_out, tasks, accounts.counts()),
        "method": learn_model.method,
        "learn_model": learn_model.name,
        "episodes": len(accounts.known),
        "episodes_refused": len(refused),
        "held_out_fraction": settings.held_out_fraction,
        "refused": accounts.counts(),
        "samples_dropped": dict(sorted(accounts.dropped.items())),
        "secrets": dict(sorted(accounts.secrets.items())),
        "personal_data": dict(sorted(accounts.personal_data.items())),
        "licenses": accounts.licenses(candidate.sample for candidate in (*training, *held_out)),
        "balance": balance(training, [tasks[one.key] for one in training], lambda name: _shown(name, accounts.scanner)),
        "settings": dataclasses.asdict(settings),
    }
    # the rest of the manifest is hashed as well: what was found and left out is part of what the folder says
    checked = DatasetManifest(id="", sha256={}, **told)
    content = [checked.model_dump(mode="json"), *([json_line(line) for line in part] for part in files.values())]
    return _freeze_files(place.directory / content_hash(content, 24), files, checked)


def _freeze_files(path: Path, files: dict[str, list[dict[str, object]]], manifest: DatasetManifest) -> Dataset:
    if (path / MANIFEST_FILE).exists():
        dataset = open_dataset(path)
        with contextlib.suppress(OSError):  # of a project that can only be read
            os.utime(path / MANIFEST_FILE)
        return dataset
    with _as_dataset_error(path), contextlib.suppress(FileExistsError), new_directory(path) as folder:  # another process may be faster
        for name, rows in files.items():
            write_jsonl(folder / name, rows)
        update = {"id": path.name, "sha256": {name: file_sha256(folder / name) for name in files}}
        write_json(folder / MANIFEST_FILE, manifest.model_copy(update=update).model_dump(mode="json"))
    return open_dataset(path)


def _describe_parts(
    training: Sequence[Candidate], held_out: Sequence[Candidate], tasks: dict[str, str], refused: Mapping[str, int]
) -> dict[str, object]:
    """The counts of both sides, and what a user should know of them."""
    warnings = []
    aims = Counter(candidate.sample.desirable for candidate in training)
    if training[0].sample.kind == "kto" and len(aims) == 1:
        only, none = ("desirable", "undesirable") if True in aims else ("undesirable", "desirable")
        warnings.append(f"every sample to train on is {only}, none {none}: nothing balances what is learned")
    if n_outside := refused.get("score_outside_scale"):
        warnings.append(
            f"{n_outside} episodes are refused for a score outside the scale, so the scores of others on that scale do not mean what "
            "they seem to: declare it with --score-min and --score-max, or leave that scenario out"
        )
    n_tasks = len({tasks[one.key] for one in (*training, *held_out)})
    if not held_out:
        warnings.append(f"nothing is held out of {n_tasks} {'task' if n_tasks == 1 else 'tasks'}: what is learned cannot be measured")
    return {
        "samples": len(training),
        "pairs": sum(one.sample.kind == "dpo" for one in training),
        "held_out": len(held_out),
        "held_out_pairs": sum(one.sample.kind == "dpo" for one in held_out),
        "episodes_used": _count_episodes(training),
        "episodes_held_out": _count_episodes(held_out),
        "tasks": n_tasks,
        "held_out_tasks": len({tasks[one.key] for one in held_out}),
        "warnings": tuple(warnings),
    }


def _count_episodes(candidates: Sequence[Candidate]) -> int:
    return len({episode_id for candidate in candidates for episode_id in candidate.sample.episode_ids})


def _shown(name: str, scanner: Scanner) -> str:
    """`name`, or a hash of it where it is long or holds what should not be shown."""
    if len(name) <= MAX_NAME_CHARS and not scanner.find(name):
        return name
    return f"#{content_hash(name, 8)}"


def _nothing_left(accounts: Accounts, learn_model: LearnModel) -> str:
    text = f"none of {len(accounts.known)} episodes gives a sample for {learn_model.name!r}"
    if accounts.counts().get("license_unknown"):
        text += (
            "; those without a known licence are taken with `--unknown-license allow`, "
            "and `loraloop ingest --license NAME` says what the terms are (`own` for runs of your own)"
        )
    return text


def _told(items: Iterable[_Item], step: str, on_progress: OnProgress) -> Iterator[_Item]:
    count = 0
    for count, item in enumerate(items, 1):
        yield item
        if count % PROGRESS_EPISODES == 0:
            on_progress(step, count)
    on_progress(step, count)


@contextlib.contextmanager
def _as_dataset_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be written ({error.strerror}); make room there, or make the project's folder writable"
        ) from error
