"""What is looked at before a training starts, so that all that stands in its way is told at once, in seconds and without weights.

The base model is found and hashed, its template renders the data, an adapter fits onto it, and there is room on the disk and in memory.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loraloop import base_model
from loraloop.base_model import BaseModel
from loraloop.chat.rows import Unit, UnitSet, build_units, spread
from loraloop.chat.template import ChatTemplate
from loraloop.errors import BaseModelError, CannotStart, EmptyData, LoraLoopError, LoraTrainerError
from loraloop.train import loop
from loraloop.train.architecture import find_obstacle, read_architecture
from loraloop.train.arguments import TrainArguments
from loraloop.train.checkpoint import KEPT
from loraloop.train.choice import Data
from loraloop.train.data import read_samples
from loraloop.train.memory import make_plan
from loraloop.train.parent import check_parent
from loraloop.training_data import TrainingData
from loraloop.training_record import TrainingEvent

Emit = Callable[[TrainingEvent], None]

RECORD_BYTES = 64 << 10
"""Room for configuration, card and record beside an adapter."""


@dataclass(frozen=True)
class Prepared:
    """All that a training begins with but weights."""

    base: BaseModel
    made: UnitSet
    measured: list[Unit]
    data: Data
    device: str
    dtype: Literal["float32", "bfloat16"]


def prepare(arguments: TrainArguments, emit: Emit) -> Prepared:
    """Look at everything. Raises the one error that there is, or CannotStart with all of them."""
    found = _Findings()
    base = template = None
    made: UnitSet | None = None
    measured: list[Unit] = []
    samples: list[TrainingData] | None = None
    held_out: list[TrainingData] | None = None
    with found.noted():
        _check_writable(arguments.output.parent, "--output")
    with found.noted():
        _check_writable(arguments.checkpoints, "--checkpoints")
    with found.noted():
        base = base_model.resolve_base(arguments.model, lambda text: emit(TrainingEvent(event="note", message=text)))
    with found.noted():
        samples = read_samples(arguments.data)
    with found.noted():
        held_out = read_samples(arguments.held_out) if arguments.held_out else None
    if base is not None:
        with found.noted():
            template = ChatTemplate(base_model.load_tokenizer(base))
    if template is not None and samples is not None:
        with found.noted():
            made = build_units(samples, template, arguments.max_seq_length, method=arguments.method, long=arguments.long)
            emit(TrainingEvent(event="data", data=made.report))
    if template is not None and held_out is not None:
        with found.noted():
            measured = _measured_units(held_out, template, arguments, emit)
    device = base_model.choose_device()
    dtype = base_model.choose_dtype(arguments.dtype, device)
    data = Data.of(made.units, measured, arguments) if made is not None else None
    if base is not None:
        with found.noted():
            check_parent(arguments, base)
        with found.noted():
            _check_model(base, dtype, data, arguments, emit)
    found.raise_if_any()
    assert base is not None  # noqa: S101  or it would have been found
    assert made is not None  # noqa: S101
    assert data is not None  # noqa: S101
    return Prepared(base, made, measured, data, device, dtype)


class _Findings:
    """Errors that do not keep the next thing from being looked at."""

    def __init__(self) -> None:
        self._errors: list[Exception] = []

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Whatever is foreseen and raised in here is kept for later."""
        try:
            yield
        except (LoraLoopError, OSError, ValueError) as error:
            self._errors.append(error)

    def raise_if_any(self) -> None:
        """Raises what was found."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            raise CannotStart([f"{type(error).__name__}: {error}" for error in self._errors])


def _check_writable(folder: Path | None, option: str) -> None:
    """Raises LoraTrainerError for a folder that nothing can be written into; it is made when it is not there."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LoraTrainerError(f"{option}: {folder} cannot be written to: {error.strerror}; choose another folder") from error


def _check_model(base: BaseModel, dtype: Literal["float32", "bfloat16"], data: Data | None, arguments: TrainArguments, emit: Emit) -> None:
    """That an adapter fits onto the model, and what it takes on the disk and in memory."""
    model = _skeleton(base, dtype)
    if model is None:  # the real one will say why
        return
    n_bytes = {id(parameter): parameter.numel() * parameter.itemsize for parameter in model.parameters()}
    try:
        adapted = loop.new_adapter(model, arguments.rank, arguments.alpha, arguments.dropout, arguments.seed)
    except ValueError as error:
        raise BaseModelError(f"base model {base.name!r}: no adapter fits onto it: {error}") from error
    n_adapter = sum(parameter.numel() * parameter.itemsize for parameter in adapted.parameters() if parameter.requires_grad)
    _check_room(arguments, n_adapter)
    if data is None or arguments.engine != "tree" or find_obstacle(adapted) is not None:
        return
    load = data.load(arguments.batch_size * arguments.grad_accum)
    _, words = make_plan(read_architecture(adapted), load, arguments.max_memory, coming=sum(n_bytes.values()) + n_adapter)
    if arguments.check:
        emit(TrainingEvent(event="note", message=words))


def _skeleton(base: BaseModel, dtype: str) -> Any:
    """The model without weights, in no time; None when it cannot be made."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(base.path), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    except Exception:  # noqa: BLE001  whatever it is, loading the real one says it better
        return None


def _check_room(arguments: TrainArguments, n_adapter: int) -> None:
    """Raises LoraTrainerError when the disk has no room for the adapter and its checkpoints: it and two moments, one more than are kept."""
    needs = {arguments.output.parent: n_adapter + RECORD_BYTES}
    if arguments.checkpoints is not None:
        best = 1 if arguments.early_stop is not None else 0
        needs[arguments.checkpoints] = (KEPT + 1) * ((3 + best) * n_adapter + RECORD_BYTES)
    for folder in needs:
        need = sum(n_bytes for other, n_bytes in needs.items() if other.stat().st_dev == folder.stat().st_dev)
        free = shutil.disk_usage(folder).free
        if free < need:
            raise LoraTrainerError(
                f"the disk of {folder} has {free >> 10:,} kB free, and the adapter and its checkpoints need {need >> 10:,} kB; make room, "
                "choose another folder, or lower the rank"
            )


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
