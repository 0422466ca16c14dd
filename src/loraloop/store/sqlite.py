"""An episode store's database in one SQLite file, for the threads and processes of one machine.

What is committed survives the death of the process and a power cut. One writer at a time, readers never wait for it. Only who holds the
writer's lock writes pages back from the log: SQLite before 3.51.3 may damage a file when two do that at one instant. Not for a network
drive: SQLite's write-ahead log needs memory that its processes share.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.exc import DBAPIError, OperationalError

from loraloop.errors import SettingsError, StoreError
from loraloop.store import database, schema
from loraloop.store.database import Database, read_version_table

PAGE_BYTES = 8192
"""Bodies of 3 to 4 kB leave less of a page empty than with SQLite's own 4096; measured in docs/decisions/0008-store.md."""
CACHE_KB = 16 * 1024
LOG_BYTES = 16 << 20
"""The write-ahead log from which on its pages are written back."""

_BEGIN = "loraloop_begin"  # execution option: the statement that opens a transaction; without it each statement is its own

_ADVICE = {
    sqlite3.SQLITE_BUSY: (
        f"another process has been writing to it for more than {database.BUSY_SECONDS:.0f} s; "
        "wait for that process or end it (`fuser` names it), then try again"
    ),
    sqlite3.SQLITE_FULL: "the disk is full; nothing of this call was stored; make room and repeat it",
    sqlite3.SQLITE_READONLY: "it cannot be written to; make the file and its directory writable, or choose another path",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check that it is a file in a directory that exists and can be written to",
    sqlite3.SQLITE_NOTADB: "it is not a SQLite database; choose another path, or move that file away to start an empty store",
    sqlite3.SQLITE_CORRUPT: "it is damaged; restore it from a backup, or save what can be read with `sqlite3 FILE .recover`",
    sqlite3.SQLITE_IOERR: "the disk or file system reports an error; check its state, free space and quota, then open the store again",
}


