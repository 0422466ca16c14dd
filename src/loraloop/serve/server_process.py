"""A server as a child process: it ends when it is stopped, and when this process ends, however that happens (see guard.py).

What it says goes to a log of bounded size; the last lines are kept for errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from loraloop import guard
from loraloop.errors import TAIL_LINES, ServingError
from loraloop.log_file import Log

LOG_BYTES = 8 << 20
"""What a log holds before it is put aside; twice this at most is kept."""
TAIL_BYTES = 16 << 10
SECONDS_TO_END = 5.0
"""For a server that is told to stop, before it is ended for good. Its last request has ended before."""


class ServerProcess:
    """One server, from its start to its end."""

    def __init__(self, child: asyncio.subprocess.Process, log: Log) -> None:
        self._child = child
        self._log = log
        self._said = b""
        self._stopping = asyncio.Lock()
        self._is_over = False
        self._hearing = asyncio.create_task(self._hear())

    @classmethod
    async def start(cls, argv: Sequence[str], environment: Mapping[str, str], log_path: Path) -> Self:
        """Start `argv`, with `environment` laid over that of this process. Raises ServingError when the log cannot be written."""
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            log = Log(log_path, LOG_BYTES)
        except OSError as error:
            raise ServingError(f"the log {log_path} cannot be written: {error.strerror}; nothing was started") from error
        try:
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", guard.__file__, *argv),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                env={**os.environ, **environment},
            )
        except BaseException:
            log.close()
            raise
        return cls(child, log)

    @property
    def pid(self) -> int:
        """Of the server itself, and the number of its process group."""
        return self._child.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._child.returncode is None

    async def read_line(self) -> bytes:
        """The next line of its standard output. Raises ServingError, with the last lines of its log, when it ends before there is one."""
        assert self._child.stdout is not None  # noqa: S101  it is a pipe
        line = await self._child.stdout.readline()
        if not line.endswith(b"\n"):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(self._child.wait(), asyncio.shield(self._hearing)), SECONDS_TO_END)
            raise ServingError(f"{self.describe_end()}; it said last:\n{self.tail}")
        return line

    def check_running(self) -> None:
        """Raises ServingError, with the last lines of its log, when it has ended."""
        if not self.is_running:
            raise ServingError(f"{self.describe_end()}; it said last:\n{self.tail}")

    @property
    def tail(self) -> str:
        """The last lines that it has said."""
        return "\n".join(self._said.decode("utf-8", "replace").splitlines()[-TAIL_LINES:]) or "(nothing)"

    async def wait_end(self, seconds: float) -> None:
        """Until it has ended, but no longer than `seconds`: the system tells of a death a moment after the connections have broken."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._child.wait(), seconds)

    def describe_end(self) -> str:
        """How it ended, as a phrase."""
        code = self._child.returncode
        if code is None:
            return "the server runs"
        if code < 0:
            return f"the server was ended by {signal.Signals(-code).name}"
        return f"the server ended (exit {code})"

    async def stop(self) -> None:
        """End it and all that it has started. Safe to call twice."""
        async with self._stopping:
            if self._is_over:
                return
            try:
                if self.is_running:
                    self._signal(signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._child.wait(), SECONDS_TO_END)
                self._signal(signal.SIGKILL)
                await self._child.wait()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._hearing, SECONDS_TO_END)
            finally:
                self._signal(signal.SIGKILL)
                self._is_over = True
                self._hearing.cancel()
                self._log.close()
                if self._child.stdin is not None:
                    self._child.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        """To its process group, whose number cannot be another's while the watch of guard.py is in it."""
        if not self._is_over:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, number)

    async def _hear(self) -> None:
        assert self._child.stderr is not None  # noqa: S101  it is a pipe
        while piece := await self._child.stderr.read(1 << 16):
            self._log.write(piece)
            self._said = (self._said + piece)[-TAIL_BYTES:]
