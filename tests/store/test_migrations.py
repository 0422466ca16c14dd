"""Stores of every released schema open, and nothing in them changes."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from loraloop.episode import Episode, EpisodeFilter
from loraloop.errors import StoreError
from loraloop.store.database import upgrade
from loraloop.store.schema import SCHEMA_VERSION
from loraloop.store.sql import SqlEpisodeStore
from loraloop.store.text import from_body, to_body

FIXTURES = Path(__file__).parents[1] / "fixtures" / "store"
RELEASED = sorted(FIXTURES.glob("version_*.sql"))
"""Dumps of files that the loraloop of that version wrote, beside the episodes that it gave back."""


@pytest.fixture(params=RELEASED, ids=lambda dump: dump.stem)
def released(request, tmp_path: Path) -> tuple[Path, list[Episode]]:
    path = tmp_path / "episodes.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(request.param.read_text())
    return path, [from_body(Episode, line) for line in request.param.with_suffix(".jsonl").read_text().split("\n")[:-1]]


def schema_of(path: Path) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        # sqlite_sequence is left by a table of version 1, and cannot be dropped
        wanted = "FROM sqlite_master WHERE name <> 'sqlite_sequence'"
        objects = connection.execute(f"SELECT type, name, tbl_name {wanted} ORDER BY name").fetchall()
        tables = connection.execute(f"SELECT name {wanted} AND type = 'table' ORDER BY name").fetchall()
        columns = [(table, *column) for (table,) in tables for column in connection.execute(f"PRAGMA table_info({table})").fetchall()]
        return objects + columns


def test_every_version_before_this_has_a_file():
    assert [dump.stem for dump in RELEASED] == [f"version_{number}" for number in range(1, SCHEMA_VERSION)]


def test_a_released_store_opens_with_every_episode_to_the_letter(released):
    path, episodes = released
    assert len(episodes) >= 6
    for _ in range(2):
        with SqlEpisodeStore(path) as store:
            assert [to_body(episode) for episode in store.iter_episodes()] == [to_body(episode) for episode in episodes]
            assert store.list_meta() == [episode.to_dto() for episode in episodes]
            for episode in episodes:
                assert store.get(episode.id) == episode
                assert not store.append(episode), "it is the same as what was there"
                assert store.count(EpisodeFilter(task_id=episode.task_id, outcome=episode.outcome.kind)) >= 1
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


def test_a_migrated_store_has_the_tables_of_a_new_one(released, tmp_path):
    path, _ = released
    SqlEpisodeStore(path).close()
    SqlEpisodeStore(tmp_path / "new.db").close()
    assert schema_of(path) == schema_of(tmp_path / "new.db")


def test_an_open_episode_of_a_released_store_is_continued(released):
    path, episodes = released
    begun = next(episode for episode in episodes if episode.is_open)
    whole = begun.model_copy(update={"is_open": False, "records": (*begun.records, begun.records[0])})
    with SqlEpisodeStore(path) as store:
        assert store.append(whole)
        assert store.get(begun.id) == whole


@pytest.mark.parametrize("released", RELEASED[:1], indirect=True)  # the step behind it reads every episode
def test_a_store_that_cannot_be_brought_up_to_date_stays_as_it_was(released):
    path, episodes = released
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE episodes SET body = '{' WHERE seq = 3")
        before = list(connection.iterdump())
    with pytest.raises(StoreError, match=r"cannot be read.*the file is as it was"):
        SqlEpisodeStore(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        assert list(connection.iterdump()) == before
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        connection.execute("DELETE FROM episodes WHERE seq = 3")
    with SqlEpisodeStore(path) as store:
        assert store.count() == len(episodes) - 1


def test_two_that_open_a_released_store_at_once_bring_it_up_to_date_once(released):
    import threading

    path, episodes = released
    counts = []

    def open_it() -> None:
        with SqlEpisodeStore(path) as store:
            counts.append(store.count())

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [len(episodes)] * 4


def test_migrations_from_nothing_make_the_tables_of_a_new_store(tmp_path):
    from sqlalchemy import create_engine

    SqlEpisodeStore(tmp_path / "new.db").close()
    engine = create_engine(f"sqlite:///{tmp_path / 'stepwise.db'}")
    with engine.begin() as connection:
        upgrade(connection)
    engine.dispose()
    assert schema_of(tmp_path / "stepwise.db") == schema_of(tmp_path / "new.db")
