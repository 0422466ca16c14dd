"""LoraTrainer: episodes in, a TrainedModel out, through a training process that anybody's script can replace.

query -> the learn model's own `convert` -> a training file -> a child process -> an adapter -> a record in the registry

It holds no weights and loads no torch. Every run has a fresh id, and every file of the run lies in a folder of that name, so no run
can overwrite another's; names of learn models never become paths. A run that ended early is gone on with by `resume`.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from loraloop.episode import Episode, EpisodeFilter, now_ms
from loraloop.errors import EmptyData, LoraTrainerError, ProcessFailed, ScriptNotFound, SettingsError, TrainingStopped
from loraloop.files import file_sha256, json_line, write_jsonl
from loraloop.lora.adapter import check_adapter, find_parent, make_model
from loraloop.lora.command import Paths, build_argv
from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.lora.listener import Listener
from loraloop.lora.model import LoraModelId, TrainedModel
from loraloop.lora.plain_thread import run_in_plain_thread
from loraloop.lora.process import run_process
from loraloop.lora.registry import MODEL_FILE, LoraModelRegistry
from loraloop.lora.report_to import Reporter, open_reporter
from loraloop.lora.runs import LOG_FILE, Run, RunPlan, RunState, RunStore, hold, remove_checkpoints
from loraloop.plugins import EpisodeStore, LearnModel, convert_all
from loraloop.training_data import Method, Refusal, TrainingData, split_by_task
from loraloop.training_record import TrainingEvent

log = logging.getLogger("loraloop.lora")

OnEvent = Callable[[TrainingEvent], None]


@dataclass(frozen=True)
class Samples:
    """What one training is made from."""

    training: Sequence[TrainingData]
    held_out: Sequence[TrainingData] = ()
    refused: dict[str, int] | None = None
    dataset: str | None = None
    """The id of the frozen dataset that they come from, if any."""
    method: Method = "sft"
    """How they are trained; loraloop's own process refuses samples of another kind."""


