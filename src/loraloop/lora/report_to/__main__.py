"""The reporting process: `python -m loraloop.lora.report_to SERVICE`, which hears lines on its standard input.

It ends when they do. A line that says how the run ended is told to the service; without one, whoever sent them died, and the run is
`interrupted`. Whatever a service prints goes where the standard output leads, a log. It never outlives its input by more than
SECONDS_TO_END, whatever a service waits for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import importlib
import os
import sys
import threading
import time
import traceback
from queue import Empty, SimpleQueue

from loraloop.lora.report_to.figures import Figures
from loraloop.lora.report_to.messages import INTERRUPTED, REPORTERS, Message, Opening, Service

SECONDS_TO_END = 60.0
SECONDS_TO_GATHER = 1.0


def main(name: str) -> None:
    """Report one run to the service `name`; raises what the service raises."""
    lines: SimpleQueue[bytes | None] = SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    first = lines.get()
    if first is None:
        return
    opening = Opening.model_validate_json(first)
    fcntl.flock(sys.stdout, fcntl.LOCK_EX)  # the run's log: what reported it before may still be ending
    service: Service = importlib.import_module(f"loraloop.lora.report_to.{name}").open_service(opening)
    _report(service, lines)


def _listen(lines: SimpleQueue[bytes | None]) -> None:
    """Take lines as they come, also while the service waits for something; None is the end. What is no whole line has no sender any more.

    Not by sys.stdin, whose lock a thread must not hold when Python ends.
    """
    rest = b""
    while piece := os.read(0, 1 << 16):
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            lines.put(line)
    faulthandler.dump_traceback_later(SECONDS_TO_END, exit=True)
    lines.put(None)


def _report(service: Service, lines: SimpleQueue[bytes | None]) -> None:
    figures = Figures(service.logged)
    state, ended = INTERRUPTED, False
    while not ended:
        batch = _gather(lines)
        ended = batch[-1] is None
        messages = [Message.model_validate_json(line) for line in batch if line is not None]
        new = [figure for message in messages for figure in figures.of(message)]
        if new:
            service.log(new)
        state = next((message.state for message in reversed(messages) if message.state is not None), state)
    service.close(state)


def _gather(lines: SimpleQueue[bytes | None]) -> list[bytes | None]:
    """What comes within a second, so that a service is asked once for many quick steps; the end is not waited for."""
    batch = [lines.get()]
    until = time.monotonic() + SECONDS_TO_GATHER
    while batch[-1] is not None and (left := until - time.monotonic()) > 0:
        with contextlib.suppress(Empty):
            batch.append(lines.get(timeout=left))
    while batch[-1] is not None and not lines.empty():
        batch.append(lines.get())
    return batch


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in REPORTERS:
        sys.exit(f"expected one of {', '.join(REPORTERS)}; this is started by loraloop itself")
    try:
        main(sys.argv[1])
    except Exception:  # noqa: BLE001  whatever a service raises ends the report, and is the last word in its log
        traceback.print_exc()
        os._exit(1)  # what a service does at exit would write behind it
