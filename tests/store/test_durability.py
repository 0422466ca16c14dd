"""What was acknowledged is there: after kills at any instant, faults of the disk, and with several processes at one file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loraloop.store.sql import SqlEpisodeStore

_KILLED = """
import json, os, random, signal, sys, time
from loraloop.store import sqlite
from loraloop.store.sql import SqlEpisodeStore
from loraloop.testing import make_episode

sqlite.LOG_BYTES = 200_000  # so that kills meet writing back, too
path, log, n_rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
draw = random.Random(0)

def write(seed):
    rounds = random.Random(seed)
    ledger = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with SqlEpisodeStore(path) as store:
        while True:
            text = rounds.randbytes(rounds.choice((50, 2_000, 20_000))).hex()
            policy = {"role": "system", "content": "Ask first. " * 100}
            batch = [make_episode(messages=[policy, {"role": "user", "content": f"{n} {text}"}]) for n in range(3)]
            store.append_many(batch)
            os.write(ledger, b"".join(b"%s\\n" % str(episode.id).encode() for episode in batch))

for number in range(n_rounds):
    before = os.path.getsize(log) if os.path.exists(log) else 0
    child = os.fork()
    if child == 0:
        write(number)
    while not os.path.exists(log) or os.path.getsize(log) == before:
        time.sleep(0.001)
    time.sleep(draw.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_fifty_kills_lose_nothing_that_was_acknowledged_and_tear_nothing(tmp_path: Path) -> None:
    path, log, n_rounds = tmp_path / "episodes.db", tmp_path / "acknowledged", 50
    subprocess.run([sys.executable, "-c", _KILLED, path, log, str(n_rounds)], check=True, timeout=120)
    acknowledged = log.read_text().split()
    with SqlEpisodeStore(path) as store:
        kept = [(str(episode.id), episode.messages[1].content) for episode in store.iter_episodes()]
        with store._database.connecting() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
            used = {
                bytes(keys[n : n + 16])
                for (keys,) in connection.exec_driver_sql("SELECT blob_keys FROM episodes")
                for n in range(0, len(keys), 16)
            }
            there = {bytes(key) for (key,) in connection.exec_driver_sql("SELECT key FROM blobs")}
    ids = {each for each, _ in kept}
    assert len(acknowledged) == len(set(acknowledged)) >= 3 * n_rounds
    assert set(acknowledged) <= ids, "lost"
    assert len(ids) == len(kept) <= len(acknowledged) + 3 * n_rounds, "one batch a round may be unacknowledged"
    assert len(kept) % 3 == 0, "all or none of a batch"
    assert used == there, "no blob is missing, and none is left of a batch that was not stored"


_FAULTS = """
import sys
from loraloop.errors import StoreError
from loraloop.store.sql import SqlEpisodeStore
from loraloop.testing import make_episode
store = SqlEpisodeStore(sys.argv[1])
for number in range(10):
    try:
        store.append(episode := make_episode(messages=[{"role": "user", "content": f"{number} " * 5_000}]))
        print(episode.id, flush=True)
    except StoreError as error:
        print(f"error: {error}", flush=True)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize(
    "rule",
    [
        "fsync,fdatasync:error=EIO:when=1",
        "fsync,fdatasync:error=EIO:when=3",
        "fsync,fdatasync:error=EIO:when=5+",
        "pwrite64:error=EIO:when=9",
        "pwrite64:error=ENOSPC:when=10+",
        "pwrite64:error=ENOSPC:when=25+",
    ],
)
def test_faults_of_the_disk_are_told_and_lose_nothing(tmp_path: Path, rule: str) -> None:
    path = tmp_path / "episodes.db"
    SqlEpisodeStore(path).close()
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={rule.split(':', maxsplit=1)[0]}", "-e", f"inject={rule}"]
    done = subprocess.run([*strace, sys.executable, "-c", _FAULTS, path], capture_output=True, text=True, timeout=120)
    if "Operation not permitted" in done.stderr:
        pytest.skip("strace may not trace processes here")
    lines = done.stdout.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    acknowledged = [line for line in lines if not line.startswith("error: ")]
    assert errors, f"{rule}: the fault was met: {done.stderr[-500:]}"
    assert str(path) in errors[0]
    if "ENOSPC" in rule:
        assert "the disk is full" in errors[0]
    else:
        assert "reports an error" in errors[0]
        assert all("open the store again" in error for error in errors)
        assert lines.index(errors[0]) == len(acknowledged), "nothing is acknowledged after a sync or a write that failed"
    with SqlEpisodeStore(path) as store:
        kept = [str(episode.id) for episode in store.iter_episodes()]
    assert set(acknowledged) <= set(kept)
    assert len(kept) <= len(acknowledged) + 1


_WRITER = """
import sys
from loraloop.store import sqlite
from loraloop.store.sql import SqlEpisodeStore
from loraloop.testing import make_episode
sqlite.LOG_BYTES = 100_000
policy = {"role": "system", "content": "Ask before you do it. " * 100}
print("ready", flush=True)
sys.stdin.readline()
with SqlEpisodeStore(sys.argv[1]) as store:
    for number in range(40):
        question = {"role": "user", "content": f"{number} " * 500}
        batch = [make_episode(messages=[policy, question]) for _ in range(3)]
        shared = make_episode(id=f"shared-{number}", metadata={"created_at": 1})
        added = store.append_many([*batch, shared])
        print(*(episode.id for episode in batch), added[3], flush=True)
        store.count()
"""


def test_four_processes_write_to_one_file_and_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    path = tmp_path / "episodes.db"
    command = [sys.executable, "-c", _WRITER, path]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
    for process in processes:
        process.stdin.close()  # now all at once, the file is made too
    ids, firsts = [], 0
    for process in processes:
        with process.stdout as lines:
            for line in lines:
                *new, is_first = line.split()
                ids += new
                firsts += is_first == "True"
        assert process.wait() == 0
    assert len(ids) == len(set(ids)) == 4 * 40 * 3
    assert firsts == 40
    with SqlEpisodeStore(path) as store:
        assert sorted(episode.id for episode in store.iter_episodes()) == sorted([*ids, *(f"shared-{number}" for number in range(40))])
        with store._database.connecting() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM blobs").scalar_one() == 41
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_only_the_writer_writes_pages_back(tmp_path: Path) -> None:
    """SQLite before 3.51.3 can damage a file when two connections do so at one instant."""
    with SqlEpisodeStore(tmp_path / "episodes.db") as store, store._database.connecting() as one, store._database.connecting() as other:
        assert [connection.exec_driver_sql("PRAGMA wal_autocheckpoint").scalar_one() for connection in (one, other)] == [0, 0]


def test_the_log_is_written_back_when_it_has_grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    from loraloop.store import sqlite
    from loraloop.testing import make_episode

    monkeypatch.setattr(sqlite, "LOG_BYTES", 300_000)
    log = tmp_path / "episodes.db-wal"
    sizes = []
    with SqlEpisodeStore(tmp_path / "episodes.db") as store:
        for _ in range(30):
            store.append(make_episode(messages=[{"role": "user", "content": random.randbytes(20_000).hex()}]))
            sizes.append(log.stat().st_size)
    assert max(sizes) < 300_000 + 200_000
    assert sizes.count(0) >= 2, json.dumps(sizes)
