"""Broken, hostile and huge input in one folder: every entry is kept or refused by name and place, in bounded memory, and nothing hangs."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loraloop import pipeline
from loraloop.store.memory import InMemoryEpisodeStore

MAX_PEAK_MIB = 300
"""What a process that ingests all of this may need at most: 64 MiB of text in several forms, and Python."""

CHILD = """
import json, re, sys
from pathlib import Path
from loraloop.project import Project
with Project(sys.argv[2]) as project:
    for report in project.ingest([Path(sys.argv[1])]):
        details = [refusal.detail for refusal in report.refusals]
        print(json.dumps([Path(report.path).name, report.stored, report.duplicates, report.refused, details]))
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def row(word="a", **more):
    return {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": "b"}], **more}


def run(n):
    return {"task_id": n, "reward": 1.0, "info": {}, "traj": row(f"task {n}")["messages"], "trial": 0}


def lines(*rows):
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in rows)


def nested(depth):
    return b'{"messages": ' + b"[" * depth + b"]" * depth + b"}"


LONG = b'{"messages": [{"role": "user", "content": "' + b"x" * 100_000_000 + b'"}]}'

CASES = {
    # name: (content, stored, duplicates, refused, what a detail must say)
    "good.jsonl": (lines(row("1"), row("2")), 2, 0, {}, ""),
    "other_format.json": (json.dumps([run(1), run(2)]).encode(), 2, 0, {}, ""),
    "truncated.jsonl": (lines(row("3")) + json.dumps(row("4")).encode()[:40], 1, 0, {"bad_json": 1}, "truncated.jsonl, line 2"),
    "truncated.json": (json.dumps([run(3), run(4)]).encode()[:-20], 1, 0, {"bad_json": 1}, "truncated.json, entry 2"),
    "latin1.jsonl": (
        lines(row("5"), '{"messages": "ä"}'.encode("latin-1"), row("6")),
        2,
        0,
        {"bad_encoding": 1},
        "line 2: found byte 0xe4",
    ),
    "latin1.json": (json.dumps([run(5)]).encode()[:-1] + b', "\xe4"]', 1, 0, {"bad_encoding": 1}, "entry 2: found byte 0xe4"),
    "utf16.jsonl": (json.dumps(row("7")).encode("utf-16"), 0, 0, {"unreadable_file": 1}, "no known format fits"),
    "nul.jsonl": (lines(row("8"), b'{"messages": "\0"}', row("9\0")), 1, 0, {"bad_encoding": 2}, "line 2: found a NUL byte at byte 15"),
    "deep.jsonl": (
        lines(row("10"), nested(100_000), nested(500), row("11", extra=json.loads("[" * 120 + "]" * 120))),
        1,
        0,
        {"bad_json": 1, "bad_shape": 2},
        "deep.jsonl, line 2",
    ),
    "deep.json": (b"[" + json.dumps(run(6)).encode() + b", " + b"[" * 100_000 + b"]" * 100_000 + b"]", 1, 0, {"bad_json": 1}, "entry 2"),
    "twice.jsonl": (lines(row("12"), row("12"), row("12", task_id=1)), 2, 1, {}, ""),
    "long.jsonl": (
        lines(row("13"), LONG, row("14")),
        2,
        0,
        {"too_large": 1},
        "long.jsonl, line 2: found an entry of more than 67108864 bytes",
    ),
    "long.json": (
        b"[" + json.dumps(run(7)).encode() + b", " + LONG + b", " + json.dumps(run(8)).encode() + b"]",
        2,
        0,
        {"too_large": 1},
        "long.json, entry 2: found an entry of more than 67108864 bytes",
    ),
    "bomb.jsonl.gz": (b"", 0, 0, {"too_large": 1}, "bomb.jsonl.gz: found more than 67108864 bytes"),
    "torn.jsonl.gz": (gzip.compress(lines(*(row(str(n)) for n in range(20, 24))))[:-6], 4, 0, {"bad_archive": 1}, "torn.jsonl.gz: found"),
    "numbers.jsonl": (lines(row("15"), b'{"messages": ' + b"9" * 5000 + b"}"), 1, 0, {"bad_json": 1}, "numbers.jsonl, line 2"),
    "binary.jsonl": (bytes(range(256)) * 50, 0, 0, {"unreadable_file": 1}, "no known format fits"),
}


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """(peak in MiB, seconds, name -> what became of the file) of one process that ingests the folder of all cases."""
    base = tmp_path_factory.mktemp("bad")
    folder = base / "runs"
    folder.mkdir()
    for name, (content, *_) in CASES.items():
        (folder / name).write_bytes(content)
    with gzip.open(folder / "bomb.jsonl.gz", "wb", compresslevel=9) as file:
        for _ in range(80):
            file.write(b" " * (1 << 20))
    started = time.monotonic()  # the child tells its own peak from /proc: ru_maxrss would begin at that of this process
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder), str(base / "p")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *reports, peak = [json.loads(line) for line in done.stdout.splitlines()]
    return peak, time.monotonic() - started, {name: said for name, *said in reports}


@pytest.mark.parametrize("name", CASES)
def test_what_is_broken_is_told_by_name_and_place_and_the_rest_kept(told, name):
    _, stored, duplicates, refused, detail = CASES[name]
    n_stored, n_duplicates, reasons, details = told[2][name]
    assert (n_stored, n_duplicates, reasons) == (stored, duplicates, refused), details
    assert detail in (details or [""])[0]
    assert all(len(text) < 1000 for text in details), "a message shows no more than a line of a huge value"


def test_memory_and_time_are_bounded(told):
    peak, seconds, _ = told
    print(f"peak {peak} MiB, {seconds:.1f} s")
    assert peak < MAX_PEAK_MIB
    assert seconds < 60


def test_the_bound_on_a_single_entry_is_what_keeps_memory_down(tmp_path, monkeypatch):
    """Without the limit the long line is held whole: the case can fail."""
    from loraloop.importers import json_input

    monkeypatch.setattr(json_input, "MAX_ENTRY_BYTES", 1 << 30)
    path = tmp_path / "long.jsonl"
    path.write_bytes(lines(row("13"), LONG, row("14")))
    (report,) = pipeline.ingest(InMemoryEpisodeStore(), [path])
    assert "too_large" not in report.refused
