"""The same store on a real PostgreSQL server: the conformance check, many writers, and the server's own troubles."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import psycopg
import pytest

from loraloop.episode import EpisodeFilter
from loraloop.errors import SettingsError, StoreError
from loraloop.store import database
from loraloop.store.schema import SCHEMA_VERSION, metadata
from loraloop.store.sql import SqlEpisodeStore
from loraloop.testing import check_store, make_episode

MakeUrl = Callable[[], str]


def execute(url: str, statement: str) -> None:
    """As another program would."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)


def test_a_store_on_a_server_conforms(make_url: MakeUrl) -> None:
    check_store(lambda: SqlEpisodeStore(make_url()))


_APPEND = """
import sys
from loraloop.store.sql import SqlEpisodeStore
from loraloop.testing import make_episode
policy = {"role": "system", "content": "Ask before you do it. " * 100}
answer = {"role": "assistant", "content": "Done."}
print("ready", flush=True)
sys.stdin.readline()
with SqlEpisodeStore(sys.argv[1]) as store:
    for number in range(int(sys.argv[2])):
        batch = [make_episode(messages=[policy, {"role": "user", "content": f"{number} " * 300}, answer]) for _ in range(3)]
        shared = make_episode(id=f"ep-shared-{number}", metadata={"created_at": 1})
        added = store.append_many([*batch, shared])
        print(*(episode.id for episode in batch), added[3], flush=True)
"""


