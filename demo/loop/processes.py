"""The processes of a run: each is started as a user would start it, kept alive, and ended in good order.

Whatever dies is started again: the service with the address and token that it had, the watch and the agent behind what they had done.
What a run that was killed itself has left behind is found by the project's own leases and ended before another begins.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from loraloop.lease import Holder, read_holder
from loraloop.serve.orders import HOST

END_SECONDS = 45.0
"""How long a process may take to end once it is asked."""
QUICKLY = 5.0
"""A process that lives no longer than these seconds has not begun."""
MAX_QUICK_DEATHS = 5


class DiedAgain(RuntimeError):
    """A process that does not stay up, whatever is done."""


@dataclass
class Kept:
    """One process that is to be there until it is ended."""

    name: str
    argv: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    restarts: int = 0
    _process: subprocess.Popen[str] | None = None
    _started: float = 0.0
    _quick_deaths: int = 0
    _said: str = ""

    @property
    def pid(self) -> int | None:
        """Its process id, None while it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def said(self) -> str:
        """The last line that it was told."""
        return self._said

    def start(self) -> None:
        """Begin it; its own session, so that Ctrl-C reaches only whoever ends it in good order."""
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                self.argv,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        self._started = time.monotonic()
        if self._said:
            self.say(self._said)

    def keep(self) -> bool:
        """Start it again when it has died; whether it had. Raises DiedAgain when it dies again and again."""
        if self.pid is not None:
            return False
        self._quick_deaths = self._quick_deaths + 1 if time.monotonic() - self._started < QUICKLY else 0
        if self._quick_deaths >= MAX_QUICK_DEATHS:
            raise DiedAgain(f"{self.name} ended {MAX_QUICK_DEATHS} times as soon as it was started; the end of {self.log} says why")
        self._drop()
        self.restarts += 1
        self.start()
        return True

    def say(self, line: str) -> None:
        """A line on its standard input, said again to whoever takes its place."""
        self._said = line
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):  # it has just died, and hears it when it is started again
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()

    def end(self, *, ask: bool = True) -> int | None:
        """End it in good order, at the end of its standard input or, with `ask`, by SIGTERM; its exit code, None when it never ran."""
        process = self._process
        if process is None:
            return None
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
        for _ in range(2):  # who is asked twice ends at once, and has kept what must be kept
            if ask and process.poll() is None:
                process.terminate()
            with suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=END_SECONDS)
        process.kill()
        return process.wait()

    def _drop(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()


def command(*arguments: str) -> list[str]:
    """`loraloop …` as this interpreter runs it."""
    return [sys.executable, "-m", "loraloop", *arguments]


def new_token() -> str:
    """A token for the router."""
    return secrets.token_urlsafe(24)


def find_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def end_left_behind(*leases: Path) -> list[str]:
    """End the processes that hold these leases, in good order; who they were, in words."""
    ended = []
    for path in leases:
        holder = read_holder(path)
        if holder is not None and holder.is_alive:
            ended.append(holder.describe())
            _end(holder)
    return ended


def _end(holder: Holder) -> None:
    deadline = time.monotonic() + END_SECONDS
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        for pid, _ in holder.processes:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        while holder.is_alive and time.monotonic() < deadline:
            time.sleep(0.1)
        deadline = time.monotonic() + END_SECONDS
