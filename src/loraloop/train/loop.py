"""The training loop: LoRA with AdamW over windows of units, whatever the objective and whatever engine computes its gradient.

The gradient of a step is that of the objective over the whole accumulation window. Order of units, initial adapter and dropout follow
from the seed alone.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraloop.chat.rows import Unit
from loraloop.errors import LoraTrainerError
from loraloop.train.objectives import Engine, Objective
from loraloop.training_record import TrainingEvent


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs to know; see `train.arguments` for units and ranges."""

    epochs: int
    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    warmup_ratio: float
    max_grad_norm: float
    max_steps: int | None
    seed: int


@dataclass(frozen=True)
class History:
    """What a training did."""

    losses: list[tuple[int, float]]
    """(step, loss) for every step."""
    n_logical: int
    """Tokens of all samples of all steps."""
    n_computed: int
    """Tokens that the engine computed for them."""
    used: frozenset[int]
    """Indices of the units that were in at least one step; a training that ends early has not seen all."""


@dataclass(frozen=True)
class Run:
    """What trains: a model with an adapter, what its loss is, and what computes that."""

    model: Any
    engine: Engine
    objective: Objective


def new_adapter(model: Any, rank: int, alpha: float, dropout: float, seed: int) -> Any:
    """`model` with a fresh LoRA adapter on every linear layer but the head; its weights follow from `seed`."""
    import peft
    import torch

    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def train(run: Run, units: Sequence[Unit], settings: LoopSettings, emit: Callable[[TrainingEvent], None]) -> History:
    """Train the adapter of the run's model in place.

    Raises LoraTrainerError at a loss or gradient that is not finite, naming the step and where its units came from.
    """
    import torch

    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    steps = count_steps(len(units), settings)
    losses: list[tuple[int, float]] = []
    used: set[int] = set()
    started, n_tokens, n_computed = time.monotonic(), 0, 0
    torch.manual_seed(settings.seed)
    for step, (epoch, window) in enumerate(windows(len(units), settings, steps), 1):
        rate = settings.learning_rate * schedule(step - 1, steps, settings.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = [units[index] for index in window]
        measure = run.objective.backward(run.engine, batch, step)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm))
        _check_finite(step, measure.loss, norm, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append((step, measure.loss))
        used.update(window)
        n_tokens += sum(unit.n_tokens for unit in batch)
        n_computed += measure.n_computed
        seconds = time.monotonic() - started
        emit(
            TrainingEvent(
                event="step",
                step=step,
                steps=steps,
                epoch=epoch,
                loss=measure.loss,
                accuracy=measure.accuracy,
                margin=measure.margin,
                learning_rate=rate,
                tokens_per_s=n_tokens / seconds,
                eta_s=seconds / step * (steps - step),
                memory_mb=peak_memory_mb(),
            )
        )
    return History(losses, n_tokens, n_computed, frozenset(used))


def count_steps(n_units: int, settings: LoopSettings) -> int:
    """Optimizer steps in all: one for each window of batch_size x gradient_accumulation units, no more than max_steps."""
    per_epoch = math.ceil(n_units / (settings.batch_size * settings.gradient_accumulation))
    steps = per_epoch * settings.epochs
    return min(steps, settings.max_steps) if settings.max_steps else steps


def windows(n_units: int, settings: LoopSettings, steps: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch, unit indices) of each optimizer step; each epoch is a permutation that follows from (seed, epoch)."""
    size = settings.batch_size * settings.gradient_accumulation
    done = 0
    for epoch in range(settings.epochs):
        order = list(range(n_units))
        random.Random(f"{settings.seed}:{epoch}").shuffle(order)
        for start in range(0, n_units, size):
            if done == steps:
                return
            yield epoch, order[start : start + size]
            done += 1


def schedule(step: int, steps: int, warmup_ratio: float) -> float:
    """The factor on the learning rate at `step` (from 0): linear warm-up, then a cosine down to 0 behind the last step."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def peak_memory_mb() -> int:
    """The most resident memory this process has had, in MiB."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):  # getrusage counts the process that started this one too
                return int(line.split()[1]) // 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 << 20) if sys.platform == "darwin" else peak // 1024


def _check_finite(step: int, loss: float, norm: float, batch: Sequence[Unit]) -> None:
    """Raises LoraTrainerError before an update that would spoil the adapter."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        names = ", ".join(sorted({unit.origin for unit in batch}))
        what = f"the loss of step {step} is {loss}, the norm of its gradient {norm}"
        raise LoraTrainerError(f"{what}; its samples came from {names}. Lower the learning rate or look at them")
