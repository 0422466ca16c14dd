"""LoraTrainer: episodes in, a TrainedModel out, through a training process that anybody's script can replace.

query -> the learn model's own `convert` -> a training file -> a child process -> an adapter -> a record in the registry

It holds no weights and loads no torch. Every run has a fresh id, and every file of the run lies in a folder of that name, so no run
can overwrite another's; names of learn models never become paths.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from loraloop.episode import Episode, EpisodeFilter, EpisodeId, now_ms
from loraloop.errors import EmptyData, LoraTrainerError, ProcessFailed, ScriptNotFound
from loraloop.files import json_line, write_jsonl
from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.lora.model import LoraModelId, TrainedModel, TrainingMetrics
from loraloop.lora.process import run_process
from loraloop.lora.registry import MODEL_FILE, LoraModelRegistry
from loraloop.plugins import EpisodeStore, LearnModel, convert_all
from loraloop.training_data import Method, Refusal, TrainingData, split_by_task
from loraloop.training_record import RECORD_FILE, TrainingEvent, TrainingRecord

log = logging.getLogger("loraloop.lora")

OnEvent = Callable[[TrainingEvent], None]
Result = TypeVar("Result")


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

    async def train_samples(self, samples: Samples, learn_model_name: str, *, on_event: OnEvent | None = None) -> TrainedModel:
        """Train on samples that are made already. Raises EmptyData, ScriptNotFound and ProcessFailed."""
        self._check_script()
        if not samples.training:
            raise EmptyData("No training data generated from episodes", samples.refused)
        model_id = LoraModelId.new()
        data_path = await asyncio.to_thread(self.write_training_data, samples.training, model_id)
        held_out_path = None
        if samples.held_out and self._config.train_script is None:
            held_out_path = data_path.with_name("held_out.jsonl")
            await asyncio.to_thread(write_jsonl, held_out_path, [sample.to_line() for sample in samples.held_out])
        log.info("stage=write model=%s samples=%d held_out=%d data=%s", model_id, len(samples.training), len(samples.held_out), data_path)
        started = time.monotonic()
        adapter_path = await self.run_lora_training(
            data_path, model_id, held_out_path=held_out_path, on_event=on_event, method=samples.method
        )
        seconds = round(time.monotonic() - started, 3)
        log_path = data_path.with_name("training.log")
        model = self._trained_model(model_id, adapter_path, learn_model_name, samples, seconds=seconds, log_path=log_path)
        LoraModelRegistry(self._config.output_dir).save(model)
        log.info("stage=done model=%s samples=%d seconds=%.1f adapter=%s", model_id, model.sample_count, seconds, adapter_path)
        return model

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
        write_jsonl(path, [sample.to_line() for sample in data])
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
        self._check_script()
        _check_name(adapter_name)
        output = Path(self._config.output_dir) / adapter_name
        failed = output.with_name(output.name + ".failed")
        if output.exists() or failed.exists():
            raise LoraTrainerError(f"{output if output.exists() else failed} exists already; a run never writes over another's adapter")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LoraTrainerError(f"the folder {output.parent} cannot be made: {error.strerror}; choose another output_dir") from error
        log_path = data_path.with_name("training.log")
        argv = self._argv(data_path, output, held_out_path, method)
        log.info("stage=train model=%s script=%s log=%s", adapter_name, self._config.train_script or "loraloop.train", log_path)
        empty: list[TrainingEvent] = []

        def hear(event: TrainingEvent) -> None:
            if event.event == "empty":
                empty.append(event)
            elif on_event is not None:
                on_event(event)

        try:
            await run_process(argv, log_path, lambda line: _hear(line, hear))
            self._check_adapter(output, log_path)
        except BaseException as error:
            if output.exists():
                output.rename(failed)
            if isinstance(error, ProcessFailed) and empty:
                raise EmptyData(empty[-1].message or "nothing to train on", empty[-1].refused) from error
            raise
        return output

    def _argv(self, data_path: Path, output: Path, held_out_path: Path | None, method: Method) -> list[str]:
        config = self._config
        python = str(config.python_path or sys.executable)
        script = [str(config.train_script)] if config.train_script is not None else ["-m", "loraloop.train"]
        own: list[str] = []
        if config.train_script is None:
            own = self._options.to_argv(method) + (["--held-out", str(held_out_path)] if held_out_path else [])
        contract = {
            "--data": data_path,
            "--output": output,
            "--model": config.base_model,
            "--rank": config.lora_rank,
            "--alpha": _plain_number(config.lora_alpha),
            "--dropout": _plain_number(config.lora_dropout),
            "--epochs": config.epochs,
            "--batch-size": config.batch_size,
            "--grad-accum": config.gradient_accumulation,
            "--lr": _plain_number(config.learning_rate),
            "--max-seq-length": config.max_seq_length,
        }
        return [python, *script, *(str(part) for pair in contract.items() for part in pair), *own]

    def _check_script(self) -> None:
        script = self._config.train_script
        if script is not None and not Path(script).is_file():
            raise ScriptNotFound(script)

    def _check_adapter(self, output: Path, log_path: Path) -> None:
        """A folder with something in it from a script, PEFT's two files from our own process; the model's record comes from us."""
        if (output / MODEL_FILE).exists():
            reason = f"the training process wrote {MODEL_FILE} into {output}; that is the name of loraloop's own record, choose another"
            raise ProcessFailed(0, "", log_path, reason)
        needed = ["adapter_config.json", "adapter_model.safetensors"] if self._config.train_script is None else ["*"]
        for pattern in needed:
            if not any(file.is_file() and file.stat().st_size for file in output.glob(pattern)):
                missing = "adapter" if pattern == "*" else pattern
                raise ProcessFailed(0, "", log_path, f"the training process ended well (exit 0) but wrote no {missing} into {output}")

    def _trained_model(
        self, model_id: LoraModelId, adapter_path: Path, learn_model_name: str, samples: Samples, *, seconds: float, log_path: Path
    ) -> TrainedModel:
        record = _load_record(adapter_path / RECORD_FILE)
        used = list(dict.fromkeys(str(episode_id) for sample in samples.training for episode_id in sample.episode_ids))
        refused = Counter(samples.refused or {})
        sample_count = len(samples.training)
        metrics = TrainingMetrics(training_time_secs=seconds)
        if record is not None:
            used, sample_count = record.used_episode_ids, record.samples_trained
            refused.update(record.data.refused)
            metrics = TrainingMetrics(
                final_loss=record.final_loss,
                training_time_secs=seconds,
                gpu_memory_mb=record.gpu_memory_mb,
                peak_memory_mb=record.peak_memory_mb,
                n_tokens=record.data.n_tokens,
                n_supervised_tokens=record.data.n_supervised_tokens,
                held_out_loss_before=record.held_out_loss_before,
                held_out_loss_after=record.held_out_loss_after,
                held_out_accuracy_before=record.held_out_accuracy_before,
                held_out_accuracy_after=record.held_out_accuracy_after,
            )
        return TrainedModel(
            id=model_id,
            base_model=self._config.base_model,
            adapter_path=adapter_path,
            learn_model_name=learn_model_name,
            episode_ids=tuple(EpisodeId.parse(episode_id) for episode_id in used),
            sample_count=sample_count,
            created_at=now_ms(),
            metrics=metrics,
            base_sha256=record.base_sha256 if record else None,
            dataset=samples.dataset,
            method=samples.method,
            refused=dict(sorted(refused.items())),
            log_path=log_path,
        )


def training_data_to_json(sample: TrainingData) -> str:
    """The line that a sample becomes in a training file, without the newline."""
    return json_line(sample.to_line())


def run_in_plain_thread(work: Callable[[], Result]) -> Result:
    """The result of `work`, which runs its own event loop: here, or in another thread when this one has a loop running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    result: list[Result] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001  handed to the caller below
            failure.append(error)

    thread = threading.Thread(target=target, name="loraloop-train")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _check_name(name: str) -> None:
    """Raises LoraTrainerError for what could lead out of the folder that it is put in."""
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise LoraTrainerError(f"{name!r} is no name for a folder; use a LoraModelId")


def _hear(line: str, on_event: OnEvent) -> None:
    """Pass on what is an event; anything else on stdout is log."""
    if not line.startswith("{"):
        log.debug("child %s", line)
        return
    try:
        event = TrainingEvent.model_validate(json.loads(line))
    except (ValueError, RecursionError):  # also pydantic's ValidationError: a script's own JSON
        log.debug("child %s", line)
        return
    on_event(event)


def _load_record(path: Path) -> TrainingRecord | None:
    """The training record, None when the script wrote none that we understand."""
    try:
        return TrainingRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _plain_number(value: float) -> str:
    """Shortest decimal text without an exponent: 32.0 is `32`, 2e-4 is `0.0002`."""
    return format(Decimal(repr(float(value))).normalize(), "f")


def _describe(episode_filter: EpisodeFilter | None) -> str:
    if episode_filter is None:
        return ""
    wanted = episode_filter.model_dump(exclude_defaults=True)
    return " with " + ", ".join(f"{name} {value}" for name, value in wanted.items()) if wanted else ""