class SqliteDatabase(Database):
    """The file at `path_or_url`, a path or a `sqlite:///` URL; made with its directories when missing. Raises SettingsError, StoreError.

    In a directory that nothing can be written to, such as a read-only mount, it is opened to be read. Then what another process writes
    there meanwhile is seen only if that process had the file open before.
    """

    errors = (sqlite3.Error,)

    def __init__(self, path_or_url: str | Path) -> None:
        super().__init__()
        self.path = _to_path(path_or_url).absolute()
        self.where = str(self.path)
        self.is_readable_only = self.path.is_file() and not os.access(self.path.parent, os.W_OK)
        self.engine = create_engine(
            self._read_only_url() if self.is_readable_only else URL.create("sqlite", database=str(self.path)),
            connect_args={"timeout": database.BUSY_SECONDS, "isolation_level": None},  # None: no BEGIN but ours
            max_overflow=-1,
        )
        event.listen(self.engine, "connect", _set_up_connection)
        event.listen(self.engine, "begin", _begin)

    def prepare(self) -> None:
        """Check that the file is ours, or make it so when it is new. One that can only be read must be of this version's schema."""
        if self.is_readable_only:
            with self.connecting() as connection:
                found = self._check_version(connection)
            if found != schema.SCHEMA_VERSION:
                raise StoreError(
                    f"{self.path}: it has schema version {found}, not {schema.SCHEMA_VERSION}, and its directory cannot be written to; "
                    "make it writable, or copy the file elsewhere"
                )
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path}: its directory cannot be made: {error}; choose another path") from error
        with self.connecting() as connection:
            self._check_version(connection)
            self._enter_wal(connection)
        super().prepare()

    def close(self) -> None:
        """Close the file; the last one that does writes back what is in the log, as the writer that it is then."""
        if self._closed or self.is_readable_only or os.getpid() != self._pid:
            super().close()
            return
        with suppress(StoreError), self._writer(max_seconds=0.0):
            super().close()
        super().close()  # who holds the lock has the file open, so this is not the last one

    @contextmanager
    def alone(self, connection: Connection) -> Iterator[None]:
        """BEGIN IMMEDIATE under the writer's lock, which is held until pages are written back."""
        with self._writer():
            connection.execution_options(**{_BEGIN: "BEGIN IMMEDIATE"})
            with connection.begin():
                yield
            connection.execution_options(**{_BEGIN: None})
            self._write_back(connection)

    def snapshot(self, connection: Connection) -> AbstractContextManager[Any]:
        """SQLite's readers see the state at their first statement."""
        connection.execution_options(**{_BEGIN: "BEGIN"})
        return connection.begin()

    def read_version(self, connection: Connection) -> int:
        """0 for an empty file."""
        n_tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
        # read second: tables that another process makes come in one commit with the version
        version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
        if version == 0 and n_tables:
            raise StoreError(f"{self.path} is a SQLite database of another program; choose another path")
        return version

    def record_version(self, connection: Connection, number: int) -> None:
        """In `user_version`, where loraloops of schema 1 look, too."""
        if read_version_table(connection) != number:
            raise StoreError(f"{self.path}: its tables were not brought to version {number}; restore it from a backup, and report this")
        connection.exec_driver_sql(f"PRAGMA user_version = {number}")

    def is_lost(self, error: BaseException) -> bool:
        """After an error of the disk: a sync that failed leaves pages marked as written, so the next one would succeed and say nothing."""
        return _code(error) == sqlite3.SQLITE_IOERR

    def advise(self, error: BaseException) -> str:
        """By SQLite's result code."""
        return _ADVICE.get(_code(error), "close it everywhere and try again; if that changes nothing, report this")

    def _read_only_url(self) -> URL:
        """With a log beside the file, which a writer has open, SQLite follows that; else it would make one, and must be told not to."""
        has_log = self.path.with_name(self.path.name + "-wal").exists()
        query = {"uri": "true", "mode": "ro"} | ({} if has_log else {"immutable": "1"})
        return URL.create("sqlite", database=f"file:{quote(str(self.path))}", query=query)

    @contextmanager
    def _writer(self, max_seconds: float | None = None) -> Iterator[None]:
        """Alone among the processes that write here; the lock is on the directory, as closing the file would free SQLite's own locks."""
        try:
            handle = os.open(self.path.parent, os.O_RDONLY)
        except OSError as error:
            raise StoreError(f"{self.path}: its directory cannot be opened: {error}; make it readable, or choose another path") from error
        try:
            deadline = time.monotonic() + (database.BUSY_SECONDS if max_seconds is None else max_seconds)
            pause = 0.0005
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise StoreError(f"{self.path}: {_ADVICE[sqlite3.SQLITE_BUSY]}") from None
                    time.sleep(pause)
                    pause = min(2 * pause, 0.02)
                else:
                    break
            yield
        finally:
            os.close(handle)

    def _write_back(self, connection: Connection) -> None:
        """Empty the log when it has grown; what was committed is safe in it, so trouble here is told by whoever meets it next."""
        with suppress(OSError, OperationalError):
            if self.path.with_name(self.path.name + "-wal").stat().st_size > LOG_BYTES:
                # a log that a reader still needs is left alone, and tried again by the next writer
                connection.exec_driver_sql("PRAGMA busy_timeout = 0")
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(database.BUSY_SECONDS * 1000)}")

    def _enter_wal(self, connection: Connection) -> None:
        """Switch to the write-ahead log, so that readers and the writer do not block each other."""
        deadline = time.monotonic() + database.BUSY_SECONDS
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
        while mode != "wal":
            try:
                mode = connection.exec_driver_sql("PRAGMA journal_mode = WAL").scalar_one()
            except OperationalError as error:  # SQLite does not wait by itself when several processes do this at once
                if _code(error.orig or error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                if mode != "wal":
                    raise StoreError(f"{self.path}: its file system cannot hold a write-ahead log; choose a path on a local disk")


def _to_path(path_or_url: str | Path) -> Path:
    text = str(path_or_url)
    if text == ":memory:":
        raise SettingsError("a store in ':memory:' would be lost at the end; give a path, or use InMemoryEpisodeStore()")
    if isinstance(path_or_url, Path) or "://" not in text:
        return Path(text)
    scheme, _, rest = text.partition("://")
    if scheme not in ("sqlite", "sqlite+pysqlite"):
        raise SettingsError(f"no episode store for {scheme}://; give a path, sqlite:///PATH or postgresql+psycopg://HOST/DATABASE")
    if not rest.startswith("/") or rest in ("/", "/:memory:") or "?" in rest:
        raise SettingsError(f"{text!r} names no file; give a path, or sqlite:///PATH (four slashes for an absolute one), without options")
    return Path(unquote(rest[1:]))  # by hand, as SQLAlchemy 2.0 and 2.1 differ in whether they unquote


def _set_up_connection(connection: Any, _record: object) -> None:
    # FULL syncs at every commit (0.5 ms on an SSD, against 0.1 ms with NORMAL): an episode is worth more than that, and a batch
    # is one commit. fullfsync is the same for macOS, where fsync alone leaves the data in the drive's cache.
    for pragma in (
        f"page_size = {PAGE_BYTES}",  # of a file that is new
        "synchronous = FULL",
        "fullfsync = ON",
        f"cache_size = -{CACHE_KB}",
        "wal_autocheckpoint = 0",
        "secure_delete = ON",  # what was forgotten is not left in the file
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    statement = connection.get_execution_options().get(_BEGIN)
    if statement:
        connection.exec_driver_sql(statement)


def _code(error: BaseException) -> int:
    """SQLite's primary result code; 0 when the error is not from SQLite itself."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    if "Could not decode to UTF-8" in str(cause):  # by the driver, which gives no code; nobody but a bad disk writes such text
        return sqlite3.SQLITE_CORRUPT
    return int(getattr(cause, "sqlite_errorcode", 0)) & 0xFF
