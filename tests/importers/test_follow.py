"""Growing files: nothing is lost, torn or read twice, whatever the writer does, and whenever the reader is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from loraloop.errors import ImportFailed
from loraloop.importers import follow
from loraloop.importers.follow import Follower
from loraloop.store.sql import SqlEpisodeStore

WRITER = """
import sys, time
row = '{"messages": [{"role": "user", "content": "%d"}, {"role": "assistant", "content": "b"}]}\\n'
number, ends_at = 0, time.monotonic() + 60
with open(sys.argv[1], "ab", buffering=0) as file:
    while time.monotonic() < ends_at :
        line = (row % number).encode()
        file.write(line[:20])
        time.sleep(0.01)
        file.write(line[20:])
        number += 1
"""


def row(word):
    turns = [{"role": "user", "content": word}, {"role": "assistant", "content": "b"}]
    return json.dumps({"messages": turns}) + "\n"


def said(store):
    return sorted(episode.messages[0].content for episode in store.query())


@pytest.fixture
def follower(store, tmp_path):
    (tmp_path / "runs").mkdir()
    made = []

    def make(*names):
        made.append(Follower(store, [tmp_path / "runs" / name for name in names] or [tmp_path / "runs"], tmp_path / "followed.json"))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_half_written_last_line_is_kept_for_later(store, tmp_path, follower):
    path = tmp_path / "runs" / "a.jsonl"
    path.write_text(row("a") + row("b")[:30])
    one = follower("a.jsonl")
    assert [report.read for report in one.read_new()] == [1]
    assert list(one.read_new()) == []
    with path.open("a") as file:
        file.write(row("b")[30:] + "broken\n")
    (report,) = one.read_new()
    assert (report.read, report.stored, report.refused) == (2, 1, {"bad_json": 1})
    assert report.refusals[0].detail.startswith(f"{path}, line 3: found no JSON")
    assert said(store) == ["a", "b"]


def test_a_restart_reads_nothing_twice(store, tmp_path, follower):
    path = tmp_path / "runs" / "a.jsonl"
    path.write_text(row("a"))
    assert sum(report.read for report in follower().read_new()) == 1
    with path.open("a") as file:
        file.write(row("b"))
    assert [(report.read, report.stored) for report in follower().read_new()] == [(1, 1)]
    assert list(follower().read_new()) == []


def test_rotation_and_truncation_lose_nothing(store, tmp_path, follower):
    path = tmp_path / "runs" / "a.jsonl"
    path.write_text(row("a"))
    one = follower("a.jsonl")
    list(one.read_new())
    with path.open("a") as file:
        file.write(row("late"))
    path.rename(tmp_path / "a.jsonl.1")  # replaced, with a line that nobody had read yet
    assert list(one.read_new()) == []
    path.write_text(row("b"))
    assert [report.read for report in one.read_new()] == [1, 1]
    os.truncate(path, 0)
    path.write_text(row("c") * 1 + row("d" * 500))  # longer than it was before it was cut
    list(one.read_new())
    assert said(store) == ["a", "b", "c", "d" * 500, "late"]


def test_a_folder_is_followed_with_the_files_that_appear(store, tmp_path, follower):
    (tmp_path / "runs" / "a.jsonl").write_text(row("a"))
    (tmp_path / "runs" / "result.json").write_text('{"trial_name": "x"}\n')
    one = follower()
    list(one.read_new())
    (tmp_path / "runs" / "deep").mkdir()
    (tmp_path / "runs" / "deep" / "b.jsonl").write_text(row("b"))
    assert [report.read for report in one.read_new()] == [1]
    assert said(store) == ["a", "b"]


def test_what_is_an_episode_only_when_complete_is_told_once(store, tmp_path, follower, fixtures):
    log = next((fixtures / "codex").glob("*.jsonl"))
    (tmp_path / "runs" / "codex.jsonl").write_bytes(log.read_bytes())
    (tmp_path / "runs" / "list.json").write_text(f"[\n{row('a')}]\n")
    (tmp_path / "runs" / "empty.jsonl").touch()
    one = follower()
    assert [report.refused for report in one.read_new()] == [{"not_followed": 1}, {"not_followed": 1}]
    assert list(one.read_new()) == []
    assert store.count() == 0


def test_a_line_beyond_the_limit_is_refused_and_the_rest_read(store, tmp_path, follower, monkeypatch):
    monkeypatch.setattr(follow, "PIECE_BYTES", 1000)
    monkeypatch.setattr(follow, "MAX_LINE_BYTES", 4000)
    (tmp_path / "runs" / "a.jsonl").write_text(row("a") + row("x" * 2000) + row("y" * 9000) + row("b") + row("z" * 9000)[:-1])
    reports = list(follower().read_new())
    assert [report.refused for report in reports if report.refused] == [{"too_large": 1}]
    assert "a.jsonl, line 3: found a line of 9" in next(report.refusals[0].detail for report in reports if report.refused)
    assert said(store) == ["a", "b", "x" * 2000]


def test_positions_that_cannot_be_read_are_named(store, tmp_path, follower):
    (tmp_path / "followed.json").write_text("[]")
    with pytest.raises(ImportFailed, match=r"followed\.json: found no positions"):
        follower()


def test_a_writer_is_followed_across_restarts_and_kills(tmp_path):
    """The reader is killed, ended by Ctrl-C and started again while a process writes rows in halves: all are there, once."""
    path, project = tmp_path / "runs.jsonl", tmp_path / "project"
    path.touch()
    command = [sys.executable, "-m", "loraloop", "ingest", str(path), "-p", str(project), "--json"]
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    n_read = 0
    try:
        for number in (signal.SIGKILL, signal.SIGINT):
            reader = subprocess.Popen([*command, "--follow-for", "30"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            first = json.loads(reader.stdout.readline())  # it comes, as the writer goes on
            reader.send_signal(number)
            rest, _ = reader.communicate(timeout=30)
            n_read += first["read"] + sum(json.loads(line)["read"] for line in rest.splitlines())
            assert reader.returncode == (-number if number == signal.SIGKILL else 0)
    finally:
        writer.kill()
        writer.wait()
    n_lines = path.read_bytes().count(b"\n")
    done = subprocess.run([*command, "--follow-for", "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    n_read += sum(json.loads(line)["read"] for line in done.stdout.splitlines())
    store = SqlEpisodeStore(project / "episodes.db")
    assert store.count() == n_lines > 10
    assert n_read <= n_lines, "no line is read twice; pieces that the killed reader did not tell are missing here only"
    store.close()


def test_two_do_not_follow_into_one_project(tmp_path):
    """The second is refused and names the first; what a killed one held is free, and where it was is where the next goes on."""
    path, project = tmp_path / "runs.jsonl", tmp_path / "project"
    path.write_text(row("one"))
    command = [sys.executable, "-m", "loraloop", "ingest", str(path), "-p", str(project), "--json"]
    first = subprocess.Popen([*command, "--follow-for", "60"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert json.loads(first.stdout.readline())["read"] == 1
        second = subprocess.run([*command, "--follow-for", "0"], capture_output=True, text=True, timeout=60)
    finally:
        first.kill()
        first.communicate()
    assert (second.returncode, second.stdout) == (1, "")
    assert f"followed into it already, by ingest --follow (process {first.pid})" in " ".join(second.stderr.split())
    with path.open("a") as file:
        file.write(row("two"))
    third = subprocess.run([*command, "--follow-for", "0"], capture_output=True, text=True, timeout=60)
    assert [json.loads(line)["read"] for line in third.stdout.splitlines()] == [1]


def test_the_next_goes_on_where_the_one_before_ended(store, tmp_path, follower):
    early, late = follower(), follower()
    (tmp_path / "runs" / "a.jsonl").write_text(row("one"))
    assert sum(report.read for report in late.run(lambda: False)) == 1
    assert list(early.run(lambda: False)) == []
    assert said(store) == ["one"]
    assert not (tmp_path / "followed.lease").exists()
