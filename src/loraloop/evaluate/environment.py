"""What a model is played in: an environment, its tasks, and the suite that brings both.

A suite is a plug-in of the entry-point group `loraloop.environments`. It lists tasks, always the same in the same order, and opens an
environment for each play. An environment plays one task at a time and is deterministic: the same actions get the same answers.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import Field, JsonValue

from loraloop.episode import Frozen
from loraloop.errors import EvaluationError
from loraloop.files import content_hash, read_jsonl

T_contra = TypeVar("T_contra", contravariant=True)


class Environment(Protocol[T_contra]):
    """What an agent acts in. One instance plays one task at a time."""

    def reset(self, task: T_contra) -> str:
        """Begin `task`; gives the first observation."""
        ...

    def step(self, action: str) -> tuple[str, float, bool]:
        """(observation, reward so far, whether the play is over)."""
        ...


class Task(Frozen):
    """One task of a suite."""

    id: str = Field(min_length=1)
    """Names it within its suite, in every report."""
    data: dict[str, JsonValue] = Field(default_factory=dict)
    """Whatever the suite's environment needs to begin it."""


@dataclass(frozen=True)
class PlayLimits:
    """Where a play ends if the environment does not end it."""

    max_turns: int = 20
    max_turn_tokens: int = 200
    """A turn longer than this is cut off, and its action taken from what there is."""
    max_tokens: int = 1200
    """Tokens after the first prompt, of the model and the environment together."""


def last_line(text: str) -> str:
    """The action in an agent's turn: its last line that is not empty."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


class TaskSuite(Protocol):
    """Tasks and where they are played. The class is made with a file of tasks, None for the suite's own, and options by name."""

    name: ClassVar[str]
    """As `--environment` takes it."""
    description: ClassVar[str]
    """What is played, in one line."""
    system: str | None
    """The system prompt of every play; None for none."""
    limits: PlayLimits
    success_reward: float
    """A play with at least this reward is a win."""
    notes: tuple[str, ...]
    """What whoever reads the results must know, such as how many tasks were left out, and why."""

    def __init__(self, tasks: Path | None = None, options: Mapping[str, str] | None = None) -> None:
        """Raises EvaluationError for tasks that cannot be read, SettingsError for an option that it does not have."""
        ...

    def list_tasks(self) -> Sequence[Task]:
        """Every task, ids unique, in an order that is the same on every machine."""
        ...

    def open(self) -> Environment[Task]:
        """An environment for one play."""
        ...

    def to_action(self, text: str) -> str:
        """What an agent's turn does."""
        ...


def hash_tasks(tasks: Sequence[Task]) -> str:
    """32 hex digits over ids and data, in order."""
    return content_hash([task.model_dump(mode="json") for task in tasks])


def load_tasks(path: Path, find_id: Callable[[dict[str, Any]], Any] = lambda entry: entry.get("id", entry.get("task_id"))) -> list[Task]:
    """The tasks of a JSON list or of JSON Lines, an object each; the whole object is the task's data, `find_id` gives its id.

    Raises EvaluationError for a file that cannot be read, an entry that is no object, an id that is missing or there twice.
    """
    try:
        is_list = path.read_bytes()[:64].lstrip().startswith(b"[")
        entries = json.loads(path.read_bytes()) if is_list else list(read_jsonl(path))
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"the tasks in {path} cannot be read ({error}); expected a JSON list or JSON Lines, an object a task"
        ) from error
    tasks: dict[str, Task] = {}
    for number, entry in enumerate(entries, 1):
        found = find_id(entry) if isinstance(entry, dict) else None
        if found is None or not str(found):
            raise EvaluationError(f'{path}, task {number}: expected an object with an "id" or a "task_id"')
        if str(found) in tasks:
            raise EvaluationError(f"{path}, task {number}: the id {str(found)!r} is there twice; give each task its own")
        tasks[str(found)] = Task(id=str(found), data=entry)
    if not tasks:
        raise EvaluationError(f"there are no tasks in {path}")
    return list(tasks.values())


def find_object(name: str) -> Any:
    """What `module:name` names, the working directory searched first, as Python does. Raises EvaluationError, ImportError."""
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    found = getattr(importlib.import_module(module), attribute, None)
    if found is None:
        raise EvaluationError(f"{module} has no {attribute!r}; expected module:name of something that is there")
    return found
