"""Both stores do what the protocol promises; the SQLite one also under threads, processes, kills, and every kind of trouble."""

from __future__ import annotations

import itertools
import pickle
import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import event

from loraloop.episode import EpisodeFilter, EpisodeMetadata
from loraloop.errors import SettingsError, StoreError
from loraloop.store import database
from loraloop.store.memory import InMemoryEpisodeStore
from loraloop.store.schema import SCHEMA_VERSION
from loraloop.store.sql import SqlEpisodeStore
from loraloop.store.sqlite import PAGE_BYTES
from loraloop.testing import check_store, make_episode


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "episodes.db"


def set_pragma(store: SqlEpisodeStore, pragma: str) -> None:
    """Every connection of `store` from now on has it."""
    event.listen(store._database.engine, "connect", lambda connection, _: connection.execute(f"PRAGMA {pragma}").fetchall())
    store._database.engine.dispose()


def execute(path: Path, statement: str) -> None:
    """As another program would."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# --- the protocol -----------------------------------------------------------------------------------------------------------


def test_store_in_memory_conforms():
    check_store(InMemoryEpisodeStore)


def test_sql_store_conforms(tmp_path):
    number = itertools.count()
    check_store(lambda: SqlEpisodeStore(tmp_path / f"{next(number)}.db"))


def change(model, **make):
    return model.model_copy(update={name: f(getattr(model, name)) for name, f in make.items()})


def keeps_changed(**make):
    return {"append_many": lambda self, episodes: append_many(self, [change(episode, **make) for episode in episodes])}


def filters_changed(**make):
    return {"_select": lambda self, wanted: _select(self, change(wanted, **make))}


def iterate_over_the_living_list(self, episode_filter=None):
    living = (self._episodes[episode_id] for _, episode_id in self._order)
    yield from living if episode_filter is None else self._select(episode_filter)


def forget_quietly(self, ids):
    n_forgotten = forget(self, ids)
    self._forgotten.clear()
    return n_forgotten


append_many, _select = InMemoryEpisodeStore.append_many, InMemoryEpisodeStore._select
get_labels, add_labels, forget = (getattr(InMemoryEpisodeStore, name) for name in ("get_labels", "add_labels", "forget"))
BROKEN = {
    "no order": {"_select": lambda self, wanted: sorted(_select(self, wanted), key=lambda episode: episode.id)},
    "until inclusive": filters_changed(until=lambda until: until and until + 1),
    "ignores the group": filters_changed(group_id=lambda _: None),
    "ignores the offset": filters_changed(offset=lambda _: 0),
    "half a batch": {"append_many": lambda self, episodes: [append_many(self, [episode])[0] for episode in episodes]},
    "sorts keys": keeps_changed(tools=lambda tools: tuple(dict(sorted(tool.items())) for tool in tools)),
    "'' for None": keeps_changed(messages=lambda messages: tuple(change(m, content=lambda text: text or "") for m in messages)),
    "loses records": keeps_changed(records=lambda _: ()),
    "takes a conflict for the same": {"append_many": lambda self, all_: append_many(self, [self.find(e.id) or e for e in all_])},
    "counts an episode again when it goes on": {"append_many": lambda self, all_: [append_many(self, [e])[0] or e.is_open for e in all_]},
    "never ends": {"iter_episodes": iterate_over_the_living_list},
    "shares what it keeps": {"find": lambda self, episode_id: self._episodes.get(episode_id)},
    "counts a page": {"count": lambda self, episode_filter=None: len(self.query(episode_filter))},
    "lacks a method": {"list_meta": None},
    "knows the last label only": {"get_labels": lambda self, episode_id: get_labels(self, episode_id)[-1:]},
    "takes labels from the end": {"add_labels": lambda self, all_: add_labels(self, all_[::-1])},
    "labels one after another": {"add_labels": lambda self, all_: [add_labels(self, [label]) for label in all_]},
    "takes a forgotten id again": {"forget": lambda self, ids, by_content=True: forget_quietly(self, ids)},
    "takes forgotten content again": {"forget": lambda self, ids, by_content=True: forget(self, ids, by_content=False)},
    "forgets nothing": {"forget": lambda self, ids, by_content=True: len(set(ids) & self._episodes.keys())},
}


@pytest.mark.parametrize("methods", BROKEN.values(), ids=BROKEN.keys())
def test_check_store_finds_a_broken_store(methods):
    with pytest.raises(AssertionError):
        check_store(type("Broken", (InMemoryEpisodeStore,), methods))


# --- what SQLite adds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "sqlite:///", "sqlite+pysqlite:///"])
def test_path_or_url_opens_one_file_and_makes_its_directories(tmp_path, prefix):
    path = tmp_path / "new" / "directory" / "episodes 1%41.db"
    episode = make_episode()
    with SqlEpisodeStore(prefix + quote(str(path)) if prefix else str(path)) as store:
        assert store.append(episode)
    with SqlEpisodeStore(path) as store:
        assert store.path == path
        assert store.query() == [episode]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_relative_path_stays_where_it_was_when_the_directory_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with SqlEpisodeStore("sqlite:///episodes.db") as store:
        monkeypatch.chdir("/")
        assert store.path == tmp_path / "episodes.db"
        assert store.path.exists()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://user:secret@host/db", "postgresql"),
        ("://", "sqlite:///PATH"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///a.db?mode=ro", "without options"),
        (":memory:", "InMemoryEpisodeStore"),
    ],
)
def test_other_urls_are_refused(url, says):
    with pytest.raises(SettingsError, match=says) as caught:
        SqlEpisodeStore(url)
    assert "secret" not in str(caught.value)


def test_every_connection_syncs_its_commits_and_waits_for_its_turn(path):
    with SqlEpisodeStore(path) as store, store._database.connecting() as one, store._database.connecting() as other:
        for name, value in {"journal_mode": "wal", "synchronous": 2, "busy_timeout": 30_000}.items():
            assert [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for connection in (one, other)] == [value] * 2


@pytest.mark.parametrize(
    "fields", [{}, {"since": 1}, *({name: "success"} for name in ("learn_model", "scenario", "outcome", "task_id", "group_id"))]
)
def test_every_page_of_every_filter_comes_in_order_from_an_index(path, fields):
    statements = []
    with SqlEpisodeStore(path) as store:
        same = {"metadata": EpisodeMetadata(scenario="success"), **dict.fromkeys(("learn_model", "task_id", "group_id"), "success")}
        store.append_many([make_episode(**same) for _ in range(250)])
        event.listen(store._database.engine, "before_cursor_execute", lambda *given: statements.append(given[2:4]))
        assert len(store.list_meta(EpisodeFilter(**fields))) == 250
        pages = [each for each in statements if "ORDER BY" in each[0]]
        assert len(pages) == 3
        for statement, values in pages:
            with store._database.connecting() as connection:
                plan = str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).all())
            assert f"episodes_by_{next(iter(fields), 'position').replace('since', 'position')}" in plan
            assert "TEMP B-TREE" not in plan


def test_paused_iteration_holds_no_transaction(path):
    with SqlEpisodeStore(path) as store:
        store.append_many([make_episode() for _ in range(250)])
        iterator = store.iter_episodes()
        next(iterator)
        store.append(make_episode())
        with closing(sqlite3.connect(path, timeout=0)) as other:
            busy, *_ = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        assert not busy
        assert sum(1 for _ in iterator) == 249


_APPEND = """
import sys
from loraloop.store.sql import SqlEpisodeStore
from loraloop.testing import make_episode
print("ready", flush=True)
sys.stdin.readline()
with SqlEpisodeStore(sys.argv[1]) as store:
    for _ in range(int(sys.argv[2])):
        store.append(episode := make_episode())
        print(episode.id, flush=True)
    print(store.append(make_episode(id=sys.argv[3])))
