"""Any environment of Gymnasium whose observations and actions are texts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gymnasium

from loraloop.errors import EvaluationError, SettingsError
from loraloop.evaluate.environment import Environment, PlayLimits, Task, last_line, load_tasks
from loraloop.evaluate.options import take_options

REFUSED = "The environment refuses this action: "
_OPTIONS = {"id": "", "n": "20", "system": "", "success": "1", "max_turns": "20", "max_turn_tokens": "200", "max_tokens": "1200"}


class GymnasiumSuite:
    """Plays of one environment, each with a seed of its own.

    Option `id`: as `gymnasium.make` takes it, `module:Name-v0` where the module registers it. Without a file there are `n` tasks, the seeds
    from 0 on; a file holds objects with `id`, and `seed` and `options` as `reset` takes them. `system` is the system prompt, `success`
    the reward, summed over the steps, from which on a play is a win; `max_turns`, `max_turn_tokens`, `max_tokens` limit a play.
    """

    name: ClassVar[str] = "gymnasium"
    description: ClassVar[str] = "any environment of Gymnasium that speaks text (option id)"
    notes: tuple[str, ...] = ()

    def __init__(self, tasks: Path | None = None, options: Mapping[str, str] | None = None) -> None:
        told = take_options(self.name, options, _OPTIONS)
        if not told["id"]:
            raise SettingsError("gymnasium: which environment? Give it with --option id=NAME, as gymnasium.make takes it")
        try:
            n, self.success_reward = int(told["n"]), float(told["success"])
            self.limits = PlayLimits(*(int(told[name]) for name in ("max_turns", "max_turn_tokens", "max_tokens")))
        except ValueError as error:
            raise SettingsError(f"gymnasium: {error}; n, success and the limits are numbers") from error
        self.id = told["id"]
        self.system: str | None = told["system"] or None
        self.tasks = load_tasks(tasks) if tasks else [Task(id=f"seed-{seed}", data={"seed": seed}) for seed in range(n)]
        self.open()  # an environment that there is not is told before anything is loaded

    def list_tasks(self) -> list[Task]:
        """The seeds in order, or the tasks of the file."""
        return self.tasks

    def open(self) -> Environment[Task]:
        """A new environment. Raises EvaluationError when it cannot be made."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as of a newer version of it
                return GymnasiumEnvironment(self.id, gymnasium.make(self.id, disable_env_checker=True))
        except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
            raise EvaluationError(f"gymnasium cannot make {self.id!r}: {error}") from error

    def to_action(self, text: str) -> str:
        """The last line."""
        return last_line(text)

    def is_executed(self, observation: str) -> bool:
        """False where the environment raised an error."""
        return not observation.startswith(REFUSED)


@dataclass
class GymnasiumEnvironment:
    """One environment; its rewards are summed."""

    id: str
    inner: Any
    total: float = 0.0

    def reset(self, task: Task) -> str:
        """The first observation, by the task's seed and options."""
        self.total = 0.0
        observation, _ = self.inner.reset(seed=task.data.get("seed"), options=task.data.get("options"))
        return self._text(observation)

    def step(self, action: str) -> tuple[str, float, bool]:
        """The next observation; an action that it raises an error for changes nothing."""
        try:
            observation, reward, terminated, truncated, _ = self.inner.step(action)
        except (ValueError, KeyError, IndexError, TypeError, AssertionError, AttributeError) as error:
            return f"{REFUSED}{error}", self.total, False
        self.total += float(reward)
        return self._text(observation), self.total, bool(terminated or truncated)

    def _text(self, observation: object) -> str:
        if not isinstance(observation, str):
            found = type(observation).__name__
            raise EvaluationError(f"{self.id} shows a {found}; only environments whose observations are texts can be played")
        return observation
