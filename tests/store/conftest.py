"""Databases of a test's own: SQLite files, and schemas on a real PostgreSQL server where one answers."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator

import pytest

SERVER = os.environ.get("LORALOOP_TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/test").replace("postgresql+psycopg:", "postgresql:")


@pytest.fixture(scope="session")
def server() -> str:
    """The URL of a server; a test without one is skipped, but under continuous integration, which has one."""
    psycopg = pytest.importorskip("psycopg")
    try:
        psycopg.connect(SERVER, connect_timeout=5).close()
    except psycopg.Error as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no PostgreSQL server answers (LORALOOP_TEST_POSTGRES): {error}")
    return SERVER


@pytest.fixture
def make_url(server: str) -> Iterator[Callable[[], str]]:
    """Gives the URL of a new, empty schema at every call; all are removed again."""
    import psycopg

    names: list[str] = []

    def make() -> str:
        names.append(f"loraloop_test_{uuid.uuid4().hex[:12]}")
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {names[-1]}")
        return f"{server}{'&' if '?' in server else '?'}options=-csearch_path%3D{names[-1]}"

    yield make
    with psycopg.connect(server, autocommit=True) as connection:
        for name in names:
            connection.execute(f"DROP SCHEMA {name} CASCADE")
