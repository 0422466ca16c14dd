"""LoraTrainer when the script, the store or the data fails it: the right error, everything in the log, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from standin import WRITE_ADAPTER, MakeTrainer, is_running, wait_until

from loraloop.episode import Episode, EpisodeFilter, Failure, Unknown
from loraloop.errors import EmptyData, LoraTrainerError, ProcessFailed, ScriptNotFound, StoreError
from loraloop.learn.conversation import ConversationLearn
from loraloop.lora import process
from loraloop.lora.registry import LoraModelRegistry
from loraloop.store.memory import InMemoryEpisodeStore
from loraloop.testing import make_episode
from loraloop.training_record import TrainingEvent


def fail(make_trainer: MakeTrainer, script: str, **settings: object) -> ProcessFailed:
    """The error of a script that fails, after a look that no model came of it."""
    trainer = make_trainer(script, **settings)
    with pytest.raises(ProcessFailed) as failure:
        trainer.train_sync(ConversationLearn())
    assert LoraModelRegistry(trainer.config.output_dir).list_models() == []
    return failure.value


# --- how a script can end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGSEGV", "SIGINT"])
def test_a_script_ended_by_a_signal_is_told_by_its_name(make_trainer: MakeTrainer, name: str) -> None:
    error = fail(
        make_trainer,
        f"print('last words', file=sys.stderr, flush=True)\nsignal.signal(signal.{name}, signal.SIG_DFL) if {name != 'SIGKILL'} else 0\nos.kill(os.getpid(), signal.{name})",
    )
    assert error.exit_code == -getattr(signal, name)
    assert error.signal_name == name
    assert f"ended by {name}" in str(error)
    assert error.stderr == "last words"


def test_the_last_forty_lines_of_stderr_are_in_the_message_and_all_are_in_the_log(make_trainer: MakeTrainer) -> None:
    error = fail(make_trainer, "for n in range(100): print(f'complaint {n}', file=sys.stderr)\nprint('on stdout')\nsys.exit(3)")
    assert error.exit_code == 3
    assert error.signal_name is None
    assert error.stderr.splitlines() == [f"complaint {n}" for n in range(60, 100)]
    assert "Training failed (exit 3)" in str(error)
    assert str(error).count("complaint") == 40
    assert str(error.log_path) in str(error)
    assert error.log_path is not None
    log = error.log_path.read_text().splitlines()
    assert sorted(log) == sorted([*(f"complaint {n}" for n in range(100)), "on stdout"])


def test_stdout_takes_the_place_of_an_empty_stderr(make_trainer: MakeTrainer) -> None:
    assert fail(make_trainer, "print('what went wrong')\nsys.exit(1)").stderr == "what went wrong"


@pytest.mark.parametrize(("before", "n_steps", "told"), [("print('what went wrong')", 20, "what went wrong"), ("", 50, "")])
def test_progress_is_no_complaint(make_trainer: MakeTrainer, before: str, n_steps: int, told: str) -> None:
    event = "json.dumps({'event': 'step', 'step': n}, separators=(',', ':'))"
    error = fail(
        make_trainer, f"{before}\nfor n in range({n_steps}): print({event})\nsys.stdout.flush()\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    assert error.stderr == told
    assert ("(nothing was written to stderr)" in str(error)) is (not told)


def test_a_silent_failure_says_that_nothing_was_written(make_trainer: MakeTrainer) -> None:
    assert "(nothing was written to stderr)" in str(fail(make_trainer, "os._exit(7)"))


@pytest.mark.parametrize(
    "script",
    [
        "",
        "output.mkdir(parents=True)",
        "output.mkdir(parents=True)\n(output / 'adapter.bin').touch()",
        "output.parent.mkdir(exist_ok=True)\noutput.write_text('a file')",
    ],
    ids=["nothing", "an empty folder", "an empty file", "a file in its place"],
)
def test_a_script_that_ends_well_without_an_adapter_has_failed(make_trainer: MakeTrainer, script: str) -> None:
    error = fail(make_trainer, script)
    assert error.exit_code == 0
    assert "ended well (exit 0) but wrote no adapter into" in str(error)


def test_a_script_may_not_write_the_record_of_the_model_itself(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    error = fail(make_trainer, WRITE_ADAPTER + "(output / 'trained_model.json').write_text('{}')")
    assert "wrote trained_model.json into" in str(error)
    assert [left.suffix for left in (tmp_path / "adapters").iterdir()] == [".failed"]


def test_what_a_failed_script_left_is_put_aside_and_is_no_model(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    fail(make_trainer, WRITE_ADAPTER + "(output / 'trained_model.json').write_text('{}')\nsys.exit(1)")
    (left,) = (tmp_path / "adapters").iterdir()
    assert left.name.startswith("lora-")
    assert left.name.endswith(".failed")
    assert (left / "adapter.bin").read_text() == "weights"
    registry = LoraModelRegistry(tmp_path / "adapters")
    assert registry.list_models() == []
    assert registry.find_latest() is None
    with pytest.raises(LoraTrainerError, match=r"no model 'latest' in .*; known: none; train one with `loraloop train --base MODEL`"):
        registry.get("latest")


def test_a_run_does_not_use_a_name_whose_leftover_is_there(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(WRITE_ADAPTER + "sys.exit(1)")
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(ProcessFailed):
        asyncio.run(trainer.run_lora_training(tmp_path / "train.jsonl", "mine"))
    with pytest.raises(LoraTrainerError, match=r"mine\.failed exists already"):
        asyncio.run(trainer.run_lora_training(tmp_path / "train.jsonl", "mine"))


# --- what a script can print ------------------------------------------------------------------------------------------------

FLOOD = """
lines, long = b"x" * 99 + b"\\n", b"y" * 10_000_000
for stream in (sys.stdout.buffer, sys.stderr.buffer):
    for _ in range(100):
        stream.write(lines * 1000)
    stream.write(long)
    stream.flush()
