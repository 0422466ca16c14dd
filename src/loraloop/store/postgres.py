"""An episode store's database on a PostgreSQL server, for a team: several writers, on any machines.

Writers take turns by a lock on one small table, so what is committed is in order, as on SQLite; taking episodes apart and compressing
them is done before. `?options=-csearch_path%3DNAME` in the URL puts the tables into a schema of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from sqlalchemy import Connection, create_engine, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from loraloop.errors import SettingsError, StoreError
from loraloop.store import database, schema
from loraloop.store.database import Database, read_version_table

SCHEMES = ("postgresql", "postgresql+psycopg")
_PREPARE_LOCK = 0x6C6F7261  # one number for all stores of a server: making tables is rare

_ADVICE = {
    "53100": "the server's disk is full; nothing of this call was stored; make room and repeat it",
    "53300": "the server has no connection left; close some, or raise its max_connections",
    "55P03": (
        f"another process has been writing to it for more than {database.BUSY_SECONDS:.0f} s; "
        "wait for that process or end it (pg_stat_activity names it), then try again"
    ),
    "22003": "a value to store or to filter by does not fit; times and counts are below 2**63",
    "25006": "the server takes no writes; give the address of the primary one",
    "42501": "this user may not do that; grant it, or give another user in the URL",
    "28P01": "the password is wrong; put the right one into the URL, ~/.pgpass or PGPASSWORD",
    "3D000": "there is no such database; make it with `createdb`, or name another in the URL",
}


class PostgresDatabase(Database):
    """The database at a `postgresql://` URL, by psycopg 3. Raises SettingsError for a URL that is none, or without psycopg."""

    def __init__(self, url: str) -> None:
        super().__init__()
        try:
            parsed = make_url(url).set(drivername="postgresql+psycopg")
        except (ArgumentError, ValueError) as error:
            raise SettingsError("the store's URL cannot be read; expected postgresql+psycopg://USER@HOST:PORT/DATABASE") from error
        self.where = parsed.render_as_string(hide_password=True)
        try:
            # a connection that died, as after a restart of the server, is found before it is used
            self.engine = create_engine(parsed, pool_pre_ping=True, max_overflow=-1)
        except ModuleNotFoundError as error:
            raise SettingsError(f"{self.where} needs psycopg; install it with `pip install 'loraloop[postgres]'`") from error

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """psycopg's; SQLAlchemy has nearly all of them in its own."""
        error: type[Exception] = self.engine.dialect.loaded_dbapi.Error
        return (error,)

    def prepare(self) -> None:
        """Make the tables where there are none; processes that do so at once take turns."""
        with self.connecting() as connection:
            if self._check_version(connection) == schema.SCHEMA_VERSION:
                return
            connection.rollback()
            with connection.begin():
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_PREPARE_LOCK})")
                self.make_tables(connection)

    @contextmanager
    def alone(self, connection: Connection) -> Iterator[None]:
        """A transaction that holds the lock on one table to its end."""
        with connection.begin():
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(database.BUSY_SECONDS * 1000)}")
            # before the first statement that looks at data, so that it sees all that was committed meanwhile
            connection.exec_driver_sql(f"LOCK TABLE {schema.generation.name} IN EXCLUSIVE MODE")
            yield

    def snapshot(self, connection: Connection) -> AbstractContextManager[Any]:
        """REPEATABLE READ: the state at the first statement."""
        connection.execution_options(isolation_level="REPEATABLE READ")
        return connection.begin()

    def read_version(self, connection: Connection) -> int:
        """0 where the schema has no tables of ours."""
        found = read_version_table(connection)
        if found is None and inspect(connection).has_table(schema.episodes.name):
            raise StoreError(
                f"{self.where} has a table {schema.episodes.name!r} of another program; choose another database, or a schema "
                "of its own with ?options=-csearch_path%3DNAME"
            )
        return found or 0

    def record_version(self, connection: Connection, number: int) -> None:
        """The table is all there is."""

    def advise(self, error: BaseException) -> str:
        """By SQLSTATE; an error without one is of the connection."""
        code = getattr(error, "sqlstate", None)
        if code is None:
            return "the server cannot be reached; check that it runs, and the address, user and password in the URL"
        return _ADVICE.get(code, "try again; if that changes nothing, report this")
