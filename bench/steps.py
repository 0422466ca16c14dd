"""What is asked of an engine in its process, how its steps are timed, and what comes back. Knows no engine."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from bench.counts import ModelShape
from bench.workload import Workload
from loraloop.episode import Frozen

Dtype = Literal["float32", "bfloat16"]
BETA = 0.1
"""Of dpo, as loraloop and TRL both have it by default."""


class StepPlan(Frozen):
    """How the timed part goes: the same step, at least `steps` times and for at least `min_seconds`."""

    steps: int = 1
    min_seconds: float = 10.0
    learning_rate: float = 1e-4
    """Constant; AdamW without weight decay, gradients not clipped, the loss sum(w * nll) / sum(w) over the step; for pairs that of
    dpo, the mean over the step's pairs."""
    batch_size: int = 1
    """Rows of a micro-batch, at most; for TRL's pairs, pairs."""
    autocast: bool = False
    """TRL only: bf16 autocast, which also computes the adapter in bf16."""


SHARING = ("tree",)
"""Engines that compute an equal prefix once, and so are timed on whole steps."""


class EngineResult(Frozen):
    """What one engine did in one process."""

    engine: str
    first_loss: float
    """Of the first step, over the rows of the check."""
    losses: list[float]
    """Of every timed step, before its update."""
    step_seconds: list[float]
    step_tokens: int
    """Logical tokens of a timed step."""
    gradient_norm: float
    """Of the adapter in the first step."""
    reference_seconds: float | None = None
    """Pairs: what the base model's log-probabilities of a timed step's rows took, once and before; None where every step computes
    them."""
    peak_rss_mb: float
    startup_seconds: float
    """From the process's start to the first warm-up step: imports and loading."""
    threads: int
    tuned_allocator: bool
    batch_size: int
    autocast: bool
    dtype: Dtype
    """Of the base model and of what is computed, where no autocast is."""
    model_shape: ModelShape

    @property
    def tokens_per_s(self) -> float:
        """Logical tokens/s of the median step."""
        return self.step_tokens / median(self.step_seconds)


@dataclass(frozen=True)
class Job:
    """What an engine is handed beside its model."""

    workload: Workload
    plan: StepPlan
    initial: dict[str, Any]
    """Adapter weights by name."""


@dataclass
class StepClock:
    """Times steps and keeps the gradient of the first; an engine calls it at the same three points of each step."""

    plan: StepPlan
    parameters: list[tuple[str, Any]]
    """(name, parameter) of the adapter."""
    first_loss: float | None = None
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    first_gradient: dict[str, Any] = field(default_factory=dict)
    reference_seconds: float | None = None
    _started: float = 0.0

    def begin(self) -> None:
        """Before anything of a step is computed."""
        self._started = time.perf_counter()

    def keep_gradient(self) -> None:
        """Between backward and update; the copy costs milliseconds and every engine pays it."""
        if not self.first_gradient:
            self.first_gradient = {name: parameter.grad.detach().float().clone() for name, parameter in self.parameters}

    def end(self, loss: float) -> bool:
        """After the update; True when enough was timed."""
        self.step_seconds.append(time.perf_counter() - self._started)
        self.losses.append(loss)
        if self.first_loss is None:
            self.first_loss = loss
        return len(self.losses) >= self.plan.steps and sum(self.step_seconds) >= self.plan.min_seconds

    def restart(self) -> None:
        """Forget the times so far; first loss and gradient stay."""
        self.losses.clear()
        self.step_seconds.clear()

    def gradient_norm(self) -> float:
        """Over the whole adapter."""
        return float(sum(float((gradient**2).sum()) for gradient in self.first_gradient.values()) ** 0.5)


def adapter_parameters(model: Any) -> list[tuple[str, Any]]:
    """(name, parameter) of all that is trained, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def reset_adapter(parameters: Iterable[tuple[str, Any]], values: dict[str, Any]) -> None:
    """Copy saved values by name and drop gradients. Raises KeyError where a name is missing."""
    import torch

    with torch.no_grad():
        for name, parameter in parameters:
            parameter.copy_(values[name])
            parameter.grad = None
