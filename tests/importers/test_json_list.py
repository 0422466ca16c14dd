"""Long lists are read element by element: the same values as all at once, in bounded memory, and a fault costs what follows it only."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloop.errors import ImportFailed
from loraloop.importers import json_list
from loraloop.importers.ingest import ingest_file
from loraloop.importers.json_input import iter_entries
from loraloop.importers.json_list import iter_elements

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def read(text, limit=1 << 20):
    return list(iter_elements(io.BytesIO(text if isinstance(text, bytes) else text.encode()), limit))


@settings(max_examples=150, deadline=None)
@given(st.lists(VALUES, max_size=6), st.sampled_from([None, 1, 30]), st.integers(1, 40))
def test_elements_are_those_of_the_whole_list(values, indent, piece):
    text = json.dumps(values, indent=indent, ensure_ascii=piece % 2 == 0)
    before = json_list._PIECE, json_list._MAX_PIECE
    json_list._PIECE, json_list._MAX_PIECE = piece, piece * 3
    try:
        assert read("\ufeff \n" + text + " \n") == [(value, None) for value in values]
    finally:
        json_list._PIECE, json_list._MAX_PIECE = before


@pytest.mark.parametrize(
    ("text", "n_kept", "reason"),
    [
        ('[1, 2, {"a": ', 2, "bad_json"),
        ("[1, 2", 2, "bad_json"),
        ("[1, 2 3]", 2, "bad_json"),
        ("[1, 2] 3", 2, "bad_json"),
        ("[1,]", 1, "bad_json"),
        ('[1, {"a": tru}, 3]', 1, "bad_json"),
        (b'[1, "\xff", 3]', 1, "bad_encoding"),
        (b'[1, "\0", 3]', 1, "bad_encoding"),
        ("[1, " + "[" * 100_000, 1, "bad_json"),
        ("[1, " + "9" * 5000 + "]", 1, "bad_json"),
    ],
)
def test_what_comes_before_a_fault_is_kept(text, n_kept, reason):
    *kept, (value, problem) = read(text)
    assert [problem for _, problem in kept] == [None] * len(kept)
    assert (len(kept), value, problem.reason) == (n_kept, None, reason)


def test_an_element_beyond_the_limit_costs_itself_only(monkeypatch):
    monkeypatch.setattr(json_list, "_PIECE", 64)
    monkeypatch.setattr(json_list, "_MAX_PIECE", 128)
    long = {"a": '\\" ] } , [' * 100, "b": [[{}], ["x" * 1000]]}
    found = read(json.dumps([1, long, "x" * 1001, 2, list(range(1000)), {"c": 3}]), limit=500)
    assert [value for value, _ in found] == [1, None, None, 2, None, {"c": 3}]
    assert [problem.reason for _, problem in found if problem] == ["too_large"] * 3


def test_a_list_that_breaks_off_keeps_its_beginning(store, write):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    report = ingest_file(store, write(json.dumps([row, row | {"task_id": 1}], indent=1)[:-30], "runs.json"))
    assert (report.read, report.stored, report.refused) == (2, 1, {"bad_json": 1})
    assert "runs.json, entry 2: found no JSON (" in report.refusals[0].detail
    with pytest.raises(ImportFailed, match="expected one whole JSON document"):
        list(iter_entries(write("[\n  {'a': 1}]", "no.json")))


CHILD = """
import re, sys, time
from pathlib import Path
from loraloop.importers.tau_bench import TauBenchImporter
started = time.monotonic()
n = sum(1 for _ in TauBenchImporter().read(Path(sys.argv[1])))
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
print(n, peak, time.monotonic() - started)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_a_list_of_200_mb_is_read_in_constant_memory(tmp_path):
    turns = [
        {"role": "system", "content": "p" * 6000},
        {"role": "user", "content": "u" * 3000},
        {"role": "assistant", "content": "ä" * 5000},
    ]
    run = json.dumps({"task_id": 1, "reward": 1.0, "info": {}, "traj": turns * 3, "trial": 0}, ensure_ascii=False)
    path = tmp_path / "results.json"
    with path.open("w") as file:
        file.write("[" + run)
        for _ in range(200_000_000 // len(run.encode())):
            file.write(", " + run)
        file.write("]")
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True)
    n, peak_mib, seconds = done.stdout.split()
    print(f"{path.stat().st_size / 1e6:.0f} MB: {n} runs, peak {peak_mib} MiB, {float(seconds):.1f} s")
    assert int(n) == 200_000_000 // len(run.encode()) + 1
    assert int(peak_mib) < 300
    assert time.monotonic() - started < 20
