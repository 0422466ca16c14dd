"""The file to read first: how recorded runs become an adapter, stage by stage.

    ingest   files  -> episodes in the store       (importers)
    build    episodes -> a frozen dataset          (a learn model, dataset)
    report   a dataset -> what it will teach   (data_report: before any training)
    train    a dataset -> a TrainedModel           (lora: a child process, the registry)

Each stage is a function from what the one before has left on disk, so each can be run again. This is the only place where the
stages meet.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from loraloop.base_model import load_tokenizer, resolve_base
from loraloop.chat.rows import ACCEPTED
from loraloop.chat.template import ChatTemplate
from loraloop.data_report.findings import Findings, ReportOptions, Subject, inspect
from loraloop.data_report.page import to_html
from loraloop.dataset import Dataset, DatasetSettings, freeze
from loraloop.episode import EpisodeFilter
from loraloop.errors import ImportFailed, SettingsError
from loraloop.files import write_atomic
from loraloop.importers import export as write_export
from loraloop.importers.follow import Follower
from loraloop.importers.ingest import IngestReport, find_side_file, ingest_file, refuse_file
from loraloop.importers.scores import ScoreRule
from loraloop.importers.sources import search
from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.lora.model import LoraModelId, TrainedModel
from loraloop.lora.plain_thread import run_in_plain_thread
from loraloop.lora.runs import Run
from loraloop.lora.trainer import LoraTrainer, OnEvent, Samples
from loraloop.plugins import EpisodeStore, LearnModel
from loraloop.training_data import Method


def ingest(
    store: EpisodeStore,
    paths: Sequence[Path],
    format_name: str | None = None,
    on_progress: Callable[[Path, int, int | None], None] = lambda path, done, total: None,
    *,
    license_name: str | None = None,
    score_rule: ScoreRule | None = None,
    readmit: bool = False,
) -> Iterator[IngestReport]:
    """Read every file under `paths`, which may be patterns and `-`, into `store`; gives one report a file.

    Episodes that say no terms get `license_name`. Among several files, one that cannot be read as episodes is refused as a whole, so
    that it costs none of the others. Raises ImportFailed when it is the only one, and for a path that is not there.
    """
    files = search(paths)
    for found in files:
        path = found.path
        try:
            if found.problem:
                raise found.problem
            told: Callable[[int, int | None], None] = lambda done, total, path=path: on_progress(path, done, total)  # type: ignore[misc]  # noqa: E731
            report = find_side_file(found) or ingest_file(
                store, path, format_name, told, license_name=license_name, score_rule=score_rule, readmit=readmit
            )
        except ImportFailed as error:
            if len(files) == 1:
                raise
            report = refuse_file(path, error)
        yield report


def follow(
    store: EpisodeStore,
    paths: Sequence[Path],
    state: Path,
    wait: Callable[[], bool],
    *,
    format_name: str | None = None,
    license_name: str | None = None,
    score_rule: ScoreRule | None = None,
) -> Iterator[IngestReport]:
    """Read what is new in growing JSON Lines files, a report a piece, until `wait`, called when there is nothing new, says False.

    `state` keeps up to where each was read. Raises ImportFailed for a path that is not there, LeaseHeld while another follows with it.
    """
    return Follower(store, list(paths), state, format_name, license_name, score_rule).run(wait)


def export(store: EpisodeStore, target: Path | TextIO, format_name: str, episode_filter: EpisodeFilter | None = None) -> Counter[str]:
    """Write the episodes that pass the filter, as lines; counts by outcome, and of those left out. Raises SettingsError."""
    episodes = store.iter_episodes(episode_filter)
    if isinstance(target, Path):
        return write_export.export_file(episodes, target, format_name)
    return write_export.export(episodes, target, format_name)


def build(
    store: EpisodeStore,
    learn_model: LearnModel,
    directory: Path,
    *,
    episode_filter: EpisodeFilter | None = None,
    settings: DatasetSettings | None = None,
    on_progress: Callable[[str, int], None] = lambda step, n_episodes: None,
) -> Dataset:
    """Freeze the episodes that pass the filter into a dataset under `directory`. Raises EmptyData when none gives a sample.

    Those that do not pass still decide with the others which tasks are one, so that the split is the same for every filter.
    """
    others = store.iter_episodes() if episode_filter not in (None, EpisodeFilter()) else ()
    return freeze(store.iter_episodes(episode_filter), learn_model, directory, settings, others=others, on_progress=on_progress)


def report(
    dataset: Dataset,
    path: Path,
    base_model: str | None = None,
    options: ReportOptions | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Findings:
    """What `dataset` will teach, found as a training on `base_model` would find it, and as a page at `path`.

    Without a base model it tells what needs no chat template. Raises BaseModelError, RenderError when there is no usable template;
    that a training would stop on this data is a finding.
    """
    manifest = dataset.manifest
    # told apart where they are not the episodes over again, such as pairs, or one sample a call
    dropped = {f"{reason} (samples)": count for reason, count in manifest.samples_dropped.items() if count != manifest.refused.get(reason)}
    subject = Subject(
        dataset=dataset.id,
        method=manifest.method,
        samples=tuple(dataset.load_training()),
        held_out=manifest.held_out,
        refused={**manifest.refused, **dropped},
    )
    base = None
    if base_model is not None:
        found = resolve_base(base_model, say)
        base = (found.name, ChatTemplate(load_tokenizer(found)))
    findings = inspect(subject, options or ReportOptions(), base, lambda number: say(f"sample {number} of {len(subject.samples)}"))
    write_atomic(path, to_html(findings))
    return findings


def train(
    store: EpisodeStore,
    dataset: Dataset,
    config: LoraTrainerConfig,
    options: TrainOptions | None = None,
    on_event: OnEvent | None = None,
    *,
    method: Method | None = None,
    model_id: LoraModelId | None = None,
) -> TrainedModel:
    """Train an adapter on `dataset` and record it; by the method that it was built for unless told otherwise.

    It gets `model_id`, or a new one; there is never a second training of one id.
    Raises SettingsError for a dataset that the method does not train, LoraTrainerError and its kinds.
    """
    samples = _samples_of(dataset, method)
    trainer = LoraTrainer(config, store, options)
    learn_model = dataset.manifest.learn_model
    model: TrainedModel = run_in_plain_thread(
        lambda: asyncio.run(trainer.train_samples(samples, learn_model, on_event=on_event, model_id=model_id))
    )
    return model


def check_training(
    store: EpisodeStore,
    dataset: Dataset,
    config: LoraTrainerConfig,
    options: TrainOptions | None = None,
    on_event: OnEvent | None = None,
    *,
    method: Method | None = None,
) -> None:
    """Look whether `train` could start with the same arguments. Raises LoraTrainerError with all that stands in its way."""
    samples = _samples_of(dataset, method)
    trainer = LoraTrainer(config, store, options)
    run_in_plain_thread(lambda: asyncio.run(trainer.check(samples, on_event=on_event)))


def resume(trainer: LoraTrainer, run: Run, on_event: OnEvent | None = None, *, force: bool = False) -> TrainedModel:
    """Go on with a run by a trainer that was told what it was told (`LoraTrainer.of_run`). Raises LoraTrainerError and its kinds."""
    model: TrainedModel = run_in_plain_thread(lambda: asyncio.run(trainer.resume(run, force=force, on_event=on_event)))
    return model


def _samples_of(dataset: Dataset, method: Method | None) -> Samples:
    """What is trained of a dataset. Raises SettingsError when `method` does not train it."""
    manifest = dataset.manifest
    trained_by = method or manifest.method
    if manifest.method not in ACCEPTED[trained_by]:
        raise SettingsError(
            f"dataset {dataset.id} is for {manifest.method}, which {trained_by} does not train; make one with `loraloop build --method "
            f"{trained_by}`"
        )
    return Samples(dataset.load_training(), dataset.load_held_out(), dict(manifest.refused), dataset.id, trained_by)
