"""The training loop: LoRA with AdamW over windows of units, whatever the objective and whatever engine computes its gradient.

The gradient of a step is that of the objective over the whole accumulation window. Order of units, initial adapter and dropout follow
from the seed alone, so a training that begins again behind a checkpoint takes the same steps as one that was never ended.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loraloop.chat.rows import Unit
from loraloop.errors import LoraTrainerError
from loraloop.train.objectives import Engine, Measure, Objective
from loraloop.training_record import TrainingEvent

EndedBy = Literal["steps", "time_limit", "early_stop"]


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


@dataclass
class History:
    """What a training has done so far."""

    step: int = 0
    """Optimizer steps taken."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss) for every step."""
    n_logical: int = 0
    """Tokens of all samples of all steps."""
    n_computed: int = 0
    """Tokens that the engine computed for them."""
    used: set[int] = field(default_factory=set)
    """Indices of the units that were in at least one step; a training that ends early has not seen all."""
    seconds: float = 0.0
    """Of all steps."""
    held_out: list[tuple[int, float]] = field(default_factory=list)
    """(step, held-out loss) where it was measured on the way."""
    best_step: int | None = None
    """The step with the lowest of these."""
    ended_by: EndedBy | None = None


class Keeper:
    """Hears of every step, and decides whether it was the last; this one keeps nothing. See `train.keeper`."""

    def __init__(self) -> None:
        self.history = History()
        """Of all processes that worked on the training; the loop goes on behind it."""

    def begin_step(self) -> None:
        """What a step draws at random comes from here."""

    def protected(self) -> AbstractContextManager[None]:
        """The part of a step that is done whole or not at all."""
        return nullcontext()

    def end_step(self) -> None:
        """A step has been taken and is in the history; may say there that it was the last."""


@dataclass(frozen=True)
class Run:
    """What trains: a model with an adapter, what its loss is, and what computes that."""

    model: Any
    engine: Engine
    objective: Objective
    optimizer: Any = None
    """AdamW over the adapter, as `new_optimizer` gives it; None is a new one."""


def new_adapter(model: Any, rank: int, alpha: float, dropout: float, seed: int) -> Any:
    """`model` with a fresh LoRA adapter on every linear layer but the head; its weights follow from `seed`."""
    import peft
    import torch

    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def new_optimizer(model: Any) -> Any:
    """AdamW over the adapter's matrices, without weight decay; the loop sets its rate."""
    import torch

    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], weight_decay=0.0)


def train(
    run: Run, units: Sequence[Unit], settings: LoopSettings, emit: Callable[[TrainingEvent], None], keeper: Keeper | None = None
) -> History:
    """Train the adapter of the run's model in place, from where the keeper's history ends.

    Raises LoraTrainerError at a loss or gradient that is not finite, naming the step and where its units came from.
    """
    import torch

    keeper = keeper or Keeper()
    history = keeper.history
    optimizer = run.optimizer or new_optimizer(run.model)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    steps = count_steps(len(units), settings)
    pace = _Pace(history, steps)
    if history.step == 0:
        torch.manual_seed(settings.seed)
    for step, (epoch, window) in enumerate(windows(len(units), settings, steps), 1):
        if step <= history.step:
            continue
        if history.ended_by is not None:
            break
        rate = settings.learning_rate * schedule(step - 1, steps, settings.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = [units[index] for index in window]
        keeper.begin_step()
        measure = run.objective.backward(run.engine, batch, step)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm))
        _check_finite(step, measure.loss, norm, batch)
        with keeper.protected():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            history.step = step
            history.losses.append((step, measure.loss))
            history.used.update(window)
            n_tokens = sum(unit.n_tokens for unit in batch)
            history.n_logical += n_tokens
            history.n_computed += measure.n_computed
            emit(pace.step_event(n_tokens, epoch=epoch, measure=measure, rate=rate))
        keeper.end_step()
    history.ended_by = history.ended_by or "steps"
    return history


class _Pace:
    """How fast a training goes, in this process."""

    def __init__(self, history: History, steps: int) -> None:
        self._history = history
        self._steps = steps
        self._begun_at, self._seconds_before = history.step, history.seconds
        self._started, self._n_tokens = time.monotonic(), 0

    def step_event(self, n_tokens: int, *, epoch: int, measure: Measure, rate: float) -> TrainingEvent:
        """What is told of the step that was taken last."""
        seconds = time.monotonic() - self._started
        step = self._history.step
        self._n_tokens += n_tokens
        self._history.seconds = self._seconds_before + seconds
        return TrainingEvent(
            event="step",
            step=step,
            steps=self._steps,
            epoch=epoch,
            loss=measure.loss,
            accuracy=measure.accuracy,
            margin=measure.margin,
            learning_rate=rate,
            tokens_per_s=self._n_tokens / seconds,
            eta_s=seconds / (step - self._begun_at) * (self._steps - step),
            memory_mb=peak_memory_mb(),
        )


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
