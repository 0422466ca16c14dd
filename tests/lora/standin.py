"""Stand-in training scripts, and looks at the processes that they start."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from loraloop.lora.trainer import LoraTrainer

READ_ARGUMENTS = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
data, output = Path(arguments["--data"]), Path(arguments["--output"])
"""
WRITE_ADAPTER = """
output.mkdir(parents=True)
(output / "adapter.bin").write_text("weights")
"""

MakeTrainer = Callable[..., LoraTrainer]
"""script, episodes, options and settings -> a trainer; see the fixture."""


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 20) -> None:
    """Return as soon as `holds()`; fail with `what` when it does not in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return not Path("/proc/self").exists() and _answers(pid)


def _answers(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False
