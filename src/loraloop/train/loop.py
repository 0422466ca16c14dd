"""The training loop: LoRA with AdamW over windows of rows, whatever engine computes their gradient.

The gradient of a step is that of sum(w * nll) / sum(w) over the whole accumulation window. Order of rows, initial adapter and dropout
follow from the seed alone.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loraloop.chat.render import Row
from loraloop.errors import LoraTrainerError
from loraloop.training_record import TrainingEvent


class Engine(Protocol):
    """Computes losses and gradients of rows for the adapter of one model."""

    name: str
    n_computed: int

    def backward(self, rows: Sequence[Row], step: int = 0) -> float:
        """Add the gradient of sum(w * nll) / sum(w) over `rows`, and give that loss; `step` may draw the dropout."""
        ...

    def measure(self, rows: Sequence[Row]) -> tuple[float, float]:
        """(sum of w * nll, sum of w) over `rows`, without dropout and without gradients."""
        ...


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
    """Indices of the rows that were in at least one step; a training that ends early has not seen all."""


def new_adapter(model: Any, rank: int, alpha: float, dropout: float, seed: int) -> Any:
    """`model` with a fresh LoRA adapter on every linear layer but the head; its weights follow from `seed`."""
    import peft
    import torch

    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def train(model: Any, engine: Engine, rows: Sequence[Row], settings: LoopSettings, emit: Callable[[TrainingEvent], None]) -> History:
    """Train the adapter of `model` in place.

    Raises LoraTrainerError at a loss or gradient that is not finite, naming the step and where its rows came from.
    """
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    steps = count_steps(len(rows), settings)
    losses: list[tuple[int, float]] = []
    used: set[int] = set()
    started, n_tokens, n_computed = time.monotonic(), 0, 0
    torch.manual_seed(settings.seed)
    for step, (epoch, window) in enumerate(windows(len(rows), settings, steps), 1):
        rate = settings.learning_rate * schedule(step - 1, steps, settings.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = [rows[index] for index in window]
        loss = engine.backward(batch, step)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm))
        _check_finite(step, loss, norm, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append((step, loss))
        used.update(window)
        n_tokens += sum(len(row.ids) for row in batch)
        n_computed += engine.n_computed
        seconds = time.monotonic() - started
        emit(
            TrainingEvent(
                event="step",
                step=step,
                steps=steps,
                epoch=epoch,
                loss=loss,
                learning_rate=rate,
                tokens_per_s=n_tokens / seconds,
                eta_s=seconds / step * (steps - step),
                memory_mb=peak_memory_mb(),
            )
        )
    return History(losses, n_tokens, n_computed, frozenset(used))


def mean_loss(engine: Engine, rows: Sequence[Row]) -> float:
    """Mean negative log-likelihood over the supervised tokens of `rows`, weighted, without dropout."""
    total, weight = engine.measure(rows)
    return total / weight


def count_steps(n_rows: int, settings: LoopSettings) -> int:
    """Optimizer steps in all: one for each window of batch_size x gradient_accumulation rows, no more than max_steps."""
    per_epoch = math.ceil(n_rows / (settings.batch_size * settings.gradient_accumulation))
    steps = per_epoch * settings.epochs
    return min(steps, settings.max_steps) if settings.max_steps else steps


def windows(n_rows: int, settings: LoopSettings, steps: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch, row indices) of each optimizer step; each epoch is a permutation that follows from (seed, epoch)."""
    size = settings.batch_size * settings.gradient_accumulation
    done = 0
    for epoch in range(settings.epochs):
        order = list(range(n_rows))
        random.Random(f"{settings.seed}:{epoch}").shuffle(order)
        for start in range(0, n_rows, size):
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


def _check_finite(step: int, loss: float, norm: float, batch: Sequence[Row]) -> None:
    """Raises LoraTrainerError before an update that would spoil the adapter."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        names = ", ".join(sorted({row.origin for row in batch}))
        what = f"the loss of step {step} is {loss}, the norm of its gradient {norm}"
        raise LoraTrainerError(f"{what}; its samples came from {names}. Lower the learning rate or look at them")
