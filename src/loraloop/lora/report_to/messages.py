"""What the process that trains is watched from tells the reporting process: JSON lines, first an Opening, then Messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loraloop.episode import Frozen
from loraloop.training_record import TrainingEvent

REPORTERS = ("trackio", "mlflow", "tensorboard")
"""Each is the name of the extra, of the package that it imports, and of the module here that knows it."""

FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"
"""States at the end that a service is told in its own words; it takes every other word as ended from outside, as the last is."""


class Opening(Frozen):
    """The run that is reported."""

    run_id: str
    folder: Path
    """Where a service keeps what it keeps on this machine."""
    settings: dict[str, str | int | float | bool]
    lineage: dict[str, str]


class Message(Frozen):
    """An event with numbers and when it was heard, or the state at the end."""

    at_ms: int
    event: TrainingEvent | None = None
    state: str | None = None


@dataclass(frozen=True)
class Figure:
    """One number of a run."""

    name: str
    value: float
    step: int
    at_ms: int


class Service(Protocol):
    """An open run of a reporting service."""

    @property
    def logged(self) -> Mapping[str, int]:
        """The highest step of each figure that the service has had of this run before, as far as it can tell."""
        ...

    def log(self, figures: Sequence[Figure]) -> None:
        """Write `figures` so that they can be looked at; raises whatever the service raises."""
        ...

    def close(self, state: str) -> None:
        """Write how the run ended."""
        ...