"""


def test_forty_megabytes_of_output_reach_the_log_and_take_little_memory(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(FLOOD + "sys.exit(1)")
    tracemalloc.start()
    try:
        with pytest.raises(ProcessFailed) as failure:
            asyncio.run(asyncio.wait_for(trainer.train(ConversationLearn()), 120))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000
    assert len(str(failure.value)) < 50_000
    assert failure.value.stderr.splitlines()[0] == "x" * 99
    assert failure.value.stderr.endswith(f"yyy … ({10_000_000 - process.MAX_LINE} more characters)")
    assert failure.value.log_path is not None
    kept = [failure.value.log_path.stat().st_size, failure.value.log_path.with_name("training.log.1").stat().st_size]
    assert sum(kept) == 40_000_000
    assert max(kept) <= process.LOG_BYTES


def test_a_log_is_bounded_and_holds_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LOG_BYTES", 100_000)
    script = "for number in range(100_000): print(f'line {number:09d}')"
    asyncio.run(process.run_process([sys.executable, "-c", script], tmp_path / "log", lambda _: None))
    before, after = (tmp_path / "log.1").read_text(), (tmp_path / "log").read_text()
    assert max(len(before), len(after)) <= 100_000
    assert f"{before}{after}".endswith("line 000099999\n")


def test_output_that_is_not_utf8_is_shown_as_far_as_it_goes(make_trainer: MakeTrainer) -> None:
    error = fail(make_trainer, "sys.stderr.buffer.write(b'before \\xff\\xfe after \\xc3')\nsys.stderr.flush()\nsys.exit(1)")
    assert error.stderr == "before \ufffd\ufffd after \ufffd"
    assert error.log_path is not None
    assert error.log_path.read_bytes() == b"before \xff\xfe after \xc3"


def test_a_character_cut_by_the_pipe_is_put_together(make_trainer: MakeTrainer) -> None:
    script = "for byte in 'é€𝄞'.encode():\n    os.write(2, bytes([byte]))\n    time.sleep(0.02)\nsys.exit(1)"
    assert fail(make_trainer, script).stderr == "é€𝄞"


def test_an_error_of_the_listener_ends_the_script_and_is_raised(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def listener(event: TrainingEvent) -> None:
        raise RuntimeError(f"cannot show step {event.step}")

    script = (
        "(data.parent / 'pid').write_text(str(os.getpid()))\nprint(json.dumps({'event': 'step', 'step': 1}), flush=True)\ntime.sleep(60)"
    )
    with pytest.raises(RuntimeError, match="cannot show step 1"):
        make_trainer(script).train_sync(ConversationLearn(), on_event=listener)
    (pid_file,) = tmp_path.glob("data/*/pid")
    assert not is_running(int(pid_file.read_text()))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_log_that_cannot_be_written_to_any_more_is_told_and_ends_nothing() -> None:
    heard: list[str] = []
    asyncio.run(process.run_process([sys.executable, "-c", "print(1, flush=True); print(2)"], Path("/dev/full"), heard.append))
    (warning,) = [json.loads(line)["message"] for line in heard if line.startswith("{")]
    assert warning == "the log /dev/full cannot be written: No space left on device; the training goes on without it"
    assert [line for line in heard if not line.startswith("{")] == ["1", "2"]


def test_a_log_that_cannot_be_made_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(LoraTrainerError, match=r"the log .* cannot be written: No such file or directory; nothing was started"):
        asyncio.run(process.run_process([sys.executable, "-c", ""], tmp_path / "no" / "log", lambda _: None))


# --- what cannot be started -------------------------------------------------------------------------------------------------


def test_a_missing_script_is_told_before_anything_is_written(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(None, train_script=tmp_path / "missing.py")
    with pytest.raises(ScriptNotFound) as failure:
        trainer.train_sync(ConversationLearn())
    assert failure.value.path == tmp_path / "missing.py"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_script(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    with pytest.raises(ScriptNotFound):
        make_trainer(None, train_script=tmp_path).train_sync(ConversationLearn())


@pytest.mark.parametrize("kind", ["missing", "not executable"])
def test_an_interpreter_that_cannot_be_started_is_named(make_trainer: MakeTrainer, tmp_path: Path, kind: str) -> None:
    interpreter = tmp_path / "python"
    if kind != "missing":
        interpreter.write_text("")
    error = fail(make_trainer, WRITE_ADAPTER, python_path=interpreter)
    assert f"{interpreter} cannot be started" in str(error)
    assert "see python_path" in str(error)


@pytest.mark.parametrize("setting", ["data_dir", "output_dir"])
def test_a_folder_that_cannot_be_made_is_named_with_its_setting(make_trainer: MakeTrainer, tmp_path: Path, setting: str) -> None:
    (tmp_path / "file").write_text("")
    trainer = make_trainer(**{setting: tmp_path / "file" / "below"})
    with pytest.raises(LoraTrainerError, match=f"cannot be made: Not a directory; choose another {setting}"):
        trainer.train_sync(ConversationLearn())


# --- nothing to train on, and a store in trouble ----------------------------------------------------------------------------


def test_an_empty_store_is_empty_data(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    with pytest.raises(EmptyData, match="No episodes found for training; ingest some first") as failure:
        make_trainer(episodes=[]).train_sync(ConversationLearn())
    assert failure.value.refused == {}
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_a_filter_that_lets_nothing_through_is_named(make_trainer: MakeTrainer) -> None:
    with pytest.raises(EmptyData, match="No episodes found for training with scenario retail, task_id 7; "):
        make_trainer().train_sync(ConversationLearn(), EpisodeFilter(scenario="retail", task_id="7"))


def test_episodes_of_which_none_is_usable_are_empty_data_with_the_counts(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    episodes = [make_episode(outcome=Failure("wrong")), make_episode(outcome=Failure("")), make_episode(outcome=Unknown())]
    with pytest.raises(EmptyData) as failure:
        make_trainer(WRITE_ADAPTER, episodes).train_sync(ConversationLearn())
    assert failure.value.refused == {"outcome_failure": 2, "outcome_unknown": 1}
    assert str(failure.value) == (
        "Empty data: No training data generated from 3 episodes by 'conversation' (refused: outcome_failure 2, outcome_unknown 1)"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_trouble_of_the_store_passes_through(make_trainer: MakeTrainer) -> None:
    class DamagedStore(InMemoryEpisodeStore):
        def iter_episodes(self, episode_filter: EpisodeFilter | None = None) -> Iterator[Episode]:
            yield from super().iter_episodes(episode_filter)
            raise StoreError("episodes.db is damaged at page 7")

    with pytest.raises(StoreError, match="damaged at page 7"):
        make_trainer(WRITE_ADAPTER, DamagedStore()).train_sync(ConversationLearn())


# --- cancelling, and what outlives the script -------------------------------------------------------------------------------

WITH_CHILD = """
child = subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=APART)
(data.parent / "pids.new").write_text(f"{os.getpid()} {child.pid}")
(data.parent / "pids.new").rename(data.parent / "pids")
"""
SLEEP = "import time; time.sleep(60)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); import time; time.sleep(60)"

CHATTER = "import signal, time; signal.signal(signal.SIGPIPE, signal.SIG_IGN)\nwhile True:\n try: print('still here', flush=True)\n except OSError: time.sleep(1)"


def with_child(code: str, *, apart: bool = False) -> str:
    return f"CHILD, APART = {code!r}, {apart}" + WITH_CHILD


def started_pids(tmp_path: Path) -> list[int]:
    wait_until(lambda: bool(list(tmp_path.glob("data/*/pids"))), "the script to start")
    return [int(word) for word in next(tmp_path.glob("data/*/pids")).read_text().split()]


@pytest.mark.parametrize("stubborn", [False, True], ids=["polite", "deaf to SIGTERM"])
def test_cancelling_ends_the_script_and_what_it_started(
    make_trainer: MakeTrainer, tmp_path: Path, end_later: list[int], monkeypatch: pytest.MonkeyPatch, stubborn: bool
) -> None:
    monkeypatch.setattr(process, "SECONDS_TO_END", 0.3)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else ""
    trainer = make_trainer(deaf + WRITE_ADAPTER + with_child(STUBBORN if stubborn else SLEEP) + "time.sleep(60)")

    async def cancel_when_started() -> None:
        task = asyncio.create_task(trainer.train(ConversationLearn()))
        end_later.extend(await asyncio.to_thread(started_pids, tmp_path))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(cancel_when_started(), 60))
    wait_until(lambda: not any(is_running(pid) for pid in end_later), "the script and its child to end", 5)
    assert [path.name.endswith(".failed") for path in (tmp_path / "adapters").iterdir()] == [True]


def test_cancelling_at_any_moment_of_the_start_ends_what_was_started(tmp_path: Path) -> None:
    script = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"

    async def cancel_after(n_turns: int) -> None:
        argv = [sys.executable, "-S", "-c", script, str(tmp_path / f"{n_turns}")]
        task = asyncio.create_task(process.run_process(argv, tmp_path / "log", lambda _: None))
        for _ in range(n_turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def cancel_at_every_turn() -> None:
        for n_turns in range(25):
            await asyncio.wait_for(cancel_after(n_turns), 20)

    asyncio.run(cancel_at_every_turn())
    wait_until(lambda: not any(is_running(int(file.read_text() or 0)) for file in tmp_path.glob("[0-9]*")), "the scripts to end", 5)


def test_interrupting_the_program_ends_the_script(tmp_path: Path, end_later: list[int]) -> None:
    script = "import os, sys, time\nprint(os.getpid(), file=open(sys.argv[2] + '.pid', 'w'), flush=True)\ntime.sleep(60)"
    (tmp_path / "train.py").write_text(script)
    code = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and so their children, ignore it
from loraloop.learn.conversation import ConversationLearn
from loraloop.lora.config import LoraTrainerConfig
from loraloop.lora.trainer import LoraTrainer
from loraloop.store.memory import InMemoryEpisodeStore
from loraloop.testing import make_episode
store = InMemoryEpisodeStore()
store.append(make_episode())
LoraTrainer(LoraTrainerConfig(train_script="train.py", data_dir="data", output_dir="adapters"), store).train_sync(ConversationLearn())
"""
    program = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    end_later.append(program.pid)
    wait_until(lambda: any(file.read_text() for file in tmp_path.glob("data/*/train.jsonl.pid")), "the script to start")
    pid = int(next(tmp_path.glob("data/*/train.jsonl.pid")).read_text())
    end_later.append(pid)
    program.send_signal(signal.SIGINT)
    complaint = program.communicate(timeout=60)[1]
    assert "KeyboardInterrupt" in complaint
    assert program.returncode != 0
    wait_until(lambda: not is_running(pid), "the script to end", 5)


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGKILL)"], ids=["ends well", "is killed"])
def test_a_child_that_outlives_the_script_is_ended_and_not_waited_for(
    make_trainer: MakeTrainer, tmp_path: Path, end_later: list[int], end: str
) -> None:
    trainer = make_trainer(WRITE_ADAPTER + with_child(SLEEP) + end)
    training = asyncio.wait_for(trainer.train(ConversationLearn()), 30)
    if end:
        with pytest.raises(ProcessFailed, match="ended by SIGKILL"):
            asyncio.run(training)  # type: ignore[arg-type]
    else:
        assert asyncio.run(training).sample_count == 1  # type: ignore[arg-type]
    end_later.extend(started_pids(tmp_path))
    wait_until(lambda: not is_running(end_later[1]), "the child to end", 5)


@pytest.mark.parametrize("code", [SLEEP, CHATTER], ids=["silent", "chattering"])
def test_a_daemon_that_left_the_group_is_not_waited_for(
    make_trainer: MakeTrainer, tmp_path: Path, end_later: list[int], monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(process, "SECONDS_TO_END", 0.3)
    trainer = make_trainer(WRITE_ADAPTER + with_child(code, apart=True))
    model = asyncio.run(asyncio.wait_for(trainer.train(ConversationLearn()), 30))  # type: ignore[arg-type]
    end_later.extend(started_pids(tmp_path))
    assert model.sample_count == 1
    assert is_running(end_later[1]), "it is none of ours any more"
