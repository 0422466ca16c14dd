"""A training that is killed, stopped, or let down by the disk goes on to the very same adapter, or says clearly why it does not."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.trainings import Training, kill, line, told, wait_until, write_lines

EVERY_STEP = ("--checkpoint-every=1",)
N_KILLS = 40
N_KILLS_INSIDE_SAVING = 10


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> tuple[str, float]:
    """(hash of the adapter, seconds from start to end) of the run that all others must equal."""
    training = Training(tmp_path_factory.mktemp("uninterrupted") / "run", tiny_model("llama"), EVERY_STEP)
    assert training.finish() == 0, training.last_words()
    started = time.monotonic()
    shutil.rmtree(training.output)
    shutil.rmtree(training.checkpoints)
    assert training.finish() == 0, training.last_words()
    return training.adapter(), time.monotonic() - started


@pytest.fixture
def make(tmp_path: Path, tiny_model: Callable[[str], Path]) -> Callable[..., Training]:
    def make(name: str = "run", more: tuple[str, ...] = EVERY_STEP, **settings: Any) -> Training:
        return Training(tmp_path / name, tiny_model("llama"), more, **settings)

    return make


def test_two_uninterrupted_trainings_are_equal_with_and_without_checkpoints(make: Any, uninterrupted: tuple[str, float]) -> None:
    training = make(more=())
    assert training.finish() == 0, training.last_words()
    assert training.adapter() == uninterrupted[0]


def test_kill_9_at_random_instants_loses_nothing(make: Any, uninterrupted: tuple[str, float], capsys: Any) -> None:
    expected, seconds = uninterrupted
    chance = random.Random(5)
    with told("kill -9 at random instants", capsys) as counts:
        counts |= {"tried": 0, "after the end": 0, "before a checkpoint": 0, "lost": 0}
        while counts["tried"] < N_KILLS:
            training = make(f"run-{counts['tried']}-{counts['after the end']}")
            process = training.start()
            time.sleep(chance.uniform(0.0, seconds))
            if process.exitcode is not None:
                counts["after the end"] += 1
                seconds *= 0.8  # the machine was busier when the uninterrupted one was timed
                continue
            seconds *= 1.02
            kill(process)
            counts["tried"] += 1
            counts["before a checkpoint"] += not list(training.checkpoints.glob("step-*"))
            if training.output.exists():
                assert training.adapter() == expected, "it was put in place just before"
                continue
            code = training.finish("--resume")
            counts["lost"] += code != 0 or training.adapter() != expected
            assert counts["lost"] == 0, training.last_words()
            assert training.leftovers() == []


def test_kill_9_inside_saving_loses_nothing(make: Any, uninterrupted: tuple[str, float], capsys: Any) -> None:
    """Each run is killed several times, as soon as a checkpoint begins to be written."""
    with told("kill -9 inside saving", capsys) as counts:
        counts |= {"tried": 0, "lost": 0}
        while counts["tried"] < N_KILLS_INSIDE_SAVING:
            training = make(f"run-{counts['tried']}")
            more: tuple[str, ...] = ()
            for _ in range(3):
                process = training.start(*more)
                more = ("--resume",)
                training.wait_for_saving(process)
                kill(process)
                counts["tried"] += 1
            if not training.output.exists():
                assert training.finish("--resume") == 0, training.last_words()
            counts["lost"] += training.adapter() != uninterrupted[0]
            assert counts["lost"] == 0
            assert training.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_a_checkpoint_and_ends(make: Any, uninterrupted: tuple[str, float], number: signal.Signals) -> None:
    training = make(more=("--checkpoint-every=1000",))
    process = training.start()
    wait_until(lambda: len(training.events("step")) >= 3, "three steps")
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == 128 + number
    (stopped,) = training.events("stopped")
    assert stopped["step"] == training.events("step")[-1]["step"] >= 3
    assert [path.name for path in training.checkpoints.glob("step-*")] == [f"step-{stopped['step']:08d}"]
    assert not training.output.exists()
    assert training.finish("--resume") == 0, training.last_words()
    assert training.adapter() == uninterrupted[0]
    steps = [event["step"] for event in training.events("step")]
    assert steps == list(range(1, 10)), "no step was taken twice"


def test_a_training_that_was_halted_for_a_while_goes_on(make: Any, uninterrupted: tuple[str, float]) -> None:
    training = make()
    process = training.start()
    wait_until(lambda: len(training.events("step")) >= 2, "two steps")
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(0.5)
    n_steps = len(training.events("step"))
    time.sleep(0.5)
    assert len(training.events("step")) == n_steps
    os.kill(process.pid, signal.SIGCONT)
    process.join(30)
    assert process.exitcode == 0, training.last_words()
    assert training.adapter() == uninterrupted[0]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(make: Any, uninterrupted: tuple[str, float]) -> None:
    training = make(more=("--checkpoint-every=2",))
    process = training.start()
    wait_until(lambda: len(training.events("checkpoint")) >= 3, "three checkpoints")
    kill(process)
    newest = max(training.checkpoints.glob("step-*"))
    state = newest / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    assert training.finish("--resume") == 0, training.last_words()
    assert training.adapter() == uninterrupted[0]
    (warning,) = [event["message"] for event in training.events("warning") if "damaged" in event["message"]]
    assert newest.name in warning


def test_with_every_checkpoint_damaged_it_begins_anew(make: Any, uninterrupted: tuple[str, float]) -> None:
    training = make()
    process = training.start()
    wait_until(lambda: len(training.events("checkpoint")) >= 3, "three checkpoints")
    kill(process)
    for file in training.checkpoints.glob("step-*/progress.json"):
        file.write_text("{")
    assert training.finish("--resume") == 0, training.last_words()
    assert training.adapter() == uninterrupted[0]


def test_changes_are_named_and_refused_unless_forced(make: Any) -> None:
    training = make()
    process = training.start()
    wait_until(lambda: len(training.events("checkpoint")) >= 2, "two checkpoints")
    kill(process)
    training.data.write_text(training.data.read_text().replace("it is 7", "it is 8"))
    assert training.finish("--resume", "--lr=0.02") == 1
    complaint = training.last_words().splitlines()[-1]
    assert "data: " in complaint
    assert "--lr: 0.01 then, 0.02 now" in complaint
    assert "--force" in complaint
    assert not training.output.exists()
    identity = json.loads((training.checkpoints / "identity.json").read_text())
    identity["facts"]["torch"] = "1.0"
    (training.checkpoints / "identity.json").write_text(json.dumps(identity))
    assert training.finish("--resume", "--lr=0.02") == 1
    assert "torch: 1.0 then" in training.last_words().splitlines()[-1]
    assert training.finish("--resume", "--lr=0.02", "--force") == 0, training.last_words()
    assert any("going on by --force" in event["message"] for event in training.events("warning"))


def test_checkpoints_of_another_run_are_not_written_over(make: Any) -> None:
    training = make()
    assert training.finish() == 0
    shutil.rmtree(training.output)
    assert training.finish() == 1
    assert "say --resume to go on with them" in training.last_words()


def test_two_trainings_at_once_on_one_device_are_refused_or_wait(make: Any, uninterrupted: tuple[str, float]) -> None:
    first, second, third = make("first"), make("second"), make("third")
    process = first.start()
    wait_until(lambda: len(first.events("step")) >= 1, "a step")
    os.kill(process.pid, signal.SIGSTOP)  # it holds the device, however long it does nothing
    assert second.finish() == 1
    assert f"the cpu is used by the training of out (process {process.pid})" in second.last_words()
    waiting = third.start("--wait")
    wait_until(lambda: any("waiting for" in event.get("message", "") for event in third.events("note")), "the third to wait")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    waiting.join(30)
    assert waiting.exitcode == 0, third.last_words()
    assert third.adapter() == uninterrupted[0]
    assert first.finish("--resume") == 0, "what a killed process held is taken over"


def test_a_base_model_that_is_changed_under_the_run_is_told(make: Any, tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    training = Training(tmp_path / "run", model, ("--checkpoint-every=2", "--epochs=100"))
    process = training.start()
    wait_until(lambda: len(training.events("checkpoint")) >= 1, "a checkpoint")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    process.join(60)
    assert process.exitcode == 1
    assert "was changed while an adapter was trained on it" in training.last_words()
    assert not training.output.exists()


def test_early_stopping_keeps_the_best_adapter_also_when_it_was_killed(make: Any) -> None:
    more = ("--checkpoint-every=1", "--epochs=40", "--lr=0.2", "--eval-every=2", "--early-stop=2")
    straight, killed = make("straight", more), make("killed", more)
    assert straight.finish() == 0, straight.last_words()
    record = json.loads((straight.output / "training_record.json").read_text())
    assert record["ended_by"] == "early_stop"
    assert record["steps"] < 120
    losses = dict(map(tuple, record["held_out_history"]))
    assert losses[record["best_step"]] == min(losses.values()) == record["held_out_loss_after"]
    process = killed.start()
    wait_until(lambda: len(killed.events("step")) >= 3, "three steps")
    kill(process)
    assert killed.finish("--resume") == 0, killed.last_words()
    assert killed.adapter() == straight.adapter()
    assert json.loads((killed.output / "training_record.json").read_text())["held_out_history"] == record["held_out_history"]


def test_a_time_limit_saves_what_there_is(make: Any) -> None:
    training = make(more=("--epochs=100000", "--time-limit=1.5"))
    assert training.finish() == 0, training.last_words()
    record = json.loads((training.output / "training_record.json").read_text())
    assert record["ended_by"] == "time_limit"
    assert 0 < record["steps"] < 300_000


def test_a_loss_that_is_no_number_ends_at_its_step_and_keeps_the_checkpoint_before(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    import safetensors.torch

    model = tmp_path / "model"
    shutil.copytree(tiny_model("qwen2"), model)
    weights = safetensors.torch.load_file(model / "model.safetensors")
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    weights["model.embed_tokens.weight"][vocabulary["~"]] = math.nan
    safetensors.torch.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    training = Training(tmp_path / "run", model, (*EVERY_STEP, "--epochs=1"))
    order = list(range(training.n_samples))
    random.Random("0:0").shuffle(order)  # the first epoch's; the last of it is in the third step
    write_lines(training.data, [line(number, "Say ~" if number == order[-1] else "Say") for number in range(training.n_samples)])
    assert training.finish() == 1
    complaint = training.last_words().splitlines()[-1]
    assert complaint.startswith("LoraTrainerError: the loss of step 3 is nan")
    assert f"-{order[-1]:032x}" in complaint
    assert not training.output.exists()
    assert max(path.name for path in training.checkpoints.glob("step-*")) == "step-00000002"


def test_control_c_after_a_first_signal_ends_at_once_and_sigterm_does_not(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from loraloop.train.stop import Stop, StopAsked
stop = Stop()
with stop.listening():
    try:
        with stop.protected():
            for name in sys.argv[1:]:
                os.kill(os.getpid(), getattr(signal, name))
            print("whole")
    except StopAsked:
        print("asked")
"""
    for signals, expected in (
        (["SIGTERM", "SIGTERM"], (0, "whole\nasked\n")),
        (["SIGINT", "SIGTERM"], (0, "whole\nasked\n")),
        (["SIGTERM", "SIGINT"], (130, "")),
        (["SIGINT", "SIGINT"], (130, "")),
    ):
        done = subprocess.run([sys.executable, "-c", code, *signals], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == expected, signals


def test_a_stop_before_the_first_step_is_told_as_one(make: Any, uninterrupted: tuple[str, float]) -> None:
    training = make(more=(*EVERY_STEP, "--wait"))
    holder = make("holder")
    process = holder.start()
    wait_until(lambda: len(holder.events("step")) >= 1, "a step")
    os.kill(process.pid, signal.SIGSTOP)
    waiting = training.start()
    wait_until(lambda: any("waiting for" in event.get("message", "") for event in training.events("note")), "it to wait")
    os.kill(waiting.pid, signal.SIGTERM)
    waiting.join(10)
    assert waiting.exitcode == 143
    assert [event["step"] for event in training.events("stopped")] == [0]
    kill(process)
    assert training.finish("--resume") == 0, training.last_words()
    assert training.adapter() == uninterrupted[0]


@pytest.mark.parametrize("damage", ["deleted", "damaged"])
def test_checkpoints_of_which_nobody_can_tell_whose_they_are_go_on_by_force_only(make: Any, damage: str) -> None:
    training = make()
    process = training.start()
    wait_until(lambda: len(training.events("checkpoint")) >= 2, "two checkpoints")
    kill(process)
    identity = training.checkpoints / "identity.json"
    identity.unlink() if damage == "deleted" else identity.write_text("{")
    assert training.finish("--resume") == 1
    assert "nobody can tell whether this is the run" in training.last_words()
    assert training.finish("--resume", "--force") == 0, training.last_words()


def test_what_is_saved_after_damage_is_kept(make: Any, uninterrupted: tuple[str, float]) -> None:
    training = make()
    process = training.start()
    wait_until(lambda: len(training.events("checkpoint")) >= 5, "five checkpoints")
    kill(process)
    for file in training.checkpoints.glob("step-*/state.safetensors"):
        file.write_bytes(b"")
    process = training.start("--resume")
    n_saved = len(training.events("checkpoint"))
    wait_until(lambda: len(training.events("checkpoint")) >= n_saved + 2, "two more")
    kill(process)
    assert training.finish("--resume") == 0, training.last_words()
    notes = [event["message"] for event in training.events("note") if "going on behind step" in event["message"]]
    assert len(notes) == 1, "from what was saved anew"
    assert training.adapter() == uninterrupted[0]


def test_all_that_stands_in_the_way_is_told_in_one_message(make: Any, tmp_path: Path) -> None:
    training = make()
    training.data.write_text("{}\n")
    training.held_out.write_text("no json\n")
    training.model = tmp_path / "no-such-model"
    training.checkpoints = training.data / "a file is no folder"
    assert training.finish() == 1
    told = training.last_words()
    assert "CannotStart: 4 things stand in the way of this training:" in told
    for number, part in enumerate(("--checkpoints", "no such file or folder", "train.jsonl", "held_out.jsonl"), 1):
        (finding,) = [text for text in told.splitlines() if text.startswith(f"  {number}. ")]
        assert part in finding


def test_an_adapter_is_trained_on_from_where_it_was(make: Any, tmp_path: Path) -> None:
    first = make("first")
    assert first.finish() == 0
    second = make("second", (*EVERY_STEP, f"--adapter={first.output}"))
    assert second.finish() == 0, second.last_words()
    before, after = first.events("held_out")[-1]["loss"], second.events("held_out")[0]["loss"]
    assert after == pytest.approx(before, rel=1e-5)
    process = (third := make("third", (*EVERY_STEP, f"--adapter={first.output}"))).start()
    wait_until(lambda: len(third.events("checkpoint")) >= 2, "two checkpoints")
    kill(process)
    assert third.finish("--resume") == 0, third.last_words()
    assert third.adapter() == second.adapter() != first.adapter()
    refused = make("fourth", (*EVERY_STEP, f"--adapter={first.output}", "--rank=8"))
    assert refused.finish() == 1
    assert "--rank 8: the adapter that is trained on has 4; give --rank 4" in refused.last_words()


@pytest.mark.parametrize("architecture", ["qwen2", "lfm2"])
@pytest.mark.parametrize("engine", ["tree", "dense"])
def test_every_engine_goes_on_to_the_same_adapter(
    tmp_path: Path, tiny_model: Callable[[str], Path], architecture: str, engine: str
) -> None:
    straight, killed = (Training(tmp_path / name, tiny_model(architecture), (*EVERY_STEP, f"--engine={engine}")) for name in ("a", "b"))
    assert straight.finish() == 0, straight.last_words()
    process = killed.start()
    wait_until(lambda: len(killed.events("checkpoint")) >= 4, "four checkpoints")
    kill(process)
    assert killed.finish("--resume") == 0, killed.last_words()
    assert killed.adapter() == straight.adapter()
