"""One holder at a time of what two must not use at once: a training device, a run's folder.

A lease is a small file that names the processes that hold it. It is free when it is not there, or when none of them lives any more: on
the same boot of the same machine by process id and start time (an id alone may be another's by now), elsewhere by a heartbeat that is
too old. So what a killed process held is taken over at once, and a process that is merely slow or stopped keeps what it has.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from loraloop.errors import LeaseHeld
from loraloop.files import locked_directory, remove_asides, write_atomic

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
"""Without a heartbeat for so long, a holder on another machine, or before the last boot, is taken for dead."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, as its file says."""

    what: str
    """In words, for whoever wants it too."""
    processes: tuple[tuple[int, float], ...]
    """(process id, start time) of those that hold it together."""
    machine: str
    """Name and boot of the machine that they run on."""
    beat: float
    """When it last said that it lives, in Unix seconds."""

    @property
    def is_alive(self) -> bool:
        """Whether it still holds the lease."""
        if self.machine == this_machine():
            return any(start_time(pid) == started for pid, started in self.processes)
        return abs(time.time() - self.beat) < STALE_SECONDS  # clocks differ, and are set

    def describe(self) -> str:
        """`what (process 12)`."""
        return f"{self.what} (process {', '.join(str(pid) for pid, _ in self.processes)})"


class Lease:
    """What the file at `path` stands for, held by this process from `acquire` to `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mine: Holder | None = None

    def acquire(self, what: str) -> None:
        """Hold it, taking over from the dead. Raises LeaseHeld, naming the holder, when it is another's."""
        with locked_directory(self.path.parent):
            there = read_holder(self.path)
            if there is not None and there.is_alive:
                raise LeaseHeld(there.describe())
            remove_asides(self.path)
            self._mine = Holder(what, (_this_process(),), this_machine(), time.time())
            self._write(self._mine)

    def join(self, pid: int) -> None:
        """Let `pid` hold what is held already, too: it stays held until that has ended as well. Raises LeaseHeld when nobody holds it."""
        with locked_directory(self.path.parent):
            there = read_holder(self.path)
            if there is None:
                raise LeaseHeld("nobody")
            started = start_time(pid)
            if started is not None:
                self._write(replace(there, processes=(*there.processes, (pid, started)), beat=time.time()))

    def beat(self) -> None:
        """Say that the holder lives. Raises LeaseHeld when somebody took it for dead and holds it now."""
        with locked_directory(self.path.parent):
            self._write(replace(self._check_mine(), beat=time.time()))

    def release(self) -> None:
        """Give it back; nothing when it is not held."""
        if self._mine is None:
            return
        with locked_directory(self.path.parent):
            with suppress(LeaseHeld):
                self._check_mine()
                self.path.unlink(missing_ok=True)
            self._mine = None

    @contextmanager
    def kept(self, on_lost: Callable[[str], None] = lambda _: None) -> Iterator[None]:
        """Keep what was acquired during the block, with heartbeats from a thread, then give it back.

        `on_lost` hears, in that thread, who took it meanwhile.
        """
        over = threading.Event()

        def keep() -> None:
            while not over.wait(BEAT_SECONDS):
                try:
                    self.beat()
                except LeaseHeld as error:
                    on_lost(str(error))
                    return
                except OSError:  # a full disk: the next beat may succeed, and on this machine nobody needs it
                    continue

        thread = threading.Thread(target=keep, name="loraloop-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            with suppress(OSError):
                self.release()

    def _check_mine(self) -> Holder:
        if self._mine is None:
            raise LeaseHeld("nobody: the lease was given back")
        there = read_holder(self.path)
        if there is None:  # whoever cleans up temporary files took it away
            return self._mine
        if there.machine != self._mine.machine or there.processes[0] != self._mine.processes[0]:
            raise LeaseHeld(there.describe())
        return there

    def _write(self, holder: Holder) -> None:
        text = {"what": holder.what, "processes": holder.processes, "machine": holder.machine, "beat": holder.beat}
        write_atomic(self.path, json.dumps(text), durable=False)  # a lease need not outlive a power cut


def lease_directory() -> Path:
    """Where leases on what belongs to the machine are: LORALOOP_LEASES, else a folder of this user's among the temporary files."""
    if own := os.environ.get("LORALOOP_LEASES"):
        return Path(own)
    return Path(tempfile.gettempdir()) / f"loraloop-{os.getuid()}" / "leases"


def read_holder(path: Path) -> Holder | None:
    """Who the lease's file names; None when there is no such file, or none that a lease wrote."""
    try:
        found = json.loads(path.read_bytes())
        processes = tuple((int(pid), float(started)) for pid, started in found["processes"])
        return Holder(str(found["what"]), processes, str(found["machine"]), float(found["beat"])) if processes else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def start_time(pid: int) -> float | None:
    """When process `pid` of this machine began, in units that only compare; None when there is none, or only its exit code is left."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None if Path("/proc/self/stat").exists() else _start_time_elsewhere(pid)
    return None if fields[0] in "ZX" else float(fields[19])


def this_machine() -> str:
    """The machine's name, and which of its boots this is."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{platform.node()} {boot}"


def _this_process() -> tuple[int, float]:
    return os.getpid(), start_time(os.getpid()) or 0.0


def _start_time_elsewhere(pid: int) -> float | None:
    """Where there is no /proc."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None
