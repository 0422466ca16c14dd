"""Run a training script as a child process: its output goes to a log as it comes, and its end is told truthfully.

Memory stays bounded whatever the script prints. Cancelling ends the script and all that it started.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from loraloop.errors import TAIL_LINES, ProcessFailed

MAX_LINE = 4_000
"""Characters of one line that are looked at or shown; the log has all of them."""
SECONDS_TO_END = 10.0


async def run_process(argv: Sequence[str], log_path: Path, on_line: Callable[[str], None]) -> None:
    """Run `argv` to its end; `on_line` hears every line of its stdout.

    Raises ProcessFailed for an exit code other than 0, with the last lines of stderr (of stdout when stderr is empty).
    """
    with log_path.open("ab") as log:
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise ProcessFailed(127, str(error), log_path, f"{argv[0]} cannot be started: {error.strerror}; see python_path") from error
        out_tail, err_tail = deque[str](maxlen=TAIL_LINES), deque[str](maxlen=TAIL_LINES)

        def heard(line: str) -> None:
            out_tail.append(line)
            on_line(line)

        try:
            await asyncio.gather(_drain(process.stdout, log, heard), _drain(process.stderr, log, err_tail.append))
            code = await process.wait()
        finally:
            await _end_group(process)
    if code != 0:
        raise ProcessFailed(code, "\n".join(err_tail or out_tail), log_path)


async def _drain(stream: asyncio.StreamReader | None, log: BinaryIO, on_line: Callable[[str], None]) -> None:
    """Copy a stream to the log, and give its lines, cut at MAX_LINE characters."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    line, n_dropped = "", 0
    while stream is not None and (piece := await stream.read(1 << 16)):
        log.write(piece)
        log.flush()
        *ended, rest = decoder.decode(piece).split("\n")
        for part in ended:
            _give(line + part[: MAX_LINE - len(line)], n_dropped + max(0, len(line) + len(part) - MAX_LINE), on_line)
            line, n_dropped = "", 0
        n_dropped += max(0, len(line) + len(rest) - MAX_LINE)
        line += rest[: MAX_LINE - len(line)]
    if line:
        _give(line, n_dropped, on_line)


def _give(line: str, n_dropped: int, on_line: Callable[[str], None]) -> None:
    on_line(f"{line} … ({n_dropped} more characters)" if n_dropped else line.rstrip("\r"))


async def _end_group(process: asyncio.subprocess.Process) -> None:
    """End what is left of the process group: politely first, then for good."""
    for number, patience in ((signal.SIGTERM, SECONDS_TO_END), (signal.SIGKILL, None)):
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), patience)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # children that outlived the script itself
        os.killpg(process.pid, signal.SIGKILL)
