"""One training from its arguments to a finished adapter folder.

The folder appears only when everything in it is whole: weights, PEFT configuration, model card, training record. A run that fails
leaves nothing but its checkpoints, from which the next process goes on to the very same adapter.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from loraloop import base_model
from loraloop.errors import LoraTrainerError
from loraloop.files import file_sha256, new_directory, remove_asides, write_atomic, write_json
from loraloop.train import loop
from loraloop.train.arguments import TrainArguments
from loraloop.train.checkpoint import Checkpoints
from loraloop.train.choice import describe_plan, loop_settings, open_engine, open_objectives, verify
from loraloop.train.device import held_device
from loraloop.train.identity import HOW_TO_RUN, PATHS, identify, settle, versions
from loraloop.train.keeper import Limits, RunKeeper
from loraloop.train.model_card import model_card
from loraloop.train.objectives import Engine, Measure, Objective
from loraloop.train.parent import adapter_hash, start_adapter
from loraloop.train.preflight import Prepared, prepare
from loraloop.train.stop import Stop, StopAsked
from loraloop.training_record import RECORD_FILE, RefusedSample, TrainingEvent, TrainingRecord

Emit = Callable[[TrainingEvent], None]


def run(arguments: TrainArguments, emit: Emit, *, stop: Stop | None = None, keeps_memory: bool = False) -> TrainingRecord | None:
    """Train and save; with `check` only look whether that can be done, and give None.

    `keeps_memory` says that the allocator was asked to, and is only reported. Raises FileExistsError when the output is there already,
    a LoraLoopError for all else that is foreseen, and StopAsked when `stop` was told.
    """
    started = time.monotonic()
    if arguments.output.exists():
        raise FileExistsError(f"--output {arguments.output} exists already; give a folder that does not exist")
    arguments = _without_noise(arguments, emit)
    remove_asides(arguments.output)
    prepared = prepare(arguments, emit)
    if arguments.check:
        emit(TrainingEvent(event="note", message="this training can start"))
        return None
    stop = stop or Stop()
    with held_device(prepared.device, arguments, stop, emit):
        words = f"base {prepared.base.name} in {prepared.dtype} on {prepared.device}, {_describe_process(keeps_memory=keeps_memory)}"
        emit(TrainingEvent(event="note", message=words))
        return _Training(arguments, prepared, emit, stop, started).run()


@dataclass
class _Training:
    """The work of one process on a run."""

    arguments: TrainArguments
    prepared: Prepared
    emit: Emit
    stop: Stop
    started: float

    def run(self) -> TrainingRecord:
        """From the weights of the base model to the adapter's folder."""
        arguments, prepared, emit = self.arguments, self.prepared, self.emit
        base, data, units = prepared.base, prepared.data, prepared.made.units
        checkpoints = self._open_checkpoints()
        earlier = checkpoints.read_identity(force=arguments.force) if checkpoints and arguments.resume else None
        unchanged = base_model.watch_files(base)
        model = base_model.load_model(base, prepared.dtype).to(prepared.device)
        model = start_adapter(model, arguments)
        identity = identify(arguments, prepared)
        reuses_plan = settle(identity, earlier, arguments, emit)
        load = data.load(arguments.batch_size * arguments.grad_accum)
        engine = open_engine(model, load, arguments, emit, earlier.plan if earlier and reuses_plan else None)
        if checkpoints:
            checkpoints.write_identity(replace(identity, plan=describe_plan(engine)))
        if arguments.verify and not arguments.resume:
            verify(model, engine, units, arguments, emit)
        training, measuring = open_objectives(engine, data, arguments, base.sha256, emit)

        optimizer = loop.new_optimizer(model)
        measure = partial(self._measure_on_the_way, engine, measuring) if prepared.measured else None
        steps = loop.count_steps(len(units), loop_settings(arguments))
        limits = Limits.of(arguments, steps)
        keeper = RunKeeper(model, optimizer, self.stop, checkpoints, limits=limits, measure=measure, check=unchanged)
        before = self._begin(keeper, engine, measuring)
        seconds_before = keeper.history.seconds
        try:
            keeper.evaluate()
            history = loop.train(loop.Run(model, engine, training, optimizer), units, loop_settings(arguments), emit, keeper)
            keeper.finish()
            after = self._measure(engine, measuring, "after")
            unchanged()
        except StopAsked:
            with suppress(StopAsked):
                keeper.save()
            emit(TrainingEvent(event="stopped", step=(checkpoints.last if checkpoints else None) or 0, steps=steps))
            self.stop.is_told = True
            raise
        record = self._record(engine, history, before, after, seconds_before=seconds_before)
        with self.stop.protected(is_last=True):
            self._save(model, record, checkpoints)
            emit(TrainingEvent(event="saved", message=str(arguments.output)))
        return record

    def _open_checkpoints(self) -> Checkpoints | None:
        if self.arguments.checkpoints is None:
            return None
        checkpoints = Checkpoints(self.arguments.checkpoints, self.emit, self.arguments.checkpoint_every)
        if not self.arguments.resume:
            checkpoints.begin()
        return checkpoints

    def _begin(self, keeper: RunKeeper, engine: Engine, measuring: Objective) -> Measure | None:
        """What was measured before the first step: by the process that took it, or now."""
        progress = keeper.restore() if self.arguments.resume else None
        if progress is not None:
            self.emit(TrainingEvent(event="note", message=f"going on behind step {progress.step}"))
            return Measure(**{"n_computed": 0, **progress.before}) if progress.before else None  # type: ignore[arg-type]
        if self.arguments.resume:
            self.emit(TrainingEvent(event="note", message="there is no whole checkpoint: beginning anew, with the same outcome"))
        before = self._measure(engine, measuring, "before")
        keeper.begin({"loss": before.loss, "accuracy": before.accuracy, "margin": before.margin} if before else None)
        return before

    def _measure(self, engine: Engine, objective: Objective, when: str, step: int | None = None) -> Measure | None:
        units = self.prepared.measured
        if not units:
            return None
        measure = objective.measure(engine, units)
        if not math.isfinite(measure.loss):
            said = f"the held-out loss {when} training is {measure.loss}"
            raise LoraTrainerError(f"{said}; lower the learning rate, or look at the base model")
        self.emit(
            TrainingEvent(event="held_out", message=when, step=step, loss=measure.loss, accuracy=measure.accuracy, margin=measure.margin)
        )
        return measure

    def _measure_on_the_way(self, engine: Engine, objective: Objective, step: int) -> float:
        measure = self._measure(engine, objective, "during", step)
        return measure.loss if measure else math.nan

    def _record(
        self, engine: Engine, history: loop.History, before: Measure | None, after: Measure | None, *, seconds_before: float
    ) -> TrainingRecord:
        arguments, made, base = self.arguments, self.prepared.made, self.prepared.base
        return TrainingRecord(
            base_model=base.name,
            base_sha256=base.sha256,
            base_source=base.source,
            data_sha256=file_sha256(arguments.data),
            held_out_sha256=file_sha256(arguments.held_out) if arguments.held_out else None,
            method=arguments.method,
            settings=_settings(arguments),
            seed=arguments.seed,
            dtype=self.prepared.dtype,
            device=self.prepared.device,
            versions=versions(),
            data=made.report,
            samples_trained=made.count_samples(frozenset(history.used)),
            used_episode_ids=made.used_episode_ids(frozenset(history.used)),
            refused=[RefusedSample(episode_id=r.episode_id, reason=r.reason, detail=r.detail) for r in made.refusals],
            steps=len(history.losses),
            final_loss=_final_loss(history.losses),
            held_out_loss_before=before.loss if before else None,
            held_out_loss_after=after.loss if after else None,
            held_out_accuracy_before=before.accuracy if before else None,
            held_out_accuracy_after=after.accuracy if after else None,
            held_out_rows=sum(len(unit.rows) for unit in self.prepared.measured),
            loss_history=history.losses,
            ended_by=history.ended_by or "steps",
            best_step=history.best_step,
            held_out_history=history.held_out,
            continued_from=adapter_hash(arguments.adapter),
            training_time_secs=round(seconds_before + time.monotonic() - self.started, 3),
            peak_memory_mb=loop.peak_memory_mb(),
            gpu_memory_mb=_gpu_memory_mb(self.prepared.device),
            engine=engine.name,
            n_logical_tokens=history.n_logical,
            n_computed_tokens=history.n_computed,
        )

    def _save(self, model: Any, record: TrainingRecord, checkpoints: Checkpoints | None) -> None:
        """Fill the adapter's folder aside and put it in place in one step."""
        config = model.peft_config["default"]
        config.base_model_name_or_path = self.prepared.base.name  # PEFT would write this machine's path
        config.target_modules = sorted(config.target_modules)  # a set until now: its order would differ from run to run
        config.inference_mode = True  # PEFT would write this of a fresh adapter only
        try:
            with new_directory(self.arguments.output) as folder:
                model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
                write_atomic(folder / "README.md", model_card(record))
                write_json(folder / RECORD_FILE, record.model_dump(mode="json"))
                for file in folder.iterdir():
                    os.chmod(file, 0o644)  # PEFT makes the weights unreadable to others, so that a server under another user fails
        except OSError as error:
            last = checkpoints.last if checkpoints else None
            kept = f"; the checkpoint of step {last} is kept: make room, and go on with it" if last else ""
            raise LoraTrainerError(f"the adapter cannot be saved in {self.arguments.output}: {error.strerror or error}{kept}") from error


