"""One training from its arguments to a finished adapter folder.

The folder appears only when everything in it is whole: weights, PEFT configuration, model card, training record. A run that fails
leaves nothing.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loraloop import base_model
from loraloop.chat.rows import Unit, UnitSet, build_units, spread
from loraloop.chat.template import ChatTemplate
from loraloop.errors import EmptyData, LoraTrainerError
from loraloop.files import file_sha256, new_directory, write_atomic, write_json
from loraloop.train import loop
from loraloop.train.arguments import TrainArguments
from loraloop.train.choice import Data, loop_settings, open_engine, open_objectives, verify
from loraloop.train.data import read_samples
from loraloop.train.model_card import model_card
from loraloop.train.objectives import Engine, Measure, Objective
from loraloop.training_data import TrainingData
from loraloop.training_record import RECORD_FILE, RefusedSample, TrainingEvent, TrainingRecord

Emit = Callable[[TrainingEvent], None]


def run(arguments: TrainArguments, emit: Emit, *, keeps_memory: bool = False) -> TrainingRecord:
    """Train and save. `keeps_memory` says that the allocator was asked to, and is only reported.

    Raises FileExistsError when the output is there already, and a LoraLoopError for all else that is foreseen.
    """
    started = time.monotonic()
    if arguments.output.exists():
        raise FileExistsError(f"--output {arguments.output} exists already; give a folder that does not exist")
    arguments = _without_noise(arguments, emit)
    base = base_model.resolve_base(arguments.model, lambda text: emit(TrainingEvent(event="note", message=text)))
    made, measured = _read(arguments, base, emit)
    data = Data.of(made.units, measured, arguments)

    device = base_model.choose_device()
    dtype = base_model.choose_dtype(arguments.dtype, device)
    emit(TrainingEvent(event="note", message=f"base {base.name} in {dtype} on {device}, {_describe_process(keeps_memory=keeps_memory)}"))
    model = base_model.load_model(base, dtype).to(device)
    model = loop.new_adapter(model, arguments.rank, arguments.alpha, arguments.dropout, arguments.seed)
    engine = open_engine(model, data.load(arguments.batch_size * arguments.grad_accum), arguments, emit)
    if arguments.verify:
        verify(model, engine, made.units, arguments, emit)
    training, measuring = open_objectives(engine, data, arguments, base.sha256, emit)
    before = _measure(engine, measuring, measured, emit, "before")
    history = loop.train(loop.Run(model, engine, training), made.units, loop_settings(arguments), emit)
    after = _measure(engine, measuring, measured, emit, "after")

    record = TrainingRecord(
        base_model=base.name,
        base_sha256=base.sha256,
        base_source=base.source,
        data_sha256=file_sha256(arguments.data),
        held_out_sha256=file_sha256(arguments.held_out) if arguments.held_out else None,
        method=arguments.method,
        settings={field.name: _plain(getattr(arguments, field.name)) for field in fields(arguments) if field.name not in _PATHS},
        seed=arguments.seed,
        dtype=dtype,
        device=device,
        versions=_versions(),
        data=made.report,
        samples_trained=made.count_samples(history.used),
        used_episode_ids=made.used_episode_ids(history.used),
        refused=[RefusedSample(episode_id=r.episode_id, reason=r.reason, detail=r.detail) for r in made.refusals],
        steps=len(history.losses),
        final_loss=_final_loss(history.losses),
        held_out_loss_before=before.loss if before else None,
        held_out_loss_after=after.loss if after else None,
        held_out_accuracy_before=before.accuracy if before else None,
        held_out_accuracy_after=after.accuracy if after else None,
        held_out_rows=sum(len(unit.rows) for unit in measured),
        loss_history=history.losses,
        training_time_secs=round(time.monotonic() - started, 3),
        peak_memory_mb=loop.peak_memory_mb(),
        gpu_memory_mb=_gpu_memory_mb(device),
        engine=engine.name,
        n_logical_tokens=history.n_logical,
        n_computed_tokens=history.n_computed,
    )
    _save(model, base, record, arguments.output)
    emit(TrainingEvent(event="saved", message=str(arguments.output)))
    return record


_PATHS = ("data", "output", "held_out")


def _save(model: Any, base: base_model.BaseModel, record: TrainingRecord, output: Path) -> None:
    """Fill the adapter's folder aside and put it in place in one step."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = base.name  # PEFT would write this machine's path
    config.target_modules = sorted(config.target_modules)  # a set until now: its order would differ from run to run
    with new_directory(output) as folder:
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        write_atomic(folder / "README.md", model_card(record))
        write_json(folder / RECORD_FILE, record.model_dump(mode="json"))
        for file in folder.iterdir():
            os.chmod(file, 0o644)  # PEFT makes the weights unreadable to others, so that a server under another user fails


def _measure(engine: Engine, objective: Objective, units: list[Unit], emit: Emit, when: str) -> Measure | None:
    if not units:
        return None
    measure = objective.measure(engine, units)
    if not math.isfinite(measure.loss):
        raise LoraTrainerError(f"the held-out loss {when} training is {measure.loss}; lower the learning rate, or look at the base model")
    emit(TrainingEvent(event="held_out", message=when, loss=measure.loss, accuracy=measure.accuracy, margin=measure.margin))
    return measure


def _without_noise(arguments: TrainArguments, emit: Emit) -> TrainArguments:
    """No dropout for dpo and kto, which compare the model with its reference: noise on one side only would be a gain or a loss."""
    if arguments.method not in ("dpo", "kto") or not arguments.dropout:
        return arguments
    emit(TrainingEvent(event="note", message=f"{arguments.method} trains without dropout, which would be noise in its rewards"))
    return replace(arguments, dropout=0.0)


def _read(arguments: TrainArguments, base: base_model.BaseModel, emit: Emit) -> tuple[UnitSet, list[Unit]]:
    """What to train on, told before anything else happens, and what to measure on."""
    samples = read_samples(arguments.data)
    held_out = read_samples(arguments.held_out) if arguments.held_out else None
    template = ChatTemplate(base_model.load_tokenizer(base))
    made = build_units(samples, template, arguments.max_seq_length, method=arguments.method, long=arguments.long)
    emit(TrainingEvent(event="data", data=made.report))
    return made, _measured_units(held_out, template, arguments, emit) if held_out is not None else []


def _measured_units(samples: list[TrainingData], template: ChatTemplate, arguments: TrainArguments, emit: Emit) -> list[Unit]:
    """The units to measure on, and what is left out of them told; none when no sample gives one: that is no reason not to train."""
    try:
        made = build_units(samples, template, arguments.max_seq_length, method=arguments.method, long=arguments.long)
    except EmptyData as error:
        emit(TrainingEvent(event="warning", message=f"nothing is measured on held-out tasks: {error}"))
        return []
    if made.report.refused:
        counts = ", ".join(f"{reason} {count}" for reason, count in made.report.refused.items())
        emit(TrainingEvent(event="warning", message=f"left out of what is held out: {counts}"))
    units = spread(made.units, arguments.held_out_tokens)
    if len(units) < len(made.units):
        noun = {"dpo": "pairs", "kto": "samples"}.get(arguments.method, "rows")
        limit = f"no more fit into --held-out-tokens {arguments.held_out_tokens}"
        emit(TrainingEvent(event="note", message=f"measured on {len(units)} of {len(made.units)} held-out {noun}: {limit}"))
    return units


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


def _versions() -> dict[str, str]:
    names = ("loraloop", "torch", "transformers", "peft", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _plain(value: object) -> str | int | float | bool | None:
    return value if isinstance(value, str | int | float | bool | None) else str(value)
