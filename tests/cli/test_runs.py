"""`loraloop train` and `loraloop runs` as users and scripts meet them: real processes, watched, stopped, killed, gone on with."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from loraloop.lease import start_time

TRAIN = ("train", "--base", "model", "--lr", "1e-2", "--max-seq-length", "256", "--batch-size", "2", "--grad-accum", "1", "--rank", "4")
LONG = (*TRAIN, "--epochs", "400", "--checkpoint-every", "5")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loraloop", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, check=False, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a dataset, and a tiny base model beside it."""
    folder = tmp_path_factory.mktemp("place")
    turns = [
        [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}] for number in range(20)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    tiny.make_model("llama", folder / "model")
    run("ingest", "chats.jsonl", "--license", "own", cwd=folder)
    run("build", cwd=folder)
    return folder


@pytest.fixture
def begun(place: Path) -> Iterator[Any]:
    """Starts a command that the test goes on beside; whatever is left of it ends with the test."""
    processes: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "loraloop", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, text=True, cwd=place, env=ENVIRONMENT, start_new_session=True, **pipes))  # type: ignore[call-overload]
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()
    for summary in runs(place):
        if summary["pid"]:
            os.kill(summary["pid"], signal.SIGKILL)


def runs(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run("runs", "list", "--json", cwd=place).stdout.splitlines()]


def newest(place: Path, *, steps: int = 0, seconds: float = 60) -> dict[str, Any]:
    """The last run, once it has taken so many steps."""
    end = time.monotonic() + seconds
    while True:
        folders = sorted((place / "loraloop-project" / "runs").glob("lora-*/state.json"))
        state = json.loads(folders[-1].read_text()) if folders else {}
        if state.get("state") == "running" and state.get("step", 0) >= steps and state.get("pid"):
            return runs(place)[-1]
        assert time.monotonic() < end, f"waited {seconds} s for step {steps}: {state}"
        time.sleep(0.05)


