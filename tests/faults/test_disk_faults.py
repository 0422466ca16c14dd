"""Disks that fill up or fail under a training: at every point either it goes on, or it ends with one clear message and is gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from faults.trainings import Training, told, wait_until

from loraloop.episode import Message
from loraloop.errors import LoraTrainerError
from loraloop.learn.conversation import ConversationLearn
from loraloop.lora.config import LoraTrainerConfig
from loraloop.lora.trainer import LoraTrainer
from loraloop.store.memory import InMemoryEpisodeStore
from loraloop.testing import make_episode

POINTS = [
    *(f"fsync:error=EIO:when={number}" for number in (1, 2, 5, 9, 14, 30, 50)),
    *(f"fsync:error=ENOSPC:when={number}" for number in (3, 12, 25)),
    *(f"write:error=ENOSPC:when={number}" for number in (4, 9, 15, 26, 40, 70)),
    *(f"write:error=EIO:when={number}" for number in (6, 20, 45)),
    *(f"{call}:error=ENOSPC:when={number}+" for call, number in (("fsync", 20), ("write", 30), ("mkdir", 3), ("rename", 5))),
]
"""strace's rules: which system call fails, how, and from which on; with a plus the disk stays as it is."""


@pytest.fixture
def make(tmp_path: Path, tiny_model: Callable[[str], Path]) -> Callable[..., Training]:
    return lambda name="run": Training(tmp_path / name, tiny_model("llama"), ("--checkpoint-every=1",))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> str:
    training = Training(tmp_path_factory.mktemp("whole") / "run", tiny_model("llama"), ("--checkpoint-every=1",))
    assert training.finish() == 0, training.last_words()
    return training.adapter()


def finish_with_fault(training: Training, rule: str) -> int:
    """Run it with a fault that the system itself reports, by strace."""
    process = training.start(stopped=True)
    strace = subprocess.Popen(
        [
            "strace",
            "-f",
            "-qq",
            "-o",
            os.devnull,
            "-e",
            f"trace={rule.split(':', maxsplit=1)[0]}",
            "-e",
            f"inject={rule}",
            "-p",
            str(process.pid),
        ],
        stderr=subprocess.DEVNULL,
    )
    status = Path(f"/proc/{process.pid}/status")
    wait_until(lambda: "TracerPid:\t0\n" not in status.read_text() or strace.poll() is not None, "strace to attach")
    if strace.poll() is not None:
        os.kill(process.pid, signal.SIGKILL)
        pytest.skip("strace may not trace processes here")
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode is not None, f"{rule}: it hangs: {training.last_words()}"
    strace.terminate()
    strace.wait()
    return int(process.exitcode)


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_writes_and_syncs_that_fail_lose_nothing(make: Any, expected: str, capsys: Any) -> None:
    with told("injected ENOSPC and EIO", capsys) as counts:
        counts |= {"points": 0, "went on": 0, "ended clearly": 0, "lost": 0}
        for rule in POINTS:
            training = make(rule.replace(":", "-"))
            code = finish_with_fault(training, rule)
            counts["points"] += 1
            said = training.said.read_text()
            if code == 0:
                counts["went on"] += 1
            else:
                assert code == 1, f"{rule}: {said[-800:]}"
                assert "Traceback" not in said, f"{rule}: {said[-1500:]}"
                assert not training.output.exists(), rule
                counts["ended clearly"] += 1
                assert training.finish("--resume") == 0, f"{rule}: {training.last_words()}"
            counts["lost"] += training.adapter() != expected
            assert counts["lost"] == 0, rule
            assert training.leftovers() == [], rule
    assert counts["points"] >= 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of the given size."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        place = tmp_path / f"disk-{size}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("no disk may be mounted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return filler


def test_a_disk_without_room_is_told_before_anything_is_computed(make: Any, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("300k")
    training = make()
    training.checkpoints = disk / "checkpoints"
    assert training.finish() == 1
    assert "kB free, and the adapter and its checkpoints need" in training.last_words()
    assert training.events("step") == []


def test_a_disk_that_fills_up_stops_no_training_and_is_told(make: Any, small_disk: Callable[[str], Path], expected: str) -> None:
    disk = small_disk("1500k")
    training = make()
    training.checkpoints = disk / "checkpoints"
    process = training.start()
    wait_until(lambda: len(training.events("checkpoint")) >= 2, "two checkpoints")
    os.kill(process.pid, signal.SIGSTOP)
    fill(disk)
    os.kill(process.pid, signal.SIGCONT)
    process.join(30)
    assert process.exitcode == 0, training.last_words()
    assert training.adapter() == expected
    warnings = [event["message"] for event in training.events("warning")]
    assert any("could not be saved" in text and "No space left on device" in text and "is kept" in text for text in warnings)


def test_an_adapter_that_cannot_be_saved_is_saved_when_there_is_room(make: Any, small_disk: Callable[[str], Path], expected: str) -> None:
    disk = small_disk("1500k")
    training = make()
    training.output = disk / "out"
    process = training.start()
    wait_until(lambda: len(training.events("step")) >= 1, "a step")
    os.kill(process.pid, signal.SIGSTOP)
    filler = fill(disk)
    os.kill(process.pid, signal.SIGCONT)
    process.join(30)
    assert process.exitcode == 1
    complaint = training.last_words().splitlines()[-1]
    assert "cannot be saved" in complaint
    assert "the checkpoint of step 9 is kept" in complaint
    assert [path.name for path in disk.iterdir()] == ["filler"]
    filler.unlink()
    n_steps = len(training.events("step"))
    assert training.finish("--resume") == 0, training.last_words()
    assert len(training.events("step")) == n_steps, "nothing was computed again"
    assert training.adapter() == expected


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("mount") is None, reason="root writes anywhere")
def test_an_output_that_cannot_be_written_to_is_told_before_anything_is_computed(make: Any, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("1000k")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    training = make()
    training.output = disk / "out"
    assert training.finish() == 1
    assert f"--output: {disk} cannot be written to: Read-only file system" in training.last_words()
    assert training.events("step") == []


def test_training_data_that_does_not_fit_on_the_disk_is_told_and_leaves_nothing(small_disk: Callable[[str], Path], tmp_path: Path) -> None:
    disk = small_disk("300k")
    store = InMemoryEpisodeStore()
    messages = (Message(role="user", content="x" * 400_000), Message(role="assistant", content="y"))
    store.append(make_episode(messages=messages))
    trainer = LoraTrainer(LoraTrainerConfig(data_dir=disk / "runs", output_dir=tmp_path / "models"), store)
    with pytest.raises(LoraTrainerError, match=r"cannot be written to .*No space left on device; make room") as failure:
        trainer.train_sync(ConversationLearn())
    assert "train.jsonl" in str(failure.value)
    assert list((disk / "runs").iterdir()) == []


def test_a_broken_record_of_progress_is_no_reason_to_lose_the_run(make: Any, expected: str) -> None:
    training = make()
    process = training.start()
    wait_until(lambda: len(training.events("checkpoint")) >= 2, "two checkpoints")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    newest = max(training.checkpoints.glob("step-*"))
    (newest / "manifest.json").write_text(json.dumps({}))
    (training.checkpoints / ".step-00000099.abc").mkdir()
    assert training.finish("--resume") == 0, training.last_words()
    assert training.adapter() == expected
    assert training.leftovers() == []
