"""Which files are read, and how packed ones are: by name, pattern, folder and standard input; bounded, and under their own names."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import zstandard

from loraloop import pipeline
from loraloop.errors import ImportFailed
from loraloop.importers import unpacking
from loraloop.importers.ingest import SIDE_FILE, ingest_file
from loraloop.importers.sources import search

ROW = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "b"}]}\n'


def rows(*words):
    return "".join(ROW % word for word in words)


def names(paths):
    return [found.path.name for found in search(paths)]


def zst(data):
    return zstandard.ZstdCompressor().compress(data)


PACKERS = {".gz": gzip.compress, ".zst": zst}


def test_patterns_are_expanded(tmp_path):
    for name in ("a/1.jsonl", "a/deep/er/2.jsonl", "a/3.json", "b/4.jsonl", "a/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert names([tmp_path / "a/**/*.jsonl"]) == ["1.jsonl", "2.jsonl"]
    assert names([tmp_path / "*/[13].json*"]) == ["1.jsonl", "3.json"]
    assert names([tmp_path / "?"]) == ["1.jsonl", "3.json", "2.jsonl", "4.jsonl"]  # folders that fit are searched
    with pytest.raises(ImportFailed, match=r"no file fits this pattern"):
        search([tmp_path / "*.traj"])
    (tmp_path / "run[1].jsonl").touch()
    assert names([tmp_path / "run[1].jsonl"]) == ["run[1].jsonl"]  # a name first of all


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files_give_the_episodes_of_the_plain_ones(store, tmp_path, fixtures, suffix):
    for path in (next(fixtures.glob("intercode/*.json")), fixtures / "openai" / "accepted.jsonl"):
        plain = ingest_file(store, path)
        packed = tmp_path / (path.name + suffix)
        packed.write_bytes(PACKERS[suffix](path.read_bytes()))
        again = ingest_file(store, packed)
        assert plain.stored > 0
        assert (again.stored, again.duplicates, again.format) == (0, plain.stored, plain.format)
    assert [path.suffix for path in tmp_path.iterdir()] == [suffix] * 2
    assert names([tmp_path]) == sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("suffix", PACKERS)
def test_refusals_name_the_packed_file(store, tmp_path, suffix):
    path = tmp_path / f"runs.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix]((rows("a") + "broken\n").encode()))
    report = ingest_file(store, path)
    assert report.path == str(path)
    assert report.refusals[0].detail.startswith(f"{path}, line 2: found no JSON")
    path.write_bytes(PACKERS[suffix](b"{}"))
    with pytest.raises(ImportFailed) as failed:
        ingest_file(store, path)
    assert str(failed.value).startswith(f"{path}: no known format fits")
    assert "loraloop-" not in str(failed.value)


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_packed_file_that_breaks_off_is_read_to_there(store, tmp_path, suffix):
    path = tmp_path / f"runs.jsonl{suffix}"
    data = "".join(ROW % os.urandom(400).hex() for _ in range(300)).encode()
    path.write_bytes(PACKERS[suffix](data)[:-2000])
    report = ingest_file(store, path)
    assert report.stored > 10
    assert report.refused["bad_archive"] == 1
    assert f"{path}: found a packed file that breaks off" in report.refusals[-1].detail


def test_frames_of_zstd_follow_one_another(store, tmp_path):
    path = tmp_path / "runs.jsonl.zst"
    path.write_bytes(zst(rows("a").encode()) + zst(rows("b").encode()))
    assert ingest_file(store, path).stored == 2


@pytest.mark.parametrize("suffix", PACKERS)
def test_bombs_are_refused_by_name_and_fill_no_disk(store, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(unpacking, "FREE_BYTES", 1 << 20)
    monkeypatch.setattr(unpacking.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    path = tmp_path / f"bomb.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](b" " * (200 << 20)))
    with pytest.raises(ImportFailed, match=r"bomb.*found more than \d+ bytes in it") as failed:
        ingest_file(store, path)
    assert failed.value.reason == "too_large"
    assert not list((tmp_path / "tmp").iterdir())


def test_what_lies_beside_a_packed_run_still_tells_its_outcome(store, tmp_path):
    trial = tmp_path / "trial-1"
    (trial / "agent").mkdir(parents=True)
    step = {"step_id": 1, "source": "agent", "message": "done"}
    run = {"schema_version": "ATIF-v1.4", "session_id": "s", "agent": {"name": "a", "version": "1"}, "steps": [step]}
    (trial / "agent" / "trajectory.json.gz").write_bytes(gzip.compress(json.dumps(run).encode()))
    (trial / "result.json").write_text(
        json.dumps({"trial_name": "trial-1", "task_name": "t", "verifier_result": {"rewards": {"reward": 1}}})
    )
    ingest_file(store, trial / "agent" / "trajectory.json.gz")
    (episode,) = store.query()
    assert (episode.task_id, episode.outcome.is_success) == ("t", True)


def test_unpacking_never_writes_through_a_link(store, tmp_path):
    (tmp_path / "results.json").write_text('{"resolved": []}')
    (tmp_path / "results.json.gz").write_bytes(gzip.compress(rows("a").encode()))
    assert ingest_file(store, tmp_path / "results.json.gz").stored == 1
    assert (tmp_path / "results.json").read_text() == '{"resolved": []}'


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zst])
def test_standard_input_is_read(store, monkeypatch, pack):
    stream = io.TextIOWrapper(io.BytesIO(pack((rows("a") + "broken\n").encode())))
    monkeypatch.setattr(sys, "stdin", stream)
    (report,) = pipeline.ingest(store, [Path("-")])
    assert (report.path, report.format, report.stored, report.refused) == ("standard input", "openai", 1, {"bad_json": 1})
    assert report.refusals[0].detail.startswith("standard input, line 2: ")


def test_links_out_of_a_searched_folder_are_told_and_not_followed(store, tmp_path):
    inside, outside = tmp_path / "runs", tmp_path / "secret"
    inside.mkdir()
    outside.mkdir()
    (outside / "a.jsonl").write_text(rows("secret"))
    (inside / "b.jsonl").write_text(rows("own"))
    (inside / "again.jsonl").symlink_to(inside / "b.jsonl")
    (inside / "out.jsonl").symlink_to(outside / "a.jsonl")
    (inside / "folder").symlink_to(outside)
    (inside / "round").symlink_to(inside)
    for paths in ([inside], [inside / "**/*"]):
        reports = {Path(report.path).name: report for report in pipeline.ingest(store, paths)}
        assert reports["out.jsonl"].refused == reports["folder"].refused == {"outside_folder": 1}
        assert "name it itself if it is meant" in reports["out.jsonl"].refusals[0].detail
        assert {episode.messages[0].content for episode in store.query()} == {"own"}
    (named,) = pipeline.ingest(store, [inside / "out.jsonl"])  # named, it is meant
    assert named.stored == 1


def test_pipes_and_devices_are_never_opened(store, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "b.jsonl").write_text(rows("own"))
    by_name = {Path(report.path).name: report.refused for report in pipeline.ingest(store, [tmp_path])}
    assert by_name == {"b.jsonl": {}, "pipe.jsonl": {"not_a_file": 1}}
    with pytest.raises(ImportFailed, match=r"/dev/zero: found no regular file.*loraloop ingest -"):
        list(pipeline.ingest(store, [Path("/dev/zero")]))


def test_what_harnesses_write_beside_runs_is_left_aside_and_counted(store, tmp_path, fixtures):
    shutil.copy(fixtures / "openai" / "accepted.jsonl", tmp_path / "a.jsonl")
    (tmp_path / "result.json").write_text('{"trial_name": "x"}')
    (tmp_path / "other.json").write_text('{"trial_name": "x"}')
    shutil.copy(fixtures / "openai" / "accepted.jsonl", tmp_path / "results.json")  # a run, whatever its name
    reports = {Path(report.path).name: report for report in pipeline.ingest(store, [tmp_path])}
    assert (reports["result.json"].format, reports["result.json"].read) == (SIDE_FILE, 0)
    assert reports["other.json"].refused == {"unreadable_file": 1}
    assert (reports["results.json"].format, reports["results.json"].duplicates) == ("openai", 6)
    with pytest.raises(ImportFailed, match="no known format fits"):
        list(pipeline.ingest(store, [tmp_path / "result.json"]))  # named, it is meant
