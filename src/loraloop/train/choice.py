"""Which engine computes a run, within which memory, for which objective, and the proof at run time that it computes what it should.

The tree engine is the default. A model that it has no proven path for trains on the dense engine, with a warning that says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from loraloop.base_model import cache_directory
from loraloop.chat.render import Row
from loraloop.chat.rows import Unit
from loraloop.errors import LoraTrainerError
from loraloop.train import loop
from loraloop.train.architecture import find_obstacle, read_architecture
from loraloop.train.arguments import TrainArguments
from loraloop.train.arithmetic import choose_arithmetic
from loraloop.train.buffers import Keep
from loraloop.train.dense import MICRO_BATCH_TOKENS, DenseEngine
from loraloop.train.engine import Plan, TreeEngine
from loraloop.train.memory import Load, check_plan, free_bytes, make_plan
from loraloop.train.objectives import Desirability, Engine, Likelihood, Objective, Preference, put_elsewhere
from loraloop.train.parent import adapter_hash
from loraloop.train.reference import open_reference
from loraloop.train.tree import Floats
from loraloop.training_record import TrainingEvent

Emit = Callable[[TrainingEvent], None]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4, torch.bfloat16: 0.1}
"""Relative difference of all gradients that two engines may have by rounding alone (docs/lab-book.md has what they do have)."""


def open_engine(model: Any, load: Load, arguments: TrainArguments, emit: Emit, earlier: dict[str, int] | None = None) -> Engine:
    """The engine for `model`, to compute `load`, by the plan of an `earlier` process of the same run where there was one.

    Raises LoraTrainerError when that cannot be done within the memory limit.
    """
    if arguments.engine == "tree":
        obstacle = find_obstacle(model)
        if obstacle is None:
            return _open_tree(model, load, arguments, emit, earlier)
        emit(TrainingEvent(event="warning", message=f"every sample is computed by itself (dense engine): {obstacle}"))
    use_checkpointing(model, load, arguments, emit, earlier)
    return DenseEngine(model, arguments.batch_size)


def describe_plan(engine: Engine) -> dict[str, int]:
    """What another process needs to know to compute in the same order, and so round alike."""
    if isinstance(engine, TreeEngine):
        plan = engine.plan
        return {"block_rows": plan.block_rows, "keep": int(plan.keep), "path_rows": plan.path_rows, "whole_rows": plan.whole_rows}
    model = engine.model if isinstance(engine, DenseEngine) else None
    return {"recomputes": int(getattr(model, "is_gradient_checkpointing", False))}


@dataclass(frozen=True)
class Data:
    """The units to train on and to measure on, and for kto their prompts with other answers."""

    units: Sequence[Unit]
    measured: Sequence[Unit]
    elsewhere: dict[int, Row]
    measured_elsewhere: dict[int, Row]

    @classmethod
    def of(cls, units: Sequence[Unit], measured: Sequence[Unit], arguments: TrainArguments) -> Data:
        """With other answers where the method asks for them."""
        if arguments.method != "kto":
            return cls(units, measured, {}, {})
        return cls(units, measured, *(put_elsewhere(part, arguments.max_seq_length) for part in (units, measured)))

    def load(self, window: int) -> Load:
        """What is computed at once, with `window` units in a step."""
        steps, measured = (
            [_list_rows(unit, others) for unit in part]
            for part, others in ((self.units, self.elsewhere), (self.measured, self.measured_elsewhere))
        )
        return Load.of(steps, window, [row for rows in measured for row in rows])


def _list_rows(unit: Unit, elsewhere: dict[int, Row]) -> list[Row]:
    """The rows of a unit, and its prompt with another answer where there is one."""
    return [*unit.rows, *([elsewhere[unit.sample_number]] if unit.sample_number in elsewhere else [])]


def _list_used(units: Sequence[Unit], arguments: TrainArguments) -> list[Unit]:
    """The units that a training comes to before its last step, which may be long before it has seen all."""
    settings = loop_settings(arguments)
    windows = loop.windows(len(units), settings, loop.count_steps(len(units), settings))
    return [units[index] for index in sorted({index for _, window in windows for index in window})]


def open_objectives(engine: Engine, data: Data, arguments: TrainArguments, base_sha256: str, emit: Emit) -> tuple[Objective, Objective]:
    """What to train, and the same to measure on held-out tasks; for dpo and kto the reference measures their rows first.

    That is the base model, or the adapter that is trained on, which the model has when this is called.
    """
    if arguments.method in ("sft", "weighted"):
        return Likelihood(), Likelihood()
    both = (_list_used(data.units, arguments), data.elsewhere), (data.measured, data.measured_elsewhere)
    rows = [row for units, others in both for unit in units for row in _list_rows(unit, others)]
    window = arguments.batch_size * arguments.grad_accum
    parent = adapter_hash(arguments.adapter)
    origin = f"{base_sha256} {parent or ''} {_describe_numbers(engine)}"
    cache = cache_directory() / "reference"
    largest = data.load(window).largest
    reference = open_reference(engine, rows, cache, origin, emit, chunk_tokens=largest, adapter=parent is not None)
    if arguments.method == "dpo":
        preference = Preference(reference, arguments.beta, arguments.loss)
        return preference, preference
    _warn_of_balance(data.units, arguments, emit)
    if not data.elsewhere:
        message = "all samples begin alike: kto has no answers to other prompts to compare with, and takes their gain (z) as 0"
        emit(TrainingEvent(event="warning", message=message))
    weights = (arguments.beta, arguments.desirable_weight, arguments.undesirable_weight)
    return Desirability(reference, data.elsewhere, *weights), Desirability(reference, data.measured_elsewhere, *weights)


def _describe_numbers(engine: Engine) -> str:
    """What the numbers of an engine follow from besides weights and rows: precision and kernels."""
    if isinstance(engine, TreeEngine):
        return f"tree {engine.architecture.dtype} {engine.arithmetic.name} {version('loraloop')}"
    parameter = next(engine.model.parameters()) if isinstance(engine, DenseEngine) else None
    return f"dense {parameter.dtype if parameter is not None else ''} {version('loraloop')}"


def _warn_of_balance(units: Sequence[Unit], arguments: TrainArguments, emit: Emit) -> None:
    """Kto learns from both kinds; says so when one is not there, or counts far more than the other."""
    good = sum(unit.weight for unit in units if unit.n_better)
    bad = sum(unit.weight for unit in units if not unit.n_better)
    if not good or not bad:
        kind, lacks = ("undesirable", "what to do instead") if bad else ("desirable", "what to avoid")
        emit(TrainingEvent(event="warning", message=f"all samples are {kind}: the model is not told {lacks}"))
        return
    ratio = arguments.desirable_weight * good / (arguments.undesirable_weight * bad)
    if not 0.5 <= ratio <= 2:
        name, value = ("undesirable", ratio) if ratio > 1 else ("desirable", 1 / ratio)
        words = f"desirable samples count {ratio:.2g} times as much as undesirable ones"
        emit(TrainingEvent(event="warning", message=f"{words}; --{name}-weight {value:.2g} would balance them"))


def loop_settings(arguments: TrainArguments) -> loop.LoopSettings:
    """What the loop needs of the arguments."""
    return loop.LoopSettings(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        gradient_accumulation=arguments.grad_accum,
        learning_rate=arguments.lr,
        warmup_ratio=arguments.warmup_ratio,
        max_grad_norm=arguments.max_grad_norm,
        max_steps=arguments.max_steps,
        seed=arguments.seed,
    )


def verify(model: Any, engine: Engine, units: Sequence[Unit], arguments: TrainArguments, emit: Emit) -> None:
    """Compute the gradient of the first step with `engine` and with the dense one, without dropout, from an adapter that is not zero.

    What is compared is the likelihood of all rows of the step, those to become less likely with a minus: whatever the method, its
    gradient is a sum of these. Raises LoraTrainerError, and nothing is trained, when they differ by more than rounding.
    """
    if not isinstance(engine, TreeEngine):
        emit(TrainingEvent(event="note", message="nothing to verify: the dense engine is what the tree engine is compared with"))
        return
    settings = loop_settings(arguments)
    _, window = next(iter(loop.windows(len(units), settings, 1)))
    batch = [units[index] for index in window]
    rows = [row for unit in batch for row in unit.rows]
    share = 1 / sum(sum(row.weights[1:]) for row in rows)
    # the two sides of a pair must not cancel out: rounding would be all that is left of it
    coefficients = [sign * share for unit in batch for side, sign in ((unit.better, 1.0), (unit.worse, -0.5)) for _ in side]
    model.eval()  # without dropout, which the two draw differently
    dense = DenseEngine(model, 1)
    with _speaking(engine):
        expected_losses, expected = _gradient(model, lambda: dense.add_gradient(rows, coefficients))
        losses, found = _gradient(model, lambda: engine.add_gradient(rows, coefficients))
    difference = float((found - expected).norm() / expected.norm())
    tolerance = TOLERANCE[engine.architecture.dtype]
    loss, expected_loss = float(losses.sum()) * share, float(expected_losses.sum()) * share
    numbers = f"loss {loss:.6f} and {expected_loss:.6f}, gradients {difference:.2g} apart (up to {tolerance:g} by rounding)"
    if not (difference <= tolerance and math.isclose(loss, expected_loss, rel_tol=tolerance)):
        raise LoraTrainerError(
            f"--verify: the tree engine and the dense engine differ: {numbers}. Nothing was trained; use --engine dense, and report it"
        )
    emit(TrainingEvent(event="note", message=f"verified on the {len(batch)} samples of the first step: {numbers}"))


@contextmanager
def _speaking(engine: TreeEngine) -> Iterator[None]:
    """A fresh adapter's B is zero, and with it every gradient of A, right or wrong: meanwhile B is as large as A."""
    draw = torch.Generator().manual_seed(0)
    silent = [adapter for linear in engine.architecture.linears for adapter in linear.adapters if not adapter.b.any()]
    for adapter in silent:
        adapter.b.data.normal_(std=float(adapter.a.detach().square().mean().sqrt()), generator=draw)
    try:
        yield
    finally:
        for adapter in silent:
            adapter.b.data.zero_()


