"""A long list inside an object is read element by element: the same values as all at once, in bounded memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloop.chat.refused_entry import EntryRefused
from loraloop.errors import ImportFailed
from loraloop.importers import json_input, json_list
from loraloop.importers.ingest import detect, iter_files
from loraloop.importers.json_list import iter_inside, read_around
from loraloop.plugins import find
from loraloop.store.text import to_body

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
RUN = {"task_id": 1, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "reward_info": {"reward": 1.0}}


def around(text, limit=1 << 20):
    return read_around(io.BytesIO(text.encode()), "list", limit)


def inside(text, limit=1 << 20):
    return list(iter_inside(io.BytesIO(text.encode()), "list", limit))


@pytest.fixture
def by_piece(monkeypatch):
    """Every document is a long one, read in pieces of a few bytes."""
    monkeypatch.setattr(json_input, "WHOLE_BYTES", 0)
    monkeypatch.setattr(json_list, "_PIECE", 64)
    monkeypatch.setattr(json_list, "_MAX_PIECE", 4096)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), st.lists(VALUES, max_size=4), st.integers(0, 4), st.integers(1, 40))
def test_an_object_around_a_list_is_that_of_the_whole(others, values, place, piece):
    members = list((others | {"list": None}).items())
    members = [member for member in members if member[0] != "list"]
    members.insert(min(place, len(members)), ("list", values))
    text = " \n" + json.dumps(dict(members), indent=piece % 3 or None, ensure_ascii=piece % 2 == 0) + "\n"
    before = json_list._PIECE, json_list._MAX_PIECE
    json_list._PIECE, json_list._MAX_PIECE = piece, piece * 3
    try:
        assert around(text) == (dict(members) | {"list": []}, None)
        assert list(around(text)[0]) == [name for name, _ in members]
        assert inside(text) == [(value, None) for value in values]
    finally:
        json_list._PIECE, json_list._MAX_PIECE = before


def test_an_object_that_breaks_off_keeps_what_came_before():
    text = '{"a": {"b": 1}, "list": [{"c": 1}, {"c": [2, "]"]}], "d": 3}'
    begin, end = text.index("["), text.index('], "d"') + 1
    for cut in range(1, len(text)):
        if cut <= begin:
            with pytest.raises(EntryRefused) as refused:
                around(text[:cut])
            assert refused.value.reason == "bad_json"
            continue
        found, problem = around(text[:cut])
        assert found["a"] == {"b": 1}
        assert problem.reason == "bad_json"
        values = [value for value, why in inside(text[:cut]) if why is None]
        assert values == [{"c": 1}, {"c": [2, "]"]}][: len(values)]
        if cut >= end:
            assert (len(values), found["list"]) == (2, [])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[1]", "no whole JSON object"),
        ('{"a" 1}', "no whole JSON object"),
        ("{1: 2}", "no whole JSON object"),
        ('{"a": 1 "list": []}', "no whole JSON object"),
        ('{"list": [], "a": 1} 2', "more behind the end"),
        ('{"list": [1], "list": [2]}', "a second `list`"),
    ],
)
def test_what_is_no_object_is_told(text, why):
    try:
        problem = around(text)[1]
    except EntryRefused as error:
        problem = error
    assert why in problem.found
    assert problem.reason == "bad_json"


@pytest.mark.parametrize("format_name", ["tau2", "inspect"])
def test_long_documents_are_read_as_short_ones_are(fixtures, by_piece, monkeypatch, format_name):
    def read(path):
        importer = find("importers", format_name)()
        return [
            to_body(entry.model_copy(update={"metadata": entry.metadata.model_copy(update={"created_at": 0})}))
            if hasattr(entry, "messages")
            else entry
            for entry in importer.read(path)
        ]

    paths = [path for path in iter_files([fixtures / format_name]) if path.suffix == ".json" and detect(path).name == format_name]
    assert paths
    for path in paths:
        long = read(path)
        with monkeypatch.context() as patch:
            patch.setattr(json_input, "WHOLE_BYTES", 1 << 30)
            assert read(path) == long


def test_a_long_document_that_breaks_off_gives_what_came_before(by_piece, write):
    text = json.dumps({"info": {}, "tasks": [], "simulations": [RUN, RUN | {"task_id": 2}]})
    read = lambda text: list(find("importers", "tau2")().read(write(text, "results.json")))  # noqa: E731  as short as it is used
    assert [entry.task_id for entry in read(text)] == ["1", "2"]
    first, problem = read(text[:-20])
    assert (first.task_id, problem.reason) == ("1", "bad_json")
    assert "results.json, entry 2: found no JSON" in problem.detail
    *both, problem = read(text[:-1])
    assert ([entry.task_id for entry in both], problem.reason) == (["1", "2"], "bad_json")
    assert "results.json, behind entry 2: found no whole JSON object" in problem.detail
    with pytest.raises(ImportFailed, match="expected one whole JSON document"):
        read(text[:20])


CHILD = """
import re, sys
from pathlib import Path
from loraloop.episode import Episode
from loraloop.importers.tau2 import Tau2Importer
n = sum(isinstance(entry, Episode) for entry in Tau2Importer().read(Path(sys.argv[1])))
print(n, int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_an_object_of_300_mb_is_read_in_constant_memory(tmp_path):
    """More than is read as a whole at all."""
    run = json.dumps(RUN | {"messages": [*RUN["messages"], {"role": "user", "content": "ä" * 50_000}]}, ensure_ascii=False)
    n_runs = 300_000_000 // len(run.encode())
    path = tmp_path / "results.json"
    with path.open("w") as file:
        file.write('{"info": {}, "tasks": [], "simulations": [' + run)
        for _ in range(n_runs - 1):
            file.write(", " + run)
        file.write("]}")
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True)
    n, peak_mib = map(int, done.stdout.split())
    print(f"{path.stat().st_size / 1e6:.0f} MB: {n} runs, peak {peak_mib} MiB")
    assert n == n_runs
    assert peak_mib < 300
