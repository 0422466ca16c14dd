"""Damaged files: whatever is broken in a file, an importer gives episodes and refusals, or says that it cannot read the file."""

from __future__ import annotations

import copy
import json
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraloop.episode import Episode
from loraloop.errors import ImportFailed
from loraloop.importers.ingest import detect, iter_files
from loraloop.plugins import find, list_names
from loraloop.store.memory import to_body
from loraloop.training_data import Refusal

STRANGE = [None, True, 0, -1, 2.5, 1e400, "", "x", "[]", "a\0b", "\ud800", [], {}, [[]], [None], {"role": 1}, {"type": "image"}, 10**400]


def places(value):
    """Every list and object inside `value` with each of its keys, in an order that is always the same."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        for key in keys:
            yield item, key
            waiting.append(item[key])


def mutate(document, data):
    changed = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        found = list(places(changed))
        if not found:
            break
        item, key = found[data.draw(st.integers(0, len(found) - 1))]
        what = data.draw(st.sampled_from(["replace", "remove", "repeat"]))
        if what == "remove":
            del item[key]
        elif what == "repeat" and isinstance(item, list):
            item.insert(key, item[key])
        else:
            item[key] = copy.deepcopy(data.draw(st.sampled_from(STRANGE)))
    return changed


def damage(path, data):
    raw = path.read_bytes()
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(raw) - 1))
        return raw[:at] if data.draw(st.booleans()) else raw[:at] + bytes([data.draw(st.integers(0, 255))]) + raw[at + 1 :]
    try:
        return json.dumps(mutate(json.loads(raw), data)).encode()
    except ValueError:
        lines = raw.splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    try:
        lines[number] = json.dumps(mutate(json.loads(lines[number]), data)).encode()
    except ValueError:
        lines[number] = b"{"
    return b"\n".join(lines)


def read_all(importer, path):
    """What an importer gives; nothing when it says that the file as a whole cannot be read, and which file that is."""
    try:
        return list(importer.read(path))
    except ImportFailed as error:
        message = str(error)
    assert str(path) in message
    return []


@pytest.mark.parametrize("name", list_names("importers"))
def test_a_damaged_file_gives_episodes_and_refusals_or_cannot_be_read(fixtures, tmp_path, name):
    files = iter_files([fixtures / name.replace("-", "_")])

    @settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        path = files[data.draw(st.integers(0, len(files) - 1))]
        damaged = tmp_path / path.name
        damaged.write_bytes(damage(path, data))
        for entry in read_all(find("importers", name)(), damaged):
            assert isinstance(entry, Episode | Refusal)
            if isinstance(entry, Episode):
                assert to_body(entry)
            else:
                assert all(mark in entry.detail for mark in (": found ", "; expected ", "; do this: "))
        with suppress(ImportFailed):  # a damaged beginning may be of no format, or of several
            detect(damaged)

    check()


@pytest.mark.parametrize("name", list_names("importers"))
def test_an_object_where_none_belongs_is_no_crash_wherever_it_is(fixtures, tmp_path, name):
    """Every single value of every fixture in turn: an object cannot be looked up in a set, where a name can."""
    for path in iter_files([fixtures / name.replace("-", "_")]):
        raw = path.read_text()
        whole = load_or_none(raw)
        documents = [whole] if whole is not None else [line for line in map(load_or_none, raw.splitlines()) if line is not None]
        for document in documents:
            for item, key in list(places(document)):
                kept = item[key]
                if isinstance(kept, dict | list):
                    continue
                item[key] = {"a": 1}
                damaged = tmp_path / path.name
                damaged.write_text(json.dumps(document))
                item[key] = kept
                assert all(isinstance(entry, Episode | Refusal) for entry in read_all(find("importers", name)(), damaged))


def load_or_none(line):
    try:
        return json.loads(line)
    except ValueError:
        return None