class LoraTrainer:
    """Trains LoRA adapters from the episodes of a store."""

    def __init__(self, config: LoraTrainerConfig, episode_store: EpisodeStore, options: TrainOptions | None = None) -> None:
        self._config = config
        self._episode_store = episode_store
        self._options = options or TrainOptions()

    @property
    def config(self) -> LoraTrainerConfig:
        """What it was told."""
        return self._config

    @property
    def episode_store(self) -> EpisodeStore:
        """Where it reads episodes."""
        return self._episode_store

    @property
    def options(self) -> TrainOptions:
        """What it tells loraloop's own training process beyond the contract."""
        return self._options

    async def train(
        self,
        learn_model: LearnModel,
        filter: EpisodeFilter | None = None,  # noqa: A002  the name that the system which the project implements gave it
        *,
        on_event: OnEvent | None = None,
    ) -> TrainedModel:
        """Train on the episodes that pass `filter`, every episode without one.

        With loraloop's own process some tasks are held out to measure on (see TrainOptions); a `train_script` gets every sample.
        Raises EmptyData when the store has no such episode or none is usable, ScriptNotFound, ProcessFailed, and StoreError.
        """
        self._check_script()
        samples = await asyncio.to_thread(self.collect, learn_model, filter)
        return await self.train_samples(samples, learn_model.name, on_event=on_event)

    def train_sync(
        self,
        learn_model: LearnModel,
        filter: EpisodeFilter | None = None,  # noqa: A002  as in `train`
        *,
        on_event: OnEvent | None = None,
    ) -> TrainedModel:
        """`train` for callers without an event loop; in a thread of its own when there is one."""
        return run_in_plain_thread(lambda: asyncio.run(self.train(learn_model, filter, on_event=on_event)))

    def collect(self, learn_model: LearnModel, episode_filter: EpisodeFilter | None = None) -> Samples:
        """Query and convert. Raises EmptyData when there is nothing to train on, with the refusals counted by reason."""
        samples: list[TrainingData] = []
        refused: Counter[str] = Counter()
        n_episodes = 0

        def count(episode: Episode) -> Episode:
            nonlocal n_episodes
            n_episodes += 1
            return episode

        for converted in convert_all(learn_model, map(count, self._episode_store.iter_episodes(episode_filter))):
            if isinstance(converted, Refusal):
                refused[converted.reason] += 1
            else:
                samples.append(converted)
        counts = (n_episodes, len(samples), refused.total())
        log.info("stage=convert learn_model=%s episodes=%d samples=%d refused=%d", learn_model.name, *counts)
        if n_episodes == 0:
            raise EmptyData(f"No episodes found for training{_describe(episode_filter)}; ingest some first, or widen the filter")
        if not samples:
            raise EmptyData(f"No training data generated from {n_episodes} episodes by {learn_model.name!r}", refused)
        method = learn_model.method
        if self._config.train_script is not None:
            return Samples(samples, (), dict(refused), method=method)
        training, held_out = split_by_task(samples, self._options.held_out_fraction, self._options.held_out_min_tasks)
        return Samples(training, held_out, dict(refused), method=method)

    async def train_samples(
        self, samples: Samples, learn_model_name: str, *, on_event: OnEvent | None = None, model_id: LoraModelId | None = None
    ) -> TrainedModel:
        """Train on samples that are made already. Raises EmptyData, ScriptNotFound, TrainingStopped and ProcessFailed.

        `model_id` is for a caller who has written down what it begins: a second training of that id raises LoraTrainerError.
        """
        self._check_script()
        if not samples.training:
            raise EmptyData("No training data generated from episodes", samples.refused)
        parent, self._config = find_parent(self._config, self._options)
        if self._options.early_stop is not None and not samples.held_out:
            raise SettingsError(
                f"early_stop={self._options.early_stop}: nothing is held out to stop by; it takes {self._options.held_out_min_tasks} tasks "
                "or more, and a held_out_fraction above 0"
            )
        model_id = model_id or LoraModelId.new()
        data_path = await asyncio.to_thread(self.write_training_data, samples.training, model_id)
        held_out_path = None
        if samples.held_out and self._config.train_script is None:
            held_out_path = data_path.with_name("held_out.jsonl")
            await asyncio.to_thread(_write_samples, held_out_path, samples.held_out)
        log.info("stage=write model=%s samples=%d held_out=%d data=%s", model_id, len(samples.training), len(samples.held_out), data_path)
        used = dict.fromkeys(str(episode_id) for sample in samples.training for episode_id in sample.episode_ids)
        plan = RunPlan(
            id=model_id,
            created_at=now_ms(),
            learn_model=learn_model_name,
            method=samples.method,
            dataset=samples.dataset,
            config=self._config.to_dict(),
            options=self._options.to_dict(),
            data_sha256=file_sha256(data_path),
            held_out_sha256=file_sha256(held_out_path) if held_out_path else None,
            sample_count=len(samples.training),
            episode_ids=tuple(used),
            refused=dict(samples.refused or {}),
            parent=parent,
        )
        return await self._work_on(RunStore(self._config.data_dir).of(plan), plan, on_event)

    @classmethod
    def of_run(cls, run: Run, episode_store: EpisodeStore, *, output_dir: Path, **changes: Any) -> Self:
        """A trainer that was told what `run` was told, but for `changes`. Raises SettingsError, LoraTrainerError."""
        plan = run.plan
        config, options = dict(plan.config), dict(plan.options)
        for name, value in changes.items():
            (config if name in config else options)[name] = value
        config |= {"output_dir": output_dir, "data_dir": run.path.parent}
        try:
            return cls(LoraTrainerConfig(**config), episode_store, TrainOptions(**options))
        except TypeError as error:
            raise LoraTrainerError(f"run {run.id} was begun by another version of loraloop ({error}); start a new run") from error

    async def resume(self, run: Run, *, force: bool = False, on_event: OnEvent | None = None) -> TrainedModel:
        """Go on with a run of the same settings (see `of_run`) behind its last checkpoint, to the adapter that it would have become.

        `force` goes on although data, settings, libraries or the machine have changed, to another adapter. Raises LoraTrainerError for
        a run that is finished, that is being worked on, or that a `train_script` trains; else what `train_samples` raises.
        """
        if self._config.train_script is not None:
            by = f"run {run.id} is trained by {self._config.train_script}"
            raise LoraTrainerError(f"{by}, which loraloop cannot go on with; start a new run")
        if run.status.state == "finished":
            raise LoraTrainerError(f"run {run.id} is finished; its model is {run.id}")
        await asyncio.to_thread(run.check_data, force=force)
        plan = run.plan.model_copy(update={"config": self._config.to_dict(), "options": self._options.to_dict()})
        return await self._work_on(run, plan, on_event, resume=True, force=force)

    async def _work_on(
        self, run: Run, plan: RunPlan, on_event: OnEvent | None, *, resume: bool = False, force: bool = False
    ) -> TrainedModel:
        """From a run that is planned to a model that is recorded; how it ended is in its state, whatever happens."""
        lease = await hold(run)
        listener = Listener(run, on_event)
        with lease.kept(listener.lose):
            run.settle()
            if not resume or force:
                run.tell_plan(plan)
            run.move("running")
            reporters = self._open_reporters(plan)
            started = time.monotonic()
            try:
                listener.open(reporters)
                model = self._find_saved(run) if resume else None
                if model is None:
                    log_path = run.path / LOG_FILE
                    paths = Paths.of_run(run, Path(self._config.output_dir), self._adapter_of(plan.parent), resume=resume, force=force)
                    adapter_path = await self._train(paths, log_path, plan.method, listener)
                    model = make_model(plan, adapter_path, time.monotonic() - started, log_path, base_model=self._config.base_model)
                if model.adapter_sha256 is None:
                    model = LoraModelRegistry(self._config.output_dir).save(model)
            except BaseException as error:
                listener.close(_end_of(error, listener), error)
                raise
            else:
                listener.close("finished")
                remove_checkpoints(run)
            finally:
                for reporter in reporters:
                    await asyncio.to_thread(reporter.close, run.status.state)
        seconds, count = time.monotonic() - started, model.sample_count
        log.info("stage=done model=%s samples=%d seconds=%.1f adapter=%s", model.id, count, seconds, model.adapter_path)
        return model

    def _adapter_of(self, model_id: LoraModelId | None) -> Path | None:
        return None if model_id is None else LoraModelRegistry(self._config.output_dir).get(model_id).adapter_path

    def _open_reporters(self, plan: RunPlan) -> list[Reporter]:
        """One a service, all runs of a data_dir in one folder beside it."""
        made_of = plan.model_dump(mode="json", include={"learn_model", "method", "dataset", "parent", "sample_count", "data_sha256"})
        settings = {**plan.config, **plan.options}
        folder = Path(self._config.data_dir).absolute().parent / "reports"
        names = self._options.report_to
        return [open_reporter(name, run_id=plan.id, settings=settings, folder=folder, lineage=made_of) for name in names]

    def _find_saved(self, run: Run) -> TrainedModel | None:
        """The model of a run whose adapter is in place, recorded or not: its trainer was killed behind that."""
        adapter = Path(self._config.output_dir) / run.id
        if not adapter.exists():
            return None
        if (adapter / MODEL_FILE).exists():
            return LoraModelRegistry(self._config.output_dir).get(run.id)
        check_adapter(adapter, run.path / LOG_FILE, is_ours=True)
        return make_model(run.plan, adapter, None, run.path / LOG_FILE, base_model=self._config.base_model)

    async def check(self, samples: Samples, *, on_event: OnEvent | None = None) -> None:
        """Look whether a training on `samples` could start, and train nothing. Raises what stands in its way, all of it at once."""
        self._check_script()
        parent, self._config = find_parent(self._config, self._options)
        with tempfile.TemporaryDirectory(prefix="loraloop-check-") as name:
            folder = Path(name)
            data_path, held_out_path = folder / "train.jsonl", folder / "held_out.jsonl" if samples.held_out else None
            _write_samples(data_path, samples.training)
            if held_out_path is not None:
                _write_samples(held_out_path, samples.held_out)
            adapter = self._adapter_of(parent)
            output = Path(self._config.output_dir) / LoraModelId.new()
            argv = build_argv(self._config, self._options, Paths(data_path, output, held_out_path, adapter=adapter), samples.method)
            listener = Listener(None, on_event)
            try:
                await run_process([*argv, "--check"], folder / LOG_FILE, listener.hear_line)
            except ProcessFailed as error:
                said = listener.explain(error)
                raise said if said is not error else LoraTrainerError(error.stderr.strip()) from error

    def write_training_data(self, data: Sequence[TrainingData], name: str) -> Path:
        """Write `data_dir/<name>/train.jsonl`, one sample a line; the folder must be new. Raises LoraTrainerError when it is not."""
        _check_name(name)
        folder = Path(self._config.data_dir) / name
        try:
            folder.mkdir(parents=True)
        except FileExistsError as error:
            raise LoraTrainerError(f"{folder} exists already; a run never writes over another's data") from error
        except OSError as error:
            raise LoraTrainerError(f"the data folder {folder} cannot be made: {error.strerror}; choose another data_dir") from error
        path = folder / "train.jsonl"
        _write_samples(path, data)
        return path

    async def run_lora_training(
        self,
        data_path: Path,
        adapter_name: str,
        *,
        held_out_path: Path | None = None,
        on_event: OnEvent | None = None,
        method: Method = "sft",
    ) -> Path:
        """Run the training process on a file; gives `output_dir/<adapter_name>`, which then holds the adapter.

        Raises ScriptNotFound; EmptyData when the process says that it has nothing to train on; ProcessFailed when it ends badly
        otherwise or leaves no adapter. What a failed process left behind is moved to `<adapter_name>.failed`, so that nothing looks
        finished that is not.
        """
        _check_name(adapter_name)
        output = Path(self._config.output_dir) / adapter_name
        return await self._train(Paths(data_path, output, held_out_path), data_path.with_name(LOG_FILE), method, Listener(None, on_event))

    async def _train(self, paths: Paths, log_path: Path, method: Method, listener: Listener) -> Path:
        self._check_script()
        output = paths.output
        failed = output.with_name(output.name + ".failed")
        if output.exists() or failed.exists():
            raise LoraTrainerError(f"{output if output.exists() else failed} exists already; a run never writes over another's adapter")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LoraTrainerError(f"the folder {output.parent} cannot be made: {error.strerror}; choose another output_dir") from error
        argv = build_argv(self._config, self._options, paths, method)
        log.info("stage=train model=%s script=%s log=%s", output.name, self._config.train_script or "loraloop.train", log_path)
        try:
            await run_process(argv, log_path, listener.hear_line, listener.started)
            check_adapter(output, log_path, is_ours=self._config.train_script is None)
        except BaseException as error:
            if output.exists() and self._config.train_script is not None:  # ours puts a whole adapter in place, or none
                output.rename(failed)
            if isinstance(error, ProcessFailed):
                raise listener.explain(error) from error
            raise
        return output

    def _check_script(self) -> None:
        script = self._config.train_script
        if script is not None and not Path(script).is_file():
            raise ScriptNotFound(script)


