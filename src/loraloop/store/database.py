"""What an episode store needs of a database, whichever it is: connections, one writer at a time, a schema that is the right one.

Every failure is a StoreError that names the database and the way out.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, insert, inspect, select
from sqlalchemy.exc import SQLAlchemyError, StatementError

from loraloop.errors import StoreError
from loraloop.store import schema

BUSY_SECONDS = 30.0
"""How long a writer waits for another's transaction before it gives up."""


class Database(ABC):
    """An open database. Usable from any thread; a forked child opens its own."""

    where: str
    """Its name in messages, without a password."""
    engine: Engine

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._closed = False
        self._write_lock = threading.Lock()  # the threads of one process queue here, without polling

    def close(self) -> None:
        """Give all connections back; a second time does nothing."""
        self._closed = True
        self.engine.dispose(close=os.getpid() == self._pid)

    @contextmanager
    def connecting(self) -> Iterator[Connection]:
        """A connection of the pool, each statement its own transaction; whatever the database reports becomes a StoreError."""
        if self._closed:
            raise StoreError(f"{self.where} was closed; open the store again")
        if os.getpid() != self._pid:  # a connection is one process's: going on would damage the file or the stream
            raise StoreError(f"{self.where} was opened before this process was forked; open the store again in the child")
        try:
            with self.engine.connect() as connection:
                yield connection
        except (OverflowError, UnicodeEncodeError) as error:
            raise StoreError(self.too_large(error)) from error
        except Exception as error:
            if not isinstance(error, (SQLAlchemyError, *self.errors)):
                raise
            cause = (error.orig if isinstance(error, StatementError) else None) or error
            if isinstance(cause, (OverflowError, UnicodeEncodeError)):
                raise StoreError(self.too_large(cause)) from error
            if self.is_lost(cause):
                self._closed = True
            raise StoreError(f"{self.where}: {self.advise(cause)} ({str(cause).strip()})") from error

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection of which all statements see the same state."""
        with self.connecting() as connection, self.snapshot(connection):
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A connection that writes, alone; committed when the block ends well, else rolled back."""
        with self.connecting() as connection, self._write_lock, self.alone(connection):
            yield connection

    def prepare(self) -> None:
        """Make the tables where there are none, bring older ones up to date. Raises StoreError for a newer or another program's."""
        with self.connecting() as connection:
            found = self._check_version(connection)
        if found == schema.SCHEMA_VERSION:
            return
        with self.writing() as connection:
            self.make_tables(connection)

    def make_tables(self, connection: Connection) -> None:
        """The same, alone and within the connection's transaction."""
        found = self._check_version(connection)  # another process may have been faster
        if found == 0:
            schema.metadata.create_all(connection)
            connection.execute(insert(schema.version).values(version_num=f"{schema.SCHEMA_VERSION:04d}"))
            connection.execute(insert(schema.generation).values(value=0))
        elif found < schema.SCHEMA_VERSION:
            upgrade(connection)
        self.record_version(connection, schema.SCHEMA_VERSION)

    def _check_version(self, connection: Connection) -> int:
        found = self.read_version(connection)
        if found > schema.SCHEMA_VERSION:
            raise StoreError(
                f"{self.where} has schema version {found}, and this loraloop knows versions up to {schema.SCHEMA_VERSION}; "
                "upgrade loraloop, or choose another store"
            )
        return found

    @property
    @abstractmethod
    def errors(self) -> tuple[type[Exception], ...]:
        """What the driver raises outside of SQLAlchemy."""

    @abstractmethod
    def snapshot(self, connection: Connection) -> AbstractContextManager[object]:
        """A transaction that reads."""

    @abstractmethod
    def alone(self, connection: Connection) -> AbstractContextManager[object]:
        """A transaction that no other writer is beside."""

    @abstractmethod
    def read_version(self, connection: Connection) -> int:
        """The schema's version, 0 where there is none. Raises StoreError when the tables are another program's."""

    @abstractmethod
    def record_version(self, connection: Connection, number: int) -> None:
        """Note it wherever it is looked for besides the table."""

    def is_lost(self, error: BaseException) -> bool:  # noqa: ARG002  for those that have such errors
        """Whether nothing that this process still does with the database can be trusted."""
        return False

    @abstractmethod
    def advise(self, error: BaseException) -> str:
        """What is the matter, and what to do."""

    def too_large(self, error: Exception) -> str:
        """The message for a value that the database cannot hold."""
        return (
            f"{self.where}: a value to store or to filter by does not fit: {error}; "
            "times and counts are below 2**63, and ids, tasks, groups and names have no lone surrogates"
        )


def read_version_table(connection: Connection) -> int | None:
    """The version that the table says; None without the table."""
    if not inspect(connection).has_table(schema.version.name):
        return None
    return int(connection.scalar(select(schema.version.c.version_num)) or 0)


def upgrade(connection: Connection, target: str = "head") -> None:
    """Bring the tables to a later version, within the connection's transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, target)
