"""Every importer keeps the promises of plugins.Importer, and every refusal has its reason."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from loraloop.episode import Episode
from loraloop.importers.ingest import detect, ingest_file, iter_files
from loraloop.plugins import find, list_names
from loraloop.testing import check_importer
from loraloop.training_data import Refusal

FOLDERS = {name: name.replace("-", "_") for name in list_names("importers")}


def files_of(fixtures, name):
    return iter_files([fixtures / FOLDERS[name]])


@pytest.mark.parametrize("name", list_names("importers"))
def test_every_importer_keeps_what_it_promises(fixtures, name):
    others = [path for other in FOLDERS if other != name for path in files_of(fixtures, other)]
    assert others
    check_importer(find("importers", name)(), files_of(fixtures, name), others)


@pytest.mark.parametrize("name", [name for name in list_names("importers") if name != "swe-agent"])
def test_every_refusal_has_the_reason_that_its_case_names(fixtures, name):
    refused = [path for path in files_of(fixtures, name) if path.stem == "refused"]
    assert len(refused) == 1
    text = refused[0].read_text()
    cases = re.findall(r'(?:"case": |\[)"(\w+): ', text)
    entries = list(find("importers", name)().read(refused[0]))
    assert [getattr(entry, "reason", entry) for entry in entries] == cases


def test_a_directory_of_all_formats_is_read_whole_and_twice_without_effect(fixtures, store):
    first = [ingest_file(store, path) for path in iter_files([fixtures])]
    assert {report.format for report in first} == set(list_names("importers"))
    assert all(report.read == report.stored + report.duplicates + sum(report.refused.values()) for report in first)
    n_stored = store.count()
    assert n_stored == sum(report.stored for report in first)
    again = [ingest_file(store, path) for path in iter_files([fixtures])]
    assert sum(report.stored for report in again) == 0
    assert store.count() == n_stored


@pytest.mark.parametrize("name", list_names("importers"))
def test_a_copy_in_another_directory_gives_the_same_episodes(fixtures, tmp_path, name):
    for path in files_of(fixtures, name):
        if "demonstrations" in path.parts:  # SWE-agent keeps its examples there: this directory says something
            continue
        copy = shutil.copy(path, tmp_path / path.name)
        importer = find("importers", name)()
        assert [getattr(entry, "id", None) for entry in importer.read(copy)] == [
            getattr(entry, "id", None) for entry in importer.read(path)
        ]


def test_ids_do_not_depend_on_the_hash_seed(fixtures):
    code = (
        "import sys; from pathlib import Path; from loraloop.importers.ingest import detect, iter_files\n"
        "for path in iter_files([Path(sys.argv[1])]):\n"
        "    print(*(getattr(entry, 'id', entry) for entry in detect(path).read(path)))"
    )
    command = [sys.executable, "-c", code, str(fixtures)]
    seen = {subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout for seed in "12"}
    assert len(seen) == 1


def test_ground_truth_is_never_stored(fixtures):
    n_with_truth = 0
    for path in iter_files([fixtures]):
        n_with_truth += "GROUND TRUTH" in path.read_text()
        assert "GROUND TRUTH" not in "".join(entry.model_dump_json() for entry in detect(path).read(path))
    assert n_with_truth >= 5


class _Renamed:
    """tau-bench's importer with one promise broken."""

    name = "tau-bench"
    description = "x"

    def __init__(self, **broken):
        self.real = find("importers", "tau-bench")()
        self.broken = broken

    def detect(self, path, head):
        return self.broken.get("detect", self.real.detect(path, head))

    def count(self, _path):
        return self.broken.get("count")

    def read(self, path):
        return map(self.broken.get("change", lambda entry: entry), self.real.read(path))


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ({"detect": False}, "recognises"),
        ({"detect": True}, "does not take"),
        ({"count": 3}, "count()"),
        ({"change": lambda entry: entry if isinstance(entry, Refusal) else Episode(messages=entry.messages)}, "again"),
        ({"change": lambda entry: entry.model_copy(update={"detail": "bad"}) if isinstance(entry, Refusal) else entry}, "found, expected"),
        ({"change": lambda entry: entry if isinstance(entry, Refusal) else entry.model_copy(update={"messages": ()})}, "has messages"),
    ],
)
def test_the_check_finds_a_broken_promise(fixtures, broken, complaint):
    own, others = files_of(fixtures, "tau-bench"), files_of(fixtures, "openai")
    check_importer(_Renamed(), own, others)
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        check_importer(_Renamed(**broken), own, others)


def test_fixtures_are_small_and_hand_written(fixtures):
    assert all(path.stat().st_size < 32_000 for path in iter_files([fixtures]))
    assert json.loads((fixtures / "alpaca" / "data.json").read_text())