def _gradient(model: Any, work: Callable[[], Floats]) -> tuple[Floats, torch.Tensor]:
    """(losses, every adapter gradient as one vector); leaves none behind."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = work()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    vector = torch.cat([gradient.flatten() for gradient in gradients]).double()
    for parameter in parameters:
        parameter.grad = None
    return losses, vector


def _open_tree(model: Any, load: Load, arguments: TrainArguments, emit: Emit, earlier: dict[str, int] | None) -> TreeEngine:
    architecture = read_architecture(model)
    arithmetic, why_not = choose_arithmetic(architecture.dtype, architecture.head_sizes)
    if earlier and "block_rows" in earlier:
        plan = Plan(earlier["block_rows"], Keep(earlier["keep"]), earlier["path_rows"], earlier["whole_rows"])
        words = check_plan(architecture, plan, load, arguments.max_memory)
    else:
        plan, words = make_plan(architecture, load, arguments.max_memory)
    kernels = arithmetic.name + (f" ({why_not})" if why_not else "")
    emit(TrainingEvent(event="note", message=f"tree engine, kernels: {kernels}; {words}"))
    return TreeEngine(architecture, plan, arithmetic, arguments.seed)


def use_checkpointing(model: Any, load: Load, arguments: TrainArguments, emit: Emit, earlier: dict[str, int] | None = None) -> None:
    """Recompute activations in the dense engine's backward pass when keeping them would take more than half of what is there.

    An `earlier` process of the same run has decided already.
    """
    config = model.get_base_model().config
    hidden, layers = config.hidden_size, config.num_hidden_layers
    width = getattr(config, "intermediate_size", 4 * hidden) or 4 * hidden
    n_bytes = layers * 4 * (18 * hidden + 5 * width)  # kept by PEFT's forward for one token, in float32 (docs/lab-book.md)
    need = n_bytes * min(arguments.batch_size * load.longest, max(load.longest, MICRO_BATCH_TOKENS))
    free = arguments.max_memory or free_bytes()
    recomputes = free is not None and need > free // 2
    if bool(earlier["recomputes"]) if earlier and "recomputes" in earlier else recomputes:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        of = f" of {free >> 20}" if free is not None else ""
        emit(TrainingEvent(event="note", message=f"recomputing activations: keeping them would take {need >> 20}{of} MB"))
