"""Real training processes that can be killed at any instant: forked from a server that has loaded torch, so that one takes a second."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import SERVER

SETTINGS = ["--rank=4", "--alpha=8", "--dropout=0.1", "--epochs=3", "--batch-size=2", "--grad-accum=2", "--lr=0.01", "--max-seq-length=200"]

STARTED: list[Any] = []
"""Whatever a test leaves of these is ended after it; a halted one would hold the device, and the end of the tests, for ever."""


def line(number: int, question: str = "Say the number", answer: str | None = None) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"{question} {number}"}, {"role": "assistant", "content": answer or f"it is {number * 7}"}]
    return {"conversations": turns, "episode_id": f"ep-{0:013d}-{number:032x}"}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def work(argv: list[str], said: str, stopped: bool) -> None:
    """In the forked process: what `python -m loraloop.train` does, its output into a file."""
    from loraloop.train.__main__ import main

    os.setsid()
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if stopped:
        os.kill(os.getpid(), signal.SIGSTOP)
    code = 120
    with contextlib.suppress(SystemExit):
        code = main(argv)
    os._exit(code)


@dataclass
class Training:
    """The command line of one run in a folder of its own, and its processes."""

    folder: Path
    model: Path
    more: tuple[str, ...] = ()
    n_samples: int = 12

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.output, self.checkpoints, self.said = self.folder / "out", self.folder / "checkpoints", self.folder / "said"
        self.data = write_lines(self.folder / "train.jsonl", [line(number) for number in range(self.n_samples)])
        self.held_out = write_lines(self.folder / "held_out.jsonl", [line(number) for number in range(100, 103)])

    @property
    def argv(self) -> list[str]:
        paths = {"--data": self.data, "--held-out": self.held_out, "--output": self.output, "--checkpoints": self.checkpoints}
        named = [part for option, path in paths.items() for part in (option, str(path))]
        return [*named, "--model", str(self.model), *SETTINGS, *self.more]

    def start(self, *more: str, stopped: bool = False) -> Any:
        process = SERVER.Process(target=work, args=([*self.argv, *more], str(self.said), stopped), daemon=True)
        process.start()
        STARTED.append(process)
        return process

    def finish(self, *more: str, within: float = 60.0) -> int:
        """Run to the end: the exit code, or minus the signal's number."""
        process = self.start(*more)
        process.join(within)
        assert not process.is_alive(), f"still running after {within} s: {self.last_words()}"
        return int(process.exitcode)

    def wait_for_saving(self, process: Any) -> None:
        """Until a checkpoint is being written, or the process has ended."""
        wait_until(lambda: bool(list(self.checkpoints.glob(".step-*"))) or process.exitcode is not None, "a checkpoint to begin")

    def adapter(self) -> str:
        return hashlib.sha256((self.output / "adapter_model.safetensors").read_bytes()).hexdigest()

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        found = []
        for text in self.said.read_text().splitlines() if self.said.exists() else []:
            with contextlib.suppress(ValueError):
                event = json.loads(text)
                if kind in (None, event["event"]):
                    found.append(event)
        return found

    def last_words(self) -> str:
        return self.said.read_text()[-1500:] if self.said.exists() else ""

    def leftovers(self) -> list[str]:
        """Names that nothing whole has."""
        return [path.name for path in (*self.folder.glob(".*"), *self.checkpoints.glob(".*"))]


def kill(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.002)


@contextlib.contextmanager
def told(name: str, capsys: Any) -> Iterator[dict[str, int]]:
    """Counts what a test tried and lost, and prints it whatever happens."""
    counts: dict[str, int] = {}
    yield counts
    with capsys.disabled():
        print(f"\n{name}: " + ", ".join(f"{what} {count}" for what, count in counts.items()))
