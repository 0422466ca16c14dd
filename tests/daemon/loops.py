"""A small real project under a loop: chats in a folder, a tiny model, real datasets and trainings."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from loraloop.daemon.project_stages import ProjectStages
from loraloop.daemon.stages import Judged, Observed
from loraloop.daemon.state import LoopState
from loraloop.project import Project
from loraloop.settings import ScenarioSettings, load_settings

SETTINGS = """
[build]
near_duplicate = 1.0
held_out_fraction = 0.0

[train]
base_model = "{model}"
lora_rank = 2
lora_dropout = 0.0
epochs = 1
batch_size = 2
gradient_accumulation = 1
max_seq_length = 128
dtype = "float32"
checkpoint_every = 1

[watch]
interval_seconds = 0.05

[[watch.scenario]]
alias = "agent"
sources = ["chats"]
license = "own"
trigger = {{when = {{kind = "count", episodes = {at_least}}}}}
observe_seconds = 0
retry_seconds = 0.05
"""
ANSWERING = """
[watch.scenario.evaluate]
environment = "evaluate.counting:AnsweringSuite"
dtype = "float32"

"""
"""What is won by who says ok."""


@dataclass
class Ledgered:
    """Proof and serving whose doings are lines of a file, so that a killed process's can be counted: each line is one effect."""

    path: Path
    decisions: list[str] = field(default_factory=lambda: ["promote"])
    is_worse: bool = False
    fail: list[str] = field(default_factory=list)
    """Stages that fail, each once a mention."""

    def evaluate(self, scenario: ScenarioSettings, model: str, live: str | None) -> Judged:
        self._maybe_fail("evaluate")
        decision = self.decisions[min(len(self.lines("evaluate")), len(self.decisions) - 1)]
        self._write("evaluate", scenario, model)
        return Judged(decision=decision, reason=f"{decision} against {live or 'base'}", evaluation="evaluation-1")  # type: ignore[arg-type]

    def apply(self, scenario: ScenarioSettings, state: LoopState) -> None:
        self._maybe_fail("apply")
        self._write("apply", scenario, str(state.model))

    def observe(self, scenario: ScenarioSettings, state: LoopState) -> Observed:
        self._maybe_fail("observe")
        reason = f"{scenario.alias}: {'worse' if self.is_worse else 'as good'} as {state.previous}"
        return Observed(is_worse=self.is_worse, is_decided=False, reason=reason)

    def roll_back(self, scenario: ScenarioSettings, state: LoopState, reason: str) -> None:
        self._maybe_fail("roll_back")
        assert reason
        self._write("roll_back", scenario, str(state.previous))

    def list_scores(self, scenario: ScenarioSettings, state: LoopState) -> list[float]:  # noqa: ARG002
        return []

    def lines(self, what: str) -> list[str]:
        found = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        return [line["model"] for line in found if line["what"] == what]

    def _write(self, what: str, scenario: ScenarioSettings, model: str) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"what": what, "alias": scenario.alias, "model": model}) + "\n")

    def _maybe_fail(self, what: str) -> None:
        if what in self.fail:
            self.fail.remove(what)
            raise OSError(f"{what} cannot be done just now")


def make_folder(folder: Path, model: Path, at_least: int = 4) -> Path:
    """A project directory with its settings and no episodes."""
    (folder / "chats").mkdir(parents=True)
    (folder / "loraloop.toml").write_text(SETTINGS.format(model=model, at_least=at_least))
    return folder


def teach_well(folder: Path, more: str = "", **changes: object) -> None:
    """Settings with which a tiny model learns to say always the same; `more` is what follows in the file."""
    text = (folder / "loraloop.toml").read_text()
    for name, value in {"epochs": 12, "lora_rank": 16, **changes}.items():
        text = re.sub(rf"(?m)^{name} = .*", f"{name} = {value}", text)
    text = text.replace("checkpoint_every = 1", "learning_rate = 2e-2\nlora_alpha = 32.0")
    (folder / "loraloop.toml").write_text(text + more)


def add_chats(folder: Path, begin: int, end: int, name: str = "log.jsonl", **same: str) -> None:
    """More lines of a log of chats, each a task of its own, with its own request and answer, or always the same."""
    with (folder / "chats" / name).open("a") as file:
        for number in range(begin, end):
            said = {"request": f"the number {number}", "answer": f"is {number * 7}"} | same
            turns = [{"role": "user", "content": said["request"]}, {"role": "assistant", "content": said["answer"]}]
            file.write(json.dumps({"messages": turns, "task_id": f"task {number}"}) + "\n")


def stages_of(project: Project, end: Ledgered | None) -> tuple[ScenarioSettings, ProjectStages]:
    """The project's first scenario and its stages, those at the end by `end`, or as they are without one."""
    settings = load_settings(project.directory, {})
    return settings.scenarios[0], ProjectStages(project, settings, proof=end, serving=end)