def is_over(pid: int, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while start_time(pid) is not None and time.monotonic() < end:
        time.sleep(0.05)
    return start_time(pid) is None


def sha256(place: Path, model_id: str) -> str:
    return hashlib.sha256((place / "loraloop-project" / "models" / model_id / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_every_event_is_a_line_of_json_and_the_model_is_the_last(place: Path) -> None:
    lines = [json.loads(line) for line in run(*TRAIN, "--max-steps", "3", "--json", cwd=place).stdout.splitlines()]
    kinds = [line.get("event") for line in lines]
    assert kinds.count("step") == 3
    assert kinds[-1] is None
    step = next(line for line in lines if line.get("event") == "step")
    assert {"step", "steps", "loss", "learning_rate", "tokens_per_s", "memory_mb", "eta_s"} <= step.keys()
    (summary,) = [one for one in runs(place) if one["id"] == lines[-1]["id"]]
    assert {"id", "state", "step", "steps", "model", "pid"} <= summary.keys()
    assert (summary["state"], summary["step"], summary["steps"], summary["pid"]) == ("finished", 3, 3, None)
    assert summary["model"] == lines[-1]["id"]
    watched = [json.loads(line) for line in run("runs", "watch", summary["id"], "--json", cwd=place).stdout.splitlines()]
    assert watched == lines[:-1]
    shown = json.loads(run("runs", "show", "latest", "--json", cwd=place).stdout)
    assert shown["config"]["learning_rate"] == 1e-2
    assert not (place / "loraloop-project" / "runs" / summary["id"] / "checkpoints").exists(), "of no use any more"


def test_a_run_is_stopped_from_another_terminal_and_gone_on_with(place: Path, begun: Any) -> None:
    training = begun(*LONG, "--json")
    running = newest(place, steps=7)
    assert running["model"] is None
    watching = begun("runs", "watch", running["id"], "--json")
    stopped = json.loads(run("runs", "stop", running["id"][:20], "--json", cwd=place).stdout)
    assert stopped["state"] == "stopped"
    assert stopped["checkpoint"] >= 7
    output, complaint = training.communicate(timeout=30)
    assert training.returncode == 1
    assert f"was stopped after step {stopped['checkpoint']} of" in complaint
    assert f"loraloop train --resume {running['id']}" in complaint
    events = [json.loads(line) for line in output.splitlines()]
    assert (events[-1]["event"], events[-1]["step"]) == ("stopped", stopped["checkpoint"])
    assert json.loads(watching.communicate(timeout=30)[0].splitlines()[-1]) == events[-1]
    assert is_over(running["pid"])
    assert "there is nothing to stop" in run("runs", "stop", running["id"], cwd=place, code=1).stderr
    refused = run("train", "--resume", running["id"], "--lr", "2e-2", cwd=place, code=1).stderr
    assert "--lr: 0.01 then, 0.02 now" in refused
    again = begun("train", "--resume", "latest", "--json")
    assert newest(place, steps=stopped["checkpoint"] + 1)["id"] == running["id"]
    again.send_signal(signal.SIGINT)
    complaint = again.communicate(timeout=30)[1]
    assert again.returncode == 130
    assert "behind step" in complaint
    assert f"loraloop train --resume {running['id']}" in complaint
    assert runs(place)[-1]["state"] == "stopped"


SHORT = (*TRAIN, "--epochs", "25", "--checkpoint-every", "1", "--seed", "3")


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> str:
    return sha256(place, json.loads(run(*SHORT, "--json", cwd=place).stdout.splitlines()[-1])["id"])


@pytest.mark.parametrize("whom", ["the training", "its parent", "both at once"])
def test_kill_9_leaves_no_orphan_and_the_run_ends_in_the_same_adapter(place: Path, begun: Any, uninterrupted: str, whom: str) -> None:
    parent = begun(*SHORT, "--json")
    running = newest(place, steps=3)
    if whom != "its parent":
        os.kill(running["pid"], signal.SIGKILL)
    if whom != "the training":
        parent.kill()
    complaint = parent.communicate(timeout=30)[1]
    if whom == "the training":
        assert "ended by SIGKILL" in complaint
        assert f"loraloop train --resume {running['id']}" in complaint
    assert is_over(running["pid"]), "an orphan"
    assert runs(place)[-1]["state"] == "interrupted"
    done = json.loads(run("train", "--resume", running["id"], "--json", cwd=place).stdout.splitlines()[-1])
    assert done["id"] == running["id"]
    assert sha256(place, done["id"]) == uninterrupted
    assert runs(place)[-1]["state"] == "finished"
    assert f"run {done['id']} is finished" in run("train", "--resume", done["id"], cwd=place, code=1).stderr


def test_a_run_that_is_being_worked_on_is_not_gone_on_with(place: Path, begun: Any) -> None:
    begun(*LONG)
    running = newest(place, steps=1)
    assert "another process works on run" in run("train", "--resume", running["id"], cwd=place, code=1).stderr


def test_continuing_from_a_model_is_recorded(place: Path) -> None:
    first = json.loads(run(*TRAIN, "--max-steps", "3", "--json", cwd=place).stdout.splitlines()[-1])
    without_rank = TRAIN[:-2]
    second = json.loads(run(*without_rank, "--max-steps", "2", "--continue-from", first["id"], "--json", cwd=place).stdout.splitlines()[-1])
    assert (second["parent"], second["run"]) == (first["id"], second["id"])
    record = json.loads((place / "loraloop-project" / "models" / second["id"] / "training_record.json").read_text())
    assert record["settings"]["rank"] == 4
    assert record["continued_from"]
    config = json.loads((place / "loraloop-project" / "models" / second["id"] / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 32.0)
    refused = run(*TRAIN[:-1], "8", "--continue-from", first["id"], cwd=place, code=1).stderr
    assert "lora_rank=8" in refused
    assert "has 4" in refused


def test_all_that_stands_in_the_way_is_told_at_once(place: Path) -> None:
    before = len(runs(place))
    told = run(*TRAIN[:2], "no-such-model", *TRAIN[3:], "--check", cwd=place, code=1).stderr
    assert "no-such-model" in told
    told = run(*TRAIN, "--max-memory", "1000", "--check", cwd=place, code=1).stderr
    assert "the limit is 0 MB" in told
    fine = run(*TRAIN, "--check", cwd=place).stderr
    assert "this training can start" in fine
    assert "blocks of" in fine
    assert len(runs(place)) == before


def test_figures_also_go_where_they_are_asked_to_go(place: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed; `make test` installs it")
    model = json.loads(run(*TRAIN, "--max-steps", "3", "--report-to", "tensorboard", "--json", cwd=place).stdout.splitlines()[-1])
    written = list((place / "loraloop-project" / "reports" / "tensorboard" / model["id"]).glob("**/events.out.tfevents.*"))
    assert written
    assert sum(file.stat().st_size for file in written) > 500
    assert "no-such-service" in run(*TRAIN, "--report-to", "no-such-service", cwd=place, code=1).stderr


def test_a_run_that_was_killed_behind_its_record_is_finished_by_resuming(place: Path) -> None:
    model = json.loads(run(*TRAIN, "--max-steps", "2", "--json", cwd=place).stdout.splitlines()[-1])
    state = place / "loraloop-project" / "runs" / model["id"] / "state.json"
    state.write_text(state.read_text().replace("finished", "running"))
    assert runs(place)[-1]["state"] == "interrupted"
    again = json.loads(run("train", "--resume", model["id"], "--json", cwd=place).stdout.splitlines()[-1])
    assert again == model
    assert runs(place)[-1]["state"] == "finished"


def test_a_reader_that_goes_away_ends_no_training(place: Path) -> None:
    before = {one["id"] for one in runs(place)}
    command = " ".join([sys.executable, "-m", "loraloop", *TRAIN, "--max-steps", "3", "--json", "| head -1"])
    first = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=place, env=ENVIRONMENT, timeout=120)
    assert len(first.stdout.splitlines()) == 1
    (summary,) = [one for one in runs(place) if one["id"] not in before]
    assert (summary["state"], summary["step"]) == ("finished", 3)


def test_why_a_run_failed_is_in_its_state_and_a_stop_has_something_to_go_by(place: Path) -> None:
    complaint = run(*TRAIN, "--max-memory", "1000", cwd=place, code=1).stderr
    assert "the limit is 0 MB" in complaint
    failed = runs(place)[-1]
    assert failed["state"] == "failed"
    assert "the limit is 0 MB" in failed["message"]
    refused = run(*TRAIN, "--early-stop", "2", "--project", "few", cwd=place, code=1).stderr
    assert "no project in few" in refused


def test_a_parent_that_was_changed_is_not_continued_from(place: Path) -> None:
    model = json.loads(run(*TRAIN, "--max-steps", "2", "--json", cwd=place).stdout.splitlines()[-1])
    run("models", "verify", model["id"], cwd=place)
    weights = place / "loraloop-project" / "models" / model["id"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    for arguments in (("models", "verify", model["id"]), (*TRAIN, "--continue-from", model["id"])):
        assert "adapter_model.safetensors differs from what was recorded" in run(*arguments, cwd=place, code=1).stderr
