"""Which engine computes a run, within which memory, and the proof at run time that it computes what it should.

The tree engine is the default. A model that it has no proven path for trains on the dense engine, with a warning that says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from loraloop.chat.render import Row
from loraloop.errors import LoraTrainerError
from loraloop.train import loop
from loraloop.train.architecture import find_obstacle, read_architecture
from loraloop.train.arguments import TrainArguments
from loraloop.train.arithmetic import choose_arithmetic
from loraloop.train.dense import MICRO_BATCH_TOKENS, DenseEngine
from loraloop.train.engine import TreeEngine
from loraloop.train.memory import free_bytes, make_plan
from loraloop.training_record import TrainingEvent

Emit = Callable[[TrainingEvent], None]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4, torch.bfloat16: 0.1}
"""Relative difference of all gradients that two engines may have by rounding alone (docs/lab-book.md has what they do have)."""


def open_engine(model: Any, rows: Sequence[Row], arguments: TrainArguments, emit: Emit, *, measured: Sequence[Row] = ()) -> loop.Engine:
    """The engine for `model`, to train on `rows` and to measure on `measured`.

    Raises LoraTrainerError when the rows cannot be trained within the memory limit.
    """
    if arguments.engine == "tree":
        obstacle = find_obstacle(model)
        if obstacle is None:
            return _open_tree(model, rows, measured, arguments, emit)
        emit(TrainingEvent(event="warning", message=f"every sample is computed by itself (dense engine): {obstacle}"))
    use_checkpointing(model, rows, arguments, emit)
    return DenseEngine(model, arguments.batch_size)


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


def verify(model: Any, engine: loop.Engine, rows: Sequence[Row], arguments: TrainArguments, emit: Emit) -> None:
    """Compute the gradient of the first step with `engine` and with the dense one, without dropout, from an adapter that is not zero.

    Raises LoraTrainerError, and nothing is trained, when they differ by more than rounding.
    """
    if not isinstance(engine, TreeEngine):
        emit(TrainingEvent(event="note", message="nothing to verify: the dense engine is what the tree engine is compared with"))
        return
    settings = loop_settings(arguments)
    _, window = next(iter(loop.windows(len(rows), settings, 1)))
    batch = [rows[index] for index in window]
    model.eval()  # without dropout, which the two draw differently
    dense = DenseEngine(model, 1)
    with _speaking(engine):
        expected_loss, expected = _gradient(model, lambda: dense.backward(batch, training=False))
        loss, found = _gradient(model, lambda: engine.backward(batch, dropout=False))
    difference = float((found - expected).norm() / expected.norm())
    tolerance = TOLERANCE[engine.architecture.dtype]
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


def _gradient(model: Any, work: Callable[[], float]) -> tuple[float, torch.Tensor]:
    """(loss, every adapter gradient as one vector); leaves none behind."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = work()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    vector = torch.cat([gradient.flatten() for gradient in gradients]).double()
    for parameter in parameters:
        parameter.grad = None
    return loss, vector


def _open_tree(model: Any, rows: Sequence[Row], measured: Sequence[Row], arguments: TrainArguments, emit: Emit) -> TreeEngine:
    architecture = read_architecture(model)
    arithmetic, why_not = choose_arithmetic(architecture.dtype, architecture.head_sizes)
    plan, words = make_plan(architecture, rows, arguments.batch_size * arguments.grad_accum, arguments.max_memory, measured=measured)
    kernels = arithmetic.name + (f" ({why_not})" if why_not else "")
    emit(TrainingEvent(event="note", message=f"tree engine, kernels: {kernels}; {words}"))
    return TreeEngine(architecture, plan, arithmetic, arguments.seed)


def use_checkpointing(model: Any, rows: Sequence[Row], arguments: TrainArguments, emit: Emit) -> None:
    """Recompute activations in the dense engine's backward pass when keeping them would take more than half of what is there."""
    config = model.get_base_model().config
    hidden, layers = config.hidden_size, config.num_hidden_layers
    width = getattr(config, "intermediate_size", 4 * hidden) or 4 * hidden
    n_bytes = layers * 4 * (18 * hidden + 5 * width)  # kept by PEFT's forward for one token, in float32 (docs/lab-book.md)
    longest = max(len(row.ids) for row in rows)
    need = n_bytes * min(arguments.batch_size * longest, max(longest, MICRO_BATCH_TOKENS))
    free = arguments.max_memory or free_bytes()
    if free is not None and need > free // 2:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        emit(TrainingEvent(event="note", message=f"recomputing activations: keeping them would take {need >> 20} of {free >> 20} MB"))
