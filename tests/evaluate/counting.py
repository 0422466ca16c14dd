"""A suite for tests: score by the length of what is said, so that any two models differ, and nothing of it is random."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loraloop.evaluate.environment import PlayLimits, Task, load_tasks
from loraloop.evaluate.options import take_options

STORY = "a cat sat on a mat in the sun, was happy about it all day long, and in the evening it thought of the number"


class CountingSuite:
    """Task n: rewarded when the sum of the character codes of what was said in two turns leaves no remainder by n."""

    name = "counting"
    description = "letters are counted"
    system: str | None = "count"
    limits = PlayLimits(max_turns=2, max_turn_tokens=6, max_tokens=80)
    success_reward = 1.0
    notes: tuple[str, ...] = ("nothing left out",)

    def __init__(self, tasks: Path | None = None, options: Mapping[str, str] | None = None) -> None:
        self.n = int(take_options(self.name, options, {"n": "10"})["n"])
        self.own = load_tasks(tasks) if tasks else [Task(id=f"task-{number}", data={"by": 2 + number % 3}) for number in range(self.n)]

    def list_tasks(self) -> list[Task]:
        return self.own

    def open(self) -> Counting:
        return Counting()

    def to_action(self, text: str) -> str:
        return text

    def is_executed(self, observation: str) -> bool:
        return observation.endswith(("0", "2", "4", "6", "8"))


class Counting:
    def reset(self, task: Task) -> str:
        self.by, self.sum, self.turns = int(str(task.data["by"])), 0, 0
        return f"{task.id} by {self.by}"

    def step(self, action: str) -> tuple[str, float, bool]:
        self.sum += sum(map(ord, action))
        self.turns += 1
        return f"sum {self.sum}", float(self.turns == 2 and self.sum % self.by == 0), self.turns == 2


class OnlyCandidate(CountingSuite):
    """A win is to say what option `n` has, as hexadecimal digits of its bytes."""

    def __init__(self, tasks: Path | None = None, options: Mapping[str, str] | None = None) -> None:
        super().__init__(tasks)
        self.wanted = (options or {})["n"]

    def open(self) -> Saying:
        return Saying(self.wanted)


class Saying:
    def __init__(self, wanted: str) -> None:
        self.wanted = wanted

    def reset(self, task: Task) -> str:  # noqa: ARG002
        return "say"

    def step(self, action: str) -> tuple[str, float, bool]:
        return "heard", float((action.encode().hex() or "-") == self.wanted), True


class AnsweringSuite(CountingSuite):
    """A win is to begin the answer with "ok"; the requests are numbers from 1000 on, the first of them in a long story."""

    def __init__(self, tasks: Path | None = None, options: Mapping[str, str] | None = None) -> None:
        n = int((options or {}).get("n", "24"))
        super().__init__(tasks)
        self.own = [Task(id=f"answer {number}", data={"number": number}) for number in range(1000, 1000 + n)]

    def open(self) -> Answering:
        return Answering()


class Answering:
    def reset(self, task: Task) -> str:
        number = task.data["number"]
        return f"{STORY} {number}" if number == 1000 else f"the number {number}"

    def step(self, action: str) -> tuple[str, float, bool]:
        return "heard", float(action.startswith("ok")), True
