"""Run a training script as a child process: its output goes to a log as it comes, and its end is told truthfully.

Memory and log stay bounded whatever the script prints. Cancelling ends the script and all that it started, and so does the death of
this process (see guard.py). What outlives the script is ended with it: it would hold the pipes open, so that their end never comes;
what has left the script's process group is not waited for.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from loraloop import guard
from loraloop.errors import TAIL_LINES, LoraTrainerError, ProcessFailed
from loraloop.log_file import Log

MAX_LINE = 4_000
"""Characters of one line that are looked at or shown; the log has all of them."""
LOG_BYTES = 32 << 20
"""What a log holds before it is put aside as `<name>.1`, where the one that was there before goes: twice this at most is kept."""
SECONDS_TO_END = 60.0
"""For a script that is told to stop: ours saves a checkpoint first."""
EVENT = '{"event":'
"""How a line begins that tells of progress, which is no complaint."""


async def run_process(
    argv: Sequence[str],
    log_path: Path,
    on_line: Callable[[str], None],
    on_start: Callable[[int], None] = lambda pid: None,
) -> None:
    """Run `argv` to its end; `on_start` hears its process id, `on_line` every line of its stdout.

    Raises LoraTrainerError when the log cannot be written to; ProcessFailed for an exit code other than 0, with the last lines of
    stderr (of stdout when stderr is empty, events left out); and whatever `on_line` raises.
    """
    if shutil.which(argv[0]) is None:
        raise ProcessFailed(127, "", log_path, f"{argv[0]} cannot be started: no such program; see python_path")
    out, err = _Lines(on_line), _Lines()
    with contextlib.closing(open_log(log_path, LOG_BYTES)) as log:
        transport, child = await asyncio.get_running_loop().subprocess_exec(
            lambda: _Child(log, {1: out, 2: err}),
            *(sys.executable, "-I", "-S", guard.__file__, *argv),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            on_start(transport.get_pid())
            await child.over.wait()
        finally:
            await _end_group(transport, child)
    if child.failure is not None:
        raise child.failure
    code = transport.get_returncode()
    if code:
        said = err.tail or [line for line in out.tail if not line.startswith(EVENT)]
        raise ProcessFailed(code, "\n".join(said), log_path)


def open_log(path: Path, max_bytes: int | None = None) -> Log:
    """The log of a training. Raises LoraTrainerError when it cannot be written."""
    try:
        return Log(path, max_bytes)
    except OSError as error:
        raise LoraTrainerError(f"the log {path} cannot be written: {error.strerror}; nothing was started") from error


class _Lines:
    """Cuts a stream of bytes into lines of at most MAX_LINE characters, and keeps the last of them."""

    def __init__(self, on_line: Callable[[str], None] = lambda _: None) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._on_line = on_line
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._line, self._n_dropped = "", 0

    def tell(self, line: str) -> None:
        """Give `line` to the listener as if it had come."""
        self._on_line(line)

    def feed(self, piece: bytes, *, final: bool = False) -> None:
        """Take what came; `final` when nothing comes any more, so that an unfinished line is a line too."""
        *ended, rest = self._decoder.decode(piece, final).split("\n")
        for part in ended:
            self._add(part)
            self._give()
        self._add(rest)
        if final and self._line:
            self._give()

    def _add(self, part: str) -> None:
        room = MAX_LINE - len(self._line)
        self._line += part[:room]
        self._n_dropped += max(0, len(part) - room)

    def _give(self) -> None:
        line = f"{self._line} … ({self._n_dropped} more characters)" if self._n_dropped else self._line.rstrip("\r")
        self._line, self._n_dropped = "", 0
        self.tail.append(line)
        self._on_line(line)


class _Child(asyncio.SubprocessProtocol):
    """Hears the script. `exited` is set when it has ended, `silent` when its pipes have, `over` when it has ended or hearing failed."""

    def __init__(self, log: Log, lines: dict[int, _Lines]) -> None:
        self.exited, self.silent, self.over = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.failure: Exception | None = None
        self.hung_up = False
        self._log = log
        self._log_is_lost = False
        self._open = dict(lines)
        self._out = lines[1]

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """A piece of what it printed."""
        self._hear(self._open[fd], data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        """A pipe has ended; that of its standard input, which says nothing, among them."""
        del exc
        if fd in self._open:
            self._hear(self._open.pop(fd), b"", final=True)
        if not self._open:
            self.silent.set()

    def process_exited(self) -> None:
        """The script has ended; its pipes may still be open."""
        self.exited.set()
        self.over.set()

    def _hear(self, lines: _Lines, piece: bytes, *, final: bool = False) -> None:
        if self.hung_up:
            return
        try:
            self._log.write(piece)
            if self._log.failure is not None and not self._log_is_lost:
                self._log_is_lost = True
                lost = f"the log {self._log.path} cannot be written: {self._log.failure.strerror}; the training goes on without it"
                self._out.tell(json.dumps({"event": "warning", "message": lost}))
            if self.failure is None:
                lines.feed(piece, final=final)
        except Exception as error:  # noqa: BLE001  of the listener; run_process raises it, where its caller can see it
            self.failure = self.failure or error
            self.over.set()


async def _end_group(transport: asyncio.SubprocessTransport, child: _Child) -> None:
    """End what is left of the process group: politely first, then for good, also when the waiting is cancelled; then read the rest."""
    try:
        with contextlib.suppress(TimeoutError):
            _signal_group(transport, signal.SIGKILL if child.exited.is_set() else signal.SIGTERM)
            await asyncio.wait_for(child.exited.wait(), SECONDS_TO_END)
        _signal_group(transport, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(child.exited.wait(), child.silent.wait()), SECONDS_TO_END)
    finally:
        child.hung_up = True
        _signal_group(transport, signal.SIGKILL)
        transport.close()


def _signal_group(transport: asyncio.SubprocessTransport, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(transport.get_pid(), number)
