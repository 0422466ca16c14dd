"""An episode store in one SQLite file, for any number of threads and processes of one machine.

What `append` has acknowledged survives the death of the process and a power cut. One writer at a time, readers never wait for it.
Episodes are only ever added, and one that is open is continued. Every failure is a StoreError that names the file and the way out.
Not for a network drive: SQLite's write-ahead log needs memory that its processes share.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    create_engine,
    event,
    func,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from loraloop.episode import Episode, EpisodeDto, EpisodeFilter
from loraloop.errors import SettingsError, StoreError
from loraloop.store.memory import Stored, follow, from_body, to_body

SCHEMA_VERSION = 1
"""The layout of the file that this loraloop writes, kept in `PRAGMA user_version`."""
BUSY_SECONDS = 30.0
"""How long a writer waits for another process's transaction before it gives up."""
PAGE_ROWS = 100
"""How many episodes an iteration fetches at a time, as text."""

_FILTERED_COLUMNS = ("learn_model", "scenario", "outcome", "task_id", "group_id")
_schema = MetaData()
_episodes = Table(
    "episodes",
    _schema,
    Column("seq", Integer, primary_key=True),  # in the order of commits, as there is one writer at a time
    Column("id", Text, nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("learn_model", Text, nullable=False),
    Column("scenario", Text),
    Column("outcome", Text, nullable=False),
    Column("task_id", Text),
    Column("group_id", Text),
    Column("meta", Text, nullable=False),  # the EpisodeDto, so that lists need not read bodies
    Column("body", Text, nullable=False),  # the Episode; last, as SQLite reads a row from the left
    Index("episodes_by_position", "created_at", "id"),
    *(Index(f"episodes_by_{name}", name, "created_at", "id") for name in _FILTERED_COLUMNS),
    sqlite_autoincrement=True,
)
_POSITION = (_episodes.c.created_at, _episodes.c.id)

_BEGIN = "loraloop_begin"  # execution option: the statement that opens a transaction; without it each statement is its own

_ADVICE = {
    sqlite3.SQLITE_BUSY: (
        f"another process has been writing to it for more than {BUSY_SECONDS:.0f} s; "
        "wait for that process or end it (`fuser` names it), then try again"
    ),
    sqlite3.SQLITE_FULL: "the disk is full; nothing of this call was stored; make room and repeat it",
    sqlite3.SQLITE_READONLY: "it cannot be written to; make the file and its directory writable, or choose another path",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check that it is a file in a directory that exists and can be written to",
    sqlite3.SQLITE_NOTADB: "it is not a SQLite database; choose another path, or move that file away to start an empty store",
    sqlite3.SQLITE_CORRUPT: "it is damaged; restore it from a backup, or save what can be read with `sqlite3 FILE .recover`",
    sqlite3.SQLITE_IOERR: "the disk or file system reports an error; check its state, free space and quota, then repeat the call",
}


class SqlEpisodeStore:
    """Keeps episodes in the SQLite file at `path_or_url`, a path or a `sqlite:///` URL; made with its directories when missing.

    Use it from any thread, as a context manager or with `close()`. Several processes may have the same file open; a forked child
    opens its own. Raises SettingsError for any other URL, StoreError when the file cannot be opened, is no store or is too new.
    """

    def __init__(self, path_or_url: str | Path) -> None:
        self.path = _to_path(path_or_url).absolute()
        self._pid = os.getpid()
        self._closed = False
        self._write_lock = threading.Lock()  # the threads of one process queue here; SQLite's own waiting is by polling
        self._engine = create_engine(
            URL.create("sqlite", database=str(self.path)),
            connect_args={"timeout": BUSY_SECONDS, "isolation_level": None},  # None: no BEGIN but ours
            max_overflow=-1,
        )
        event.listen(self._engine, "connect", _set_up_connection)
        event.listen(self._engine, "begin", _begin)
        try:
            self._prepare_file()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, after the last use in any thread; a second time does nothing."""
        self._closed = True
        self._engine.dispose(close=os.getpid() == self._pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def append(self, episode: Episode) -> bool:
        """Keep `episode`; False when the very same is there already, whatever its `created_at`, or one that continues it.

        One that continues an open episode takes its place. Raises StoreError when another episode has its id, or when it cannot be
        kept whole: NaN or infinity anywhere, a lone surrogate in its learn model, scenario, task or group.
        """
        return self.append_many([episode])[0]

    def append_many(self, episodes: Sequence[Episode]) -> list[bool]:
        """`append` for each in order, in one transaction: all or none; an empty sequence gives an empty list."""
        rows = [_to_row(episode) for episode in episodes]  # before the lock is taken: the work is here
        statement = insert(_episodes).on_conflict_do_nothing(index_elements=["id"])
        added = []
        with self._transaction() as connection:
            for episode, row in zip(episodes, rows, strict=True):
                is_new = connection.execute(statement, row).rowcount == 1
                added.append(is_new or self._follow(connection, episode))
        return added

    def get(self, episode_id: str) -> Episode:
        """The episode; raises StoreError when there is none."""
        episode = self.find(episode_id)
        if episode is None:
            raise StoreError(f"no episode {str(episode_id)!r} in {self.path}; `loraloop episodes list` shows those that are there")
        return episode

    def find(self, episode_id: str) -> Episode | None:
        """The episode, or None."""
        with self._connection() as connection:
            body = connection.scalar(select(_episodes.c.body).where(_episodes.c.id == str(episode_id)))
        return None if body is None else self._decode(Episode, str(episode_id), body)

    def iter_episodes(self, episode_filter: EpisodeFilter | None = None) -> Iterator[Episode]:
        """The episodes that match, in order; those that were there at the first step.

        Memory is bounded by `PAGE_ROWS`, and no transaction stays open between steps.
        """
        for episode_id, body in self._iter_texts(episode_filter or EpisodeFilter(), _episodes.c.body):
            yield self._decode(Episode, episode_id, body)

    def query(self, episode_filter: EpisodeFilter | None = None) -> list[Episode]:
        """`iter_episodes` as a list."""
        return list(self.iter_episodes(episode_filter))

    def list_meta(self, episode_filter: EpisodeFilter | None = None) -> list[EpisodeDto]:
        """The episodes that match, without messages and records, in order; the bodies are not read."""
        rows = self._iter_texts(episode_filter or EpisodeFilter(), _episodes.c.meta)
        return [self._decode(EpisodeDto, episode_id, meta) for episode_id, meta in rows]

    def count(self, episode_filter: EpisodeFilter | None = None) -> int:
        """How many match; `limit` and `offset` do not change it."""
        matching = _conditions(episode_filter or EpisodeFilter())
        with self._connection() as connection:
            return connection.scalar(select(func.count()).select_from(_episodes).where(*matching)) or 0

    def _iter_texts(self, wanted: EpisodeFilter, column: Column[str]) -> Iterator[tuple[str, str]]:
        """(id, text) in pages, each found by the position of the last row of the one before."""
        with self._connection() as connection:
            newest = connection.scalar(select(func.max(_episodes.c.seq))) or 0
        matching = (_episodes.c.seq <= newest, *_conditions(wanted))
        rows_of = select(*_POSITION, column).where(*matching).order_by(*_POSITION)
        page, left = rows_of.offset(wanted.offset), wanted.limit
        while left != 0:
            n_rows = PAGE_ROWS if left is None else min(PAGE_ROWS, left)
            with self._connection() as connection:
                rows = connection.execute(page.limit(n_rows)).all()
            for row in rows:
                yield row[1], row[2]
            if len(rows) < n_rows:
                return
            left = None if left is None else left - n_rows
            page = rows_of.where(tuple_(*_POSITION) > tuple_(*rows[-1][:2]))

    def _follow(self, connection: Connection, episode: Episode) -> bool:
        """Put `episode` in the place of the open one that it continues; False when there is nothing to change."""
        there = _episodes.c.id == str(episode.id)
        body = connection.scalar(select(_episodes.c.body).where(there))
        following = follow(self._decode(Episode, episode.id, body or ""), episode, str(self.path))
        if following is not None:
            connection.execute(update(_episodes).where(there).values(_to_row(following)))
        return following is not None

    def _decode(self, kind: type[Stored], episode_id: str, text: str) -> Stored:
        try:
            return from_body(kind, text)
        except ValueError as error:
            raise StoreError(
                f"{self.path}: episode {episode_id} cannot be read: {error}; open the file with the loraloop that wrote it "
                "if that is a newer one, else restore the file from a backup"
            ) from error

    def _prepare_file(self) -> None:
        """Check that the file is ours, or make it so when it is new."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path}: its directory cannot be made: {error}; choose another path") from error
        with self._connection() as connection:
            version = self._check_schema(connection)
            self._enter_wal(connection)
        if version == 0:
            with self._transaction() as connection:
                if self._check_schema(connection) == 0:  # another process may have been faster
                    _schema.create_all(connection)
                    connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _check_schema(self, connection: Connection) -> int:
        """The schema's version, 0 for an empty file; raises StoreError for a newer one and for another program's database."""
        n_tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
        # read second: tables that another process makes come in one commit with the version
        version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} has schema version {version}, and this loraloop knows versions up to {SCHEMA_VERSION}; "
                "upgrade loraloop, or choose another path"
            )
        if version == 0 and n_tables:
            raise StoreError(f"{self.path} is a SQLite database of another program; choose another path")
        return version

    def _enter_wal(self, connection: Connection) -> None:
        """Switch to the write-ahead log, so that readers and the writer do not block each other."""
        deadline = time.monotonic() + BUSY_SECONDS
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
        while mode != "wal":
            try:
                mode = connection.exec_driver_sql("PRAGMA journal_mode = WAL").scalar_one()
            except OperationalError as error:  # SQLite does not wait by itself when several processes do this at once
                if _sqlite_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                if mode != "wal":
                    raise StoreError(f"{self.path}: its file system cannot hold a write-ahead log; choose a path on a local disk")

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """A connection that writes, alone; committed when the block ends well, else rolled back."""
        with self._connection() as connection, self._write_lock:
            connection.execution_options(**{_BEGIN: "BEGIN IMMEDIATE"})
            with connection.begin():
                yield connection

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """A connection of the pool, each statement its own transaction; whatever SQLite reports becomes a StoreError."""
        if self._closed:
            raise StoreError(f"{self.path} was closed; open the store again")
        if os.getpid() != self._pid:  # SQLite's locks are not inherited: going on would damage the file
            raise StoreError(f"{self.path} was opened before this process was forked; open the store again in the child")
        try:
            with self._engine.connect() as connection:
                yield connection
        except (OverflowError, UnicodeEncodeError) as error:
            raise StoreError(
                f"{self.path}: a value to store or to filter by does not fit: {error}; "
                "times and counts are below 2**63, and ids, tasks, groups and names have no lone surrogates"
            ) from error
        except (SQLAlchemyError, sqlite3.Error) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            advice = _ADVICE.get(_sqlite_code(error), "close it everywhere and try again; if that changes nothing, report this")
            raise StoreError(f"{self.path}: {advice} ({cause})") from error