def _without_noise(arguments: TrainArguments, emit: Emit) -> TrainArguments:
    """No dropout for dpo and kto, which compare the model with its reference: noise on one side only would be a gain or a loss."""
    if arguments.method not in ("dpo", "kto") or not arguments.dropout:
        return arguments
    emit(TrainingEvent(event="note", message=f"{arguments.method} trains without dropout, which would be noise in its rewards"))
    return replace(arguments, dropout=0.0)


def _describe_process(*, keeps_memory: bool) -> str:
    import torch

    allocator = "keeps freed memory" if keeps_memory else "is the system's as it is"
    return f"{torch.get_num_threads()} threads, the allocator {allocator}"


def _final_loss(history: list[tuple[int, float]]) -> float | None:
    tail = [loss for _, loss in history[-max(1, len(history) // 10) :]]
    return sum(tail) / len(tail) if tail else None


def _gpu_memory_mb(device: str) -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() >> 20 if device == "cuda" else None


def _settings(arguments: TrainArguments) -> dict[str, str | int | float | bool | None]:
    """What decides on the adapter, as the record keeps it."""
    names = [field.name for field in fields(arguments) if field.name not in (*PATHS, *HOW_TO_RUN)]
    return {name: _plain(getattr(arguments, name)) for name in names}


def _plain(value: object) -> str | int | float | bool | None:
    return value if isinstance(value, str | int | float | bool | None) else str(value)
