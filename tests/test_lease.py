"""A lease has one living holder: whom the dead held it from, how a living one is told, what a heartbeat decides."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraloop import lease as module
from loraloop.errors import LeaseHeld
from loraloop.lease import Lease, read_holder, start_time, this_machine


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "leases" / "cpu.json"


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def write(path: Path, **changes: Any) -> None:
    """A lease as somebody else wrote it: this very process on this machine unless told otherwise."""
    me = (os.getpid(), start_time(os.getpid()))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"what": "another", "processes": [me], "machine": this_machine(), "beat": time.time(), **changes}))


def test_what_a_living_process_holds_is_refused_with_its_name(path: Path, other: subprocess.Popen[bytes]) -> None:
    write(path, processes=[(other.pid, start_time(other.pid))], beat=0)
    with pytest.raises(LeaseHeld, match=rf"another \(process {other.pid}\)"):
        Lease(path).acquire("mine")
    os.kill(other.pid, signal.SIGSTOP)
    with pytest.raises(LeaseHeld):
        Lease(path).acquire("mine, as it does nothing")


def test_what_a_dead_process_held_is_taken_over_also_before_it_is_collected(path: Path, other: subprocess.Popen[bytes]) -> None:
    write(path, processes=[(other.pid, start_time(other.pid))])
    other.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while start_time(other.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    Lease(path).acquire("mine")
    holder = read_holder(path)
    assert holder is not None
    assert (holder.what, [pid for pid, _ in holder.processes]) == ("mine", [os.getpid()])


def test_a_process_that_only_has_the_same_id_holds_nothing(path: Path) -> None:
    write(path, processes=[(os.getpid(), (start_time(os.getpid()) or 0) + 1)])
    Lease(path).acquire("mine")


def test_on_another_machine_and_before_the_last_boot_the_heartbeat_decides(path: Path) -> None:
    write(path, machine="elsewhere 1")
    with pytest.raises(LeaseHeld):
        Lease(path).acquire("mine")
    write(path, machine="elsewhere 1", beat=time.time() - module.STALE_SECONDS - 1)
    Lease(path).acquire("mine")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"what": 1, "processes": []}', '{"processes": [["x", 1]]}'])
def test_a_file_that_no_lease_wrote_is_no_lease(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    Lease(path).acquire("mine")


def test_it_is_held_until_all_that_hold_it_together_have_ended(path: Path, other: subprocess.Popen[bytes]) -> None:
    write(path, processes=[(other.pid, (start_time(other.pid) or 0) + 5), (other.pid, start_time(other.pid))])
    with pytest.raises(LeaseHeld):
        Lease(path).acquire("mine")


def test_a_process_may_join_what_is_held(path: Path, other: subprocess.Popen[bytes]) -> None:
    mine = Lease(path)
    mine.acquire("mine")
    Lease(path).join(other.pid)
    holder = read_holder(path)
    assert holder is not None
    assert [pid for pid, _ in holder.processes] == [os.getpid(), other.pid]
    mine.beat()
    mine.release()
    assert not path.exists()
    with pytest.raises(LeaseHeld, match="nobody"):
        Lease(path).join(other.pid)


def test_heartbeats_go_on_while_it_is_kept_and_tell_when_it_is_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    lost: list[str] = []
    lease = Lease(path)
    lease.acquire("mine")
    first = read_holder(path)
    with lease.kept(lost.append):
        deadline = time.monotonic() + 5
        while read_holder(path) == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read_holder(path) != first
        write(path, processes=[(1, 1.0)], what="a thief")
        while not lost and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lost == ["a thief (process 1)"]
    assert path.exists(), "what another holds by now is not given back"


def test_many_processes_at_once_and_one_gets_it(path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from loraloop.errors import LeaseHeld
from loraloop.lease import Lease
try:
    Lease(Path({str(path)!r})).acquire("one of many")
except LeaseHeld:
    sys.exit(3)
time.sleep(2)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(6)]
    assert sorted(process.wait() for process in processes) == [0, 3, 3, 3, 3, 3]