def test_eight_processes_write_at_once_and_nothing_is_lost_or_doubled(make_url: MakeUrl) -> None:
    url, n_batches = make_url(), 12
    command = [sys.executable, "-c", _APPEND, url, str(n_batches)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 8
    for process in processes:
        process.stdin.close()  # now all at once, the tables are made too
    ids, firsts = [], 0
    for process in processes:
        with process.stdout as lines:
            for line in lines:
                *new, is_first = line.split()
                ids += new
                firsts += is_first == "True"
        assert process.wait() == 0
    assert len(ids) == len(set(ids)) == 8 * n_batches * 3
    assert firsts == n_batches, "an id that all have is taken once"
    with SqlEpisodeStore(url) as store:
        kept = [episode.id for episode in store.iter_episodes()]
        assert sorted(kept) == sorted([*ids, *(f"ep-shared-{number}" for number in range(n_batches))])
        with store._database.connecting() as connection:
            n_blobs = connection.exec_driver_sql("SELECT count(*) FROM blobs").scalar_one()
    assert n_blobs == 1 + n_batches, "the system prompt, and a question for each number, once"


def test_a_blob_that_another_process_has_made_unused_is_written_again(make_url: MakeUrl) -> None:
    url = make_url()
    episode, twin = [make_episode(messages=[{"role": "user", "content": "boil " * 300}, *make_episode().messages[1:]]) for _ in range(2)]
    with SqlEpisodeStore(url) as one, SqlEpisodeStore(url) as other:
        one.append(episode)
        other.forget([episode.id], by_content=False)
        assert one.append(twin)
        assert one.get(twin.id) == twin


def test_long_texts_and_any_characters_can_be_filtered_by(make_url: MakeUrl) -> None:
    texts = ["x" * 10_000, "x" * 10_001, "a\\0b", "a\0b", "a\\\\0b", "\U0001f95a" * 300, "A", "a"]
    with SqlEpisodeStore(make_url()) as store:
        store.append_many([make_episode(task_id=text, group_id=text) for text in texts])
        for text in texts:
            assert [episode.task_id for episode in store.iter_episodes(EpisodeFilter(task_id=text, group_id=text))] == [text]


def test_a_value_that_the_server_cannot_hold_is_named_as_such(make_url: MakeUrl) -> None:
    with SqlEpisodeStore(make_url()) as store:
        for act in (
            lambda: store.append(make_episode(task_id="\ud800")),
            lambda: store.append(make_episode(metadata={"created_at": 2**63})),
            lambda: store.count(EpisodeFilter(since=2**63)),
            lambda: store.query(EpisodeFilter(task_id="\ud800")),
            lambda: store.find("\ud800"),
        ):
            with pytest.raises(StoreError, match=r"does not fit.*2\*\*63"):
                act()
        assert store.count() == 0


def test_every_page_comes_from_an_index(make_url: MakeUrl) -> None:
    with SqlEpisodeStore(make_url()) as store:
        store.append_many([make_episode() for _ in range(300)])
        with store._database.connecting() as connection:
            connection.exec_driver_sql("SET enable_seqscan = off")
            connection.exec_driver_sql("SET enable_sort = off")
            plan = str(
                connection.exec_driver_sql(
                    "EXPLAIN SELECT id FROM episodes WHERE outcome = 'success' AND (created_at, id) > (1, 'x') ORDER BY created_at, id"
                ).all()
            )
    assert "episodes_by_outcome" in plan
    assert "Sort" not in plan


def test_a_newer_schema_and_another_programs_tables_are_left_alone(make_url: MakeUrl) -> None:
    url = make_url()
    SqlEpisodeStore(url).close()
    execute(url, f"UPDATE loraloop_schema SET version_num = '{SCHEMA_VERSION + 6:04d}'")
    with pytest.raises(StoreError, match=rf"version {SCHEMA_VERSION + 6}.*up to {SCHEMA_VERSION}; upgrade loraloop"):
        SqlEpisodeStore(url)
    theirs = make_url()
    execute(theirs, "CREATE TABLE episodes (number int)")
    with pytest.raises(StoreError, match=r"of another program.*search_path"):
        SqlEpisodeStore(theirs)


def test_migrations_from_nothing_make_the_tables_of_a_new_store(make_url: MakeUrl) -> None:
    from sqlalchemy import create_engine, inspect

    def columns(url: str) -> dict[str, list[tuple[str, str, bool]]]:
        engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
        try:
            looked = inspect(engine)
            return {
                table: [(column["name"], str(column["type"]), column["nullable"]) for column in looked.get_columns(table)]
                + sorted((str(index["name"]), str(index["column_names"]), bool(index["unique"])) for index in looked.get_indexes(table))
                for table in sorted(looked.get_table_names())
            }
        finally:
            engine.dispose()

    stepwise, new = make_url(), make_url()
    SqlEpisodeStore(new).close()
    engine = create_engine(stepwise.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        database.upgrade(connection)
    engine.dispose()
    assert set(columns(new)) == set(metadata.tables)
    assert columns(stepwise) == columns(new)


def test_a_writer_that_waits_too_long_says_so(make_url: MakeUrl, monkeypatch: pytest.MonkeyPatch) -> None:
    url = make_url()
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    with SqlEpisodeStore(url) as store, psycopg.connect(url) as other:
        other.execute("LOCK TABLE generation IN EXCLUSIVE MODE")
        assert store.count() == 0, "readers do not wait"
        with pytest.raises(StoreError, match=r"another process.*try again"):
            store.append(make_episode())
        other.rollback()
        assert store.append(make_episode())


def test_a_server_that_cannot_be_reached_is_named_without_its_password(server: str) -> None:
    with pytest.raises(StoreError, match="cannot be reached") as caught:
        SqlEpisodeStore("postgresql://user:secret@127.0.0.1:1/db?connect_timeout=2")
    assert "secret" not in str(caught.value)
    assert "127.0.0.1:1" in str(caught.value)
    with pytest.raises(SettingsError, match="expected postgresql") as caught:
        SqlEpisodeStore("postgresql://user:secret@host:port/db")
    assert "secret" not in str(caught.value)


def test_a_connection_that_the_server_has_ended_is_made_anew(make_url: MakeUrl) -> None:
    url = make_url()
    with SqlEpisodeStore(url) as store:
        store.append(make_episode())
        with store._database.connecting() as connection:
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        execute(url, f"SELECT pg_terminate_backend({pid})")
        assert store.append(make_episode())
        assert store.count() == 2