def _to_path(path_or_url: str | Path) -> Path:
    text = str(path_or_url)
    if text == ":memory:":
        raise SettingsError("a store in ':memory:' would be lost at the end; give a path, or use InMemoryEpisodeStore()")
    if isinstance(path_or_url, Path) or "://" not in text:
        return Path(text)
    scheme, _, rest = text.partition("://")
    if scheme not in ("sqlite", "sqlite+pysqlite"):
        raise SettingsError(f"no episode store for {scheme}:// (PostgreSQL is not supported yet); give a path or sqlite:///PATH")
    if not rest.startswith("/") or rest in ("/", "/:memory:") or "?" in rest:
        raise SettingsError(f"{text!r} names no file; give a path, or sqlite:///PATH (four slashes for an absolute one), without options")
    return Path(unquote(rest[1:]))  # by hand, as SQLAlchemy 2.0 and 2.1 differ in whether they unquote


def _set_up_connection(connection: Any, _record: object) -> None:
    # FULL syncs at every commit (0.5 ms on an SSD, against 0.1 ms with NORMAL): an episode is worth more than that, and a batch
    # is one commit. fullfsync is the same for macOS, where fsync alone leaves the data in the drive's cache.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA fullfsync = ON")


def _begin(connection: Connection) -> None:
    statement = connection.get_execution_options().get(_BEGIN)
    if statement:
        connection.exec_driver_sql(statement)


