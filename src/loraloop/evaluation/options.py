"""What an evaluation measures, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loraloop.base_model import Dtype
from loraloop.errors import SettingsError
from loraloop.evaluate.command import TIMEOUT_S
from loraloop.evaluate.suite import Progress
from loraloop.evaluate.verdict import Policy
from loraloop.evaluation.held_out import N_SAMPLES

DEFAULT_TEMPERATURE = 0.7
"""Where several plays of each task are asked for, and nothing is said."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What to measure, and how."""

    environment: str | None = None
    """The suite to play: a plug-in's name, or `module:Class`."""
    tasks: Path | None = None
    """A file of tasks; the suite's own without."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Of the suite."""
    limit: int | None = None
    """At most so many tasks, chosen by hash; all without."""
    left_out: frozenset[str] = frozenset()
    """Tasks, or held-out samples, that prove nothing, as the candidate has nearly trained on them; chosen before `limit` is."""
    seeds: int = 1
    """Plays of each task by each side."""
    temperature: float | None = None
    """0 takes the likeliest token. Without it 0 for one seed, DEFAULT_TEMPERATURE for more."""
    base: str | None = None
    """Where the base model is; without it where the model's training had it."""
    dtype: Dtype = "auto"
    token: str | None = field(default=None, repr=False)
    """Of the server, for a side that is served."""
    command: str | None = None
    """A command, or `module:function`, that prints a score for each task (evaluate/command.py)."""
    command_timeout_s: float = TIMEOUT_S
    """Of the command, for one side."""
    held_out: bool = False
    """Measure held-out samples; done as well where nothing else is asked for."""
    dataset: str | None = None
    """Whose; without it that of the candidate's training."""
    n_samples: int = N_SAMPLES
    """At most so many held-out samples of each ending."""
    again: bool = False
    """Measure afresh what is measured already."""
    on_progress: Callable[[Progress], None] = lambda progress: None
    early: bool = False
    """End the plays as soon as they decide, by a test that may be looked at after every block (evaluate/planned.py)."""
    policy: Policy = field(default_factory=Policy)
    """What decides."""

    def check(self) -> None:
        """Raises SettingsError for values out of their range."""
        if self.seeds < 1:
            raise SettingsError(f"seeds {self.seeds}: expected at least 1")
        if self.limit is not None and self.limit < 1:
            raise SettingsError(f"limit {self.limit}: expected at least 1")
        if self.temperature is not None and not 0 <= self.temperature <= 10:
            raise SettingsError(f"temperature {self.temperature:g}: expected 0 to 10")
        if self.seeds > 1 and self.temperature == 0:
            raise SettingsError(f"{self.seeds} seeds at temperature 0 would all play the same; give a temperature, or one seed")
        if self.tasks is not None and self.environment is None:
            raise SettingsError(f"tasks {self.tasks}: whose? Name the environment, too")
        if self.n_samples < 1:
            raise SettingsError(f"n_samples {self.n_samples}: expected at least 1")

    @property
    def wants_held_out(self) -> bool:
        """Whether held-out samples are measured."""
        return self.held_out or self.dataset is not None or (self.environment is None and self.command is None)

    @property
    def chosen_temperature(self) -> float:
        """The temperature to play at."""
        return self.temperature if self.temperature is not None else DEFAULT_TEMPERATURE if self.seeds > 1 else 0.0
