"""The process round the loops: one at a time, told to stop, killed at any instant; and what `status` says of it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from daemon.loops import Ledgered, add_chats, make_folder, stages_of

from loraloop.cli.watch import is_news, to_log
from loraloop.daemon.cycle import CycleReport
from loraloop.daemon.state import MOVED, Stage, read_state
from loraloop.daemon.watch import Watch, find_watcher
from loraloop.errors import SettingsError
from loraloop.files import read_jsonl
from loraloop.project import Project

TESTS = Path(__file__).resolve().parents[1]
WATCH = f"""
import sys
sys.path[:0] = [{str(TESTS)!r}]
from pathlib import Path
from daemon.loops import Ledgered
from loraloop.project import Project
folder = Path(sys.argv[1])
end = Ledgered(folder.parent / "effects.jsonl")
with Project(folder) as project:
    for report in project.watch(proof=end, serving=end):
        print(report.model_dump_json(exclude_defaults=True), flush=True)
"""
TWO_LOOPS = """
[[watch.scenario]]
alias = "cook"
scenario = "kitchen"
min_new_episodes = 1

[[watch.scenario]]
alias = "clerk"
scenario = "office"
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder.parent / "watch.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-c", WATCH, str(folder)], stdout=log, stderr=log, env=environment)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def command(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "loraloop", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def check_whole(folder: Path, n_chats: int) -> Counter[str]:
    """What must hold wherever a loop was killed; how often each effect was asked for."""
    effects = list(read_jsonl(folder.parent / "effects.jsonl", skip_torn=True))
    with Project(folder) as project:
        assert project.store.count() == n_chats, "no episode is lost, none is there twice"
        datasets = [model.dataset for model in project.list_models()]
        assert len(datasets) == len(set(datasets)), "no dataset is trained twice"
        assert [run.status.state for run in project.runs.list_runs()] == ["finished"] * len(datasets)
        applied = {line["model"] for line in effects if line["what"] == "apply"}
        proven = {event.data["model"] for event in project.store.ledger.iter_events(kind=MOVED) if event.data.get("decision") == "promote"}
        assert applied <= proven, "what is applied had been promoted before"
        state = read_state(project.store.ledger, "agent")
        assert (state.stage, state.live) == (Stage.COLLECT, project.list_models()[-1].id)
    return Counter(line["what"] for line in effects)


def live_of(folder: Path) -> tuple[int, bool]:
    with Project(folder) as project:
        state = read_state(project.store.ledger, "agent")
        return state.round, state.stage is Stage.COLLECT and state.live is not None


def survive(folder: Path, kills: int, seed: int) -> Counter[str]:
    """A loop that is killed so many times at random instants while chats come in, then left alone until it is done."""
    draw = random.Random(seed)
    n_chats = 4
    add_chats(folder, 0, n_chats)
    killed: Counter[str] = Counter()
    for number in range(kills):
        process = start(folder)
        time.sleep(draw.uniform(0.6, 6.0))
        kill(process)
        with Project(folder) as project:
            killed[read_state(project.store.ledger, "agent").stage] += 1
        if number % 7 == 6:
            add_chats(folder, n_chats, n_chats + 4)
            n_chats += 4
    process = start(folder)
    try:
        wait_until(lambda: live_of(folder)[1] and stored(folder) == n_chats and not due(folder), "the loop to be done", 120)
    finally:
        kill(process)
    assert check_whole(folder, n_chats)["apply"] >= 1
    return killed


def stored(folder: Path) -> int:
    with Project(folder) as project:
        return project.store.count()


def due(folder: Path) -> bool:
    with Project(folder) as project:
        return any(one.fires or one.stage is not Stage.COLLECT for one in project.status())


def test_a_loop_goes_on_wherever_it_is_killed(tmp_path: Path, tiny_model: Callable[[str], Path], capsys: Any) -> None:
    killed = survive(make_folder(tmp_path / "project", tiny_model("llama")), kills=3, seed=1)
    with capsys.disabled():
        print(f"\nkilled in: {dict(killed)}")


@pytest.mark.slow
def test_a_loop_goes_on_wherever_it_is_killed_many_times(tmp_path: Path, tiny_model: Callable[[str], Path], capsys: Any) -> None:
    killed = survive(make_folder(tmp_path / "project", tiny_model("llama")), kills=24, seed=2)
    with capsys.disabled():
        print(f"\nkilled in: {dict(killed)}")


def test_a_training_under_way_is_kept_when_the_loop_is_told_to_stop(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    folder = make_folder(tmp_path / "project", tiny_model("llama"))
    settings = folder / "loraloop.toml"
    settings.write_text(settings.read_text().replace("epochs = 1", "epochs = 400"))
    add_chats(folder, 0, 4)
    watcher = subprocess.Popen(
        [sys.executable, "-m", "loraloop", "watch", "-p", str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_until(lambda: any(folder.glob("runs/*/checkpoints/step-*")), "a checkpoint")
        watcher.send_signal(signal.SIGTERM)
        _, said = watcher.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            watcher.kill()
            watcher.wait()
    assert watcher.returncode == 143, said
    with Project(folder) as project:
        [run] = project.runs.list_runs()
        assert run.status.state == "stopped"
        assert run.status.checkpoint
        state = read_state(project.store.ledger, "agent")
        assert (state.stage, state.run, state.attempts) == (Stage.TRAIN, run.id, 0), "to stop is no failure"
    shown = json.loads(command("status", "-p", str(folder), "--json").stdout)
    assert (shown["stage"], shown["training"]["state"], shown["watched_by"]) == ("train", "stopped", None)


def test_two_never_watch_one_project(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "project", tmp_path / "model")
    process = start(folder)
    try:
        wait_until(lambda: find_watcher(folder) is not None, "the first to watch")
        refused = command("watch", "--once", "-p", str(folder), code=1)
        assert f"is watched by loraloop watch (process {process.pid})" in refused.stderr
        assert f"watched by loraloop watch (process {process.pid})" in command("status", "-p", str(folder)).stdout
    finally:
        kill(process)
    command("watch", "--once", "-p", str(folder))
    assert find_watcher(folder) is None, "what a killed one held is taken over, and given back"


def test_a_store_that_fails_for_a_while_ends_no_loop(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "project", tmp_path / "model")
    with Project(folder) as project:
        scenario, stages = stages_of(project, Ledgered(tmp_path / "effects.jsonl"))
        project.store.close()
        with closing(Watch(folder, project.store.ledger, [scenario], stages, 0.01).run()) as reports:
            first, second = next(reports), next(reports)
    assert first.failure
    assert second.failure


def test_each_alias_has_a_loop_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "loraloop.toml").write_text(TWO_LOOPS)
    with Project(folder) as project:
        assert sorted(report.alias for report in project.watch(once=True)) == ["clerk", "cook"]
        assert [report.alias for report in project.watch(["cook"], once=True)] == ["cook"]
        with pytest.raises(SettingsError, match=r"there is no scenario 'cock'; known: cook, clerk\. Did you mean cook\?"):
            project.watch(["cock"])
        project.pause(["cook"])
        assert {one.alias: one.paused_at is not None for one in project.status()} == {"cook": True, "clerk": False}


def test_status_says_what_is_waited_for_and_why_the_last_verdict_was(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "project", tmp_path / "no-such-model")
    command("watch", "--once", "-p", str(folder))
    assert "nothing to take in: chats" in command("status", "-p", str(folder)).stdout
    add_chats(folder, 0, 5)
    done = command("watch", "--once", "-p", str(folder), code=1)
    [line] = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert line["moves"] == ["collect -> build", "build -> train"]
    assert "no-such-model" in line["failure"]
    shown = command("status", "-p", str(folder)).stdout
    assert "agent: train, which trains on it" in shown
    assert "failed: train" in shown
    command("watch", "pause", "-p", str(folder))
    assert "paused since" in command("status", "-p", str(folder)).stdout
    command("watch", "resume", "-p", str(folder))
    assert "paused" not in command("status", "-p", str(folder)).stdout


def test_the_log_has_a_line_for_what_is_new_only() -> None:
    idle = CycleReport(alias="agent", stage=Stage.COLLECT, waits_for="3 new episodes of 4")
    assert is_news(idle, None)
    assert not is_news(idle, idle)
    assert is_news(idle.model_copy(update={"waits_for": "4 new episodes of 4"}), idle)
    assert is_news(idle.model_copy(update={"failure": "no room"}), idle)
    assert json.loads(to_log(idle))["waits_for"] == "3 new episodes of 4"


def test_a_unit_starts_this_very_command_on_this_very_project(tmp_path: Path) -> None:
    folder = tmp_path / "my 100% project"
    unit = command("watch", "--unit", "-p", str(folder)).stdout
    assert f'watch --project "{str(folder).replace("%", "%%")}"' in unit
    assert not folder.exists()