def _to_row(episode: Episode) -> dict[str, str | int | None]:
    body = to_body(episode)  # first, as it finds what is not valid
    return {
        "id": str(episode.id),
        "created_at": episode.metadata.created_at,
        "learn_model": episode.learn_model,
        "scenario": episode.metadata.scenario,
        "outcome": episode.outcome.kind,
        "task_id": episode.task_id,
        "group_id": episode.group_id,
        "meta": to_body(episode.to_dto()),
        "body": body,
    }


def _conditions(wanted: EpisodeFilter) -> list[ColumnElement[bool]]:
    """`EpisodeFilter.matches` in SQL."""
    values = ((_episodes.c[name], getattr(wanted, name)) for name in _FILTERED_COLUMNS)
    conditions = [column == value for column, value in values if value is not None]
    if wanted.since is not None:
        conditions.append(_episodes.c.created_at >= wanted.since)
    if wanted.until is not None:
        conditions.append(_episodes.c.created_at < wanted.until)
    return conditions


def _sqlite_code(error: Exception) -> int:
    """SQLite's primary result code; 0 when the error is not from SQLite itself."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    if "Could not decode to UTF-8" in str(cause):  # by the driver, which gives no code; nobody but a bad disk writes such text
        return sqlite3.SQLITE_CORRUPT
    return int(getattr(cause, "sqlite_errorcode", 0)) & 0xFF