"""


def test_threads_and_processes_append_to_one_new_file_and_nothing_is_lost_or_doubled(path):
    shared = make_episode()
    lines = []

    def append(store):
        for _ in range(50):
            store.append(episode := make_episode())
            lines.append(str(episode.id))
        lines.append(str(store.append(shared)))

    processes = [start(_APPEND, path, 50, shared.id) for _ in range(3)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
    for process in processes:
        process.stdin.close()  # now all at once
    with SqlEpisodeStore(path) as store:
        threads = [threading.Thread(target=append, args=[store]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for process in processes:
            with process.stdout as rest:
                lines += rest.read().split()
            assert process.wait() == 0
        ids = [line for line in lines if line not in ("True", "False")]
        assert len(ids) == 7 * 50
        assert sorted(set(lines) - set(ids)) == ["False", "True"]
        assert lines.count("True") == 1
        assert sorted(episode.id for episode in store.iter_episodes()) == sorted([*ids, shared.id])


@pytest.mark.parametrize("n_acknowledged", [1, 60])
def test_killed_process_loses_nothing_that_it_acknowledged(path, n_acknowledged):
    process = start(_APPEND, path, 10**9, make_episode().id)
    process.stdin.close()
    seen = [process.stdout.readline() for _ in range(1 + n_acknowledged)]
    process.kill()
    with process.stdout as rest:
        seen += rest
    assert process.wait() < 0
    acknowledged = [line.strip() for line in seen[1:] if line.endswith("\n")]
    assert len(acknowledged) >= n_acknowledged
    with SqlEpisodeStore(path) as store:
        kept = [episode.id for episode in store.iter_episodes()]
        assert set(kept) >= set(acknowledged)
        assert len(kept) <= len(acknowledged) + 1
        assert store.append(make_episode())


# --- trouble ----------------------------------------------------------------------------------------------------------------


@contextmanager
def raises_store_error(path: Path, *says: str) -> Iterator[None]:
    """It names the file and the way out, and can be sent to another process."""
    with pytest.raises(StoreError) as caught:
        yield
    for part in (str(path), *says):
        assert part in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_locked_file_can_be_read_and_the_writer_says_what_to_do(path):
    with SqlEpisodeStore(path) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        set_pragma(store, "busy_timeout = 20")
        store.append(make_episode())
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM episodes")
        assert store.count() == len(store.query()) == 1
        with raises_store_error(path, "another process", "try again"):
            store.append(make_episode())
        other.execute("ROLLBACK")
        assert store.append(make_episode())


def test_file_locked_while_it_is_made(path, monkeypatch):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with raises_store_error(path, "another process", "try again"):
            SqlEpisodeStore(path)


def test_full_disk_stores_nothing_of_the_batch(path):
    with SqlEpisodeStore(path) as store:
        set_pragma(store, "max_page_count = 60")
        small = make_episode()
        store.append(small)
        big = [make_episode(messages=[{"role": "user", "content": random.randbytes(30_000).hex()}]) for _ in range(20)]
        with raises_store_error(path, "disk is full", "make room"):
            store.append_many(big)
        assert store.query() == [small]
        assert store.append(make_episode())


def test_file_that_cannot_be_written(path):
    with SqlEpisodeStore(path) as store:
        set_pragma(store, "query_only = ON")
        with raises_store_error(path, "make the file and its directory writable"):
            store.append(make_episode())
        assert store.count() == 0


@pytest.mark.parametrize("path", ["file/episodes.db", "file/new/episodes.db", "directory", "/proc/episodes.db", "/"])
def test_path_that_cannot_be_a_file(tmp_path, path):
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    with raises_store_error(tmp_path / path):
        SqlEpisodeStore(tmp_path / path)


def test_file_of_another_program_is_left_alone(path, tmp_path):
    execute(path, "CREATE TABLE bookmarks (url TEXT)")
    text = tmp_path / "table.csv"
    text.write_text("name,score\nsomething else altogether,1\n" * 50)
    for file, says in ((path, "another program"), (text, "not a SQLite database")):
        before = file.read_bytes()
        with raises_store_error(file, says, "choose another path"):
            SqlEpisodeStore(file)
        assert file.read_bytes() == before


def test_newer_schema_names_both_versions(path):
    SqlEpisodeStore(path).close()
    execute(path, f"PRAGMA user_version = {SCHEMA_VERSION + 6}")
    with raises_store_error(path, f"version {SCHEMA_VERSION + 6}", f"up to {SCHEMA_VERSION}", "upgrade loraloop"):
        SqlEpisodeStore(path)


def test_damaged_file(path):
    with SqlEpisodeStore(path) as store:
        store.append_many([make_episode() for _ in range(100)])
        execute(path, "UPDATE episodes SET id = cast(x'ff' AS text) || seq")
        with raises_store_error(path, "damaged", "backup", ".recover"):
            store.query()
    content = path.read_bytes()
    path.write_bytes(content[:PAGE_BYTES] + b"\xa5" * (len(content) - PAGE_BYTES))
    with SqlEpisodeStore(path) as store, raises_store_error(path, "damaged", "backup", ".recover"):
        store.query()


@pytest.mark.parametrize("body", ["'{\"id\": '", "'{}{}'", "'{\"new_field\": 1}'", "7", "x'ff00'"])
def test_unreadable_body_says_what_to_do_and_lists_still_work(path, body):
    episode = make_episode()
    with SqlEpisodeStore(path) as store:
        store.append(episode)
        execute(path, f"UPDATE bodies SET body = {body}")
        for read in (store.query, lambda: store.get(episode.id), lambda: store.append(episode)):
            with raises_store_error(path, episode.id, "newer", "backup"):
                read()
        assert store.list_meta() == [episode.to_dto()]


def test_values_beyond_the_database_are_store_errors(path):
    with SqlEpisodeStore(path) as store:
        for act in (
            lambda: store.append(make_episode(metadata=EpisodeMetadata(created_at=2**63))),
            lambda: store.append(make_episode(task_id="\ud800")),
            lambda: store.count(EpisodeFilter(since=2**63)),
            lambda: store.query(EpisodeFilter(offset=2**63)),
            lambda: store.query(EpisodeFilter(task_id="\ud800")),
            lambda: store.find("\ud800"),
        ):
            with raises_store_error(path, "2**63"):
                act()
        assert store.count() == 0


def test_cut_off_emoji_is_kept_and_what_json_cannot_hold_is_refused(path):
    cut_off = make_episode(messages=[{"role": "user", "content": "\ud83e"}], tools=[{"\ud83e": "\ud83e"}])
    bad = [make_episode(tools=[{"default": float("inf")}]), make_episode().model_copy(update={"outcome": "solved"})]
    with SqlEpisodeStore(path) as sql_store:
        for store in (sql_store, InMemoryEpisodeStore()):
            store.append(cut_off)
            for episode in bad:
                with pytest.raises(StoreError, match="cannot be stored as JSON"):
                    store.append(episode)
            assert store.query() == [cut_off]
            apart = make_episode(messages=[{"role": "user", "content": "\\\ud83e\udd5a \udd5a"}])
            assert store.append(apart)
            assert not store.append(apart)
            assert store.get(apart.id).messages[0].content == "\\\U0001f95a \udd5a"


def test_closed_store_says_so_and_closing_twice_is_no_error(path):
    store = SqlEpisodeStore(path)
    store.close()
    store.close()
    for act in (store.count, store.query, lambda: store.append(make_episode())):
        with raises_store_error(path, "closed", "open the store again"):
            act()


def test_forked_child_is_told_to_open_its_own(path):
    script = """
import os, sys
from loraloop.store.sql import SqlEpisodeStore
with SqlEpisodeStore(sys.argv[1]) as store:
    if os.fork() == 0:
        store.count()
    os.wait()
    print(store.count())
"""
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n"
    assert f"StoreError: {path} was opened before" in done.stderr.splitlines()[-1]