def training_data_to_json(sample: TrainingData) -> str:
    """The line that a sample becomes in a training file, without the newline."""
    return json_line(sample.to_line())


def _check_name(name: str) -> None:
    """Raises LoraTrainerError for what could lead out of the folder that it is put in."""
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise LoraTrainerError(f"{name!r} is no name for a folder; use a LoraModelId")


def _write_samples(path: Path, samples: Sequence[TrainingData]) -> None:
    """One a line. Raises LoraTrainerError when they cannot be written, and then the folder is as if it had never been."""
    try:
        write_jsonl(path, [sample.to_line() for sample in samples])
    except OSError as error:
        shutil.rmtree(path.parent, ignore_errors=True)
        what = f"the training data cannot be written to {path}: {error.strerror}"
        raise LoraTrainerError(f"{what}; make room, or choose another data_dir") from error


def _end_of(error: BaseException, listener: Listener) -> RunState:
    """The state of a run that ended with `error`."""
    if isinstance(error, TrainingStopped) or listener.stopped_at is not None:
        return "stopped"
    if isinstance(error, ProcessFailed) and error.signal_name is not None:
        return "interrupted"
    return "failed" if isinstance(error, Exception) and not isinstance(error, asyncio.CancelledError) else "interrupted"


def _describe(episode_filter: EpisodeFilter | None) -> str:
    if episode_filter is None:
        return ""
    wanted = episode_filter.model_dump(exclude_defaults=True)
    return " with " + ", ".join(f"{name} {value}" for name, value in wanted.items()) if wanted else ""
