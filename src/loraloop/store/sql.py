"""An episode store in a SQLite file or on a PostgreSQL server, for any number of threads and processes.

What `append` has acknowledged survives the death of the process and a power cut. One writer at a time, readers never wait for it.
Episodes are only ever added, labelled and, when asked for, forgotten; one that is open is continued. Every failure is a StoreError
that names the store and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Row, Select, bindparam, func, select, tuple_

from loraloop.episode import Episode, EpisodeDto, EpisodeFilter, Label
from loraloop.errors import StoreError
from loraloop.store.database import Database
from loraloop.store.labelling import recorded_label
from loraloop.store.ledger import Ledger
from loraloop.store.parts import Unpacker, decode, split_keys
from loraloop.store.postgres import SCHEMES, PostgresDatabase
from loraloop.store.rows import chunks, conditions
from loraloop.store.schema import blobs, bodies, episodes
from loraloop.store.sqlite import SqliteDatabase
from loraloop.store.text import from_body
from loraloop.store.writer import Writer, read_labels

PAGE_ROWS = 100
"""How many episodes an iteration fetches at a time, as text."""

_POSITION = (episodes.c.created_at, episodes.c.id)
_WHOLE: Select[Any] = select(*_POSITION, episodes.c.meta, episodes.c.blob_keys, bodies.c.body).join(bodies, bodies.c.seq == episodes.c.seq)
_ONE: Select[Any] = _WHOLE.where(episodes.c.id == bindparam("wanted"))


class SqlEpisodeStore:
    """Keeps episodes at `path_or_url`: a path or a `sqlite:///` URL, made when missing; or `postgresql+psycopg://USER@HOST/DATABASE`.

    Use it from any thread, as a context manager or with `close()`. Several processes may have it open; a forked child opens its own.
    Raises SettingsError for any other URL, StoreError when it cannot be opened, is no store or is too new.
    """

    def __init__(self, path_or_url: str | Path) -> None:
        is_server = isinstance(path_or_url, str) and path_or_url.partition("://")[0] in SCHEMES
        self._database: Database = PostgresDatabase(str(path_or_url)) if is_server else SqliteDatabase(path_or_url)
        self._writer = Writer(self._database)
        self.ledger = Ledger(self._database)
        """What happened to the loop round these episodes, and what it must not forget."""
        try:
            self._database.prepare()
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path | None:
        """The file; None for a server."""
        return self._database.path if isinstance(self._database, SqliteDatabase) else None

    @property
    def where(self) -> str:
        """The file, or the server's URL without its password."""
        return self._database.where

    def close(self) -> None:
        """Close the store, after the last use in any thread; a second time does nothing."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def append(self, episode: Episode) -> bool:
        """Keep `episode`; False when the very same is there already, whatever its `created_at`, or one that continues it, or when it
        was forgotten.

        One that continues an open episode takes its place. Raises StoreError when another episode has its id, or when it cannot be
        kept whole: NaN or infinity anywhere, a lone surrogate in its learn model, scenario, task or group.
        """
        return self.append_many([episode])[0]

    def append_many(self, episodes: Sequence[Episode]) -> list[bool]:
        """`append` for each in order, in one transaction: all or none; an empty sequence gives an empty list."""
        return self._writer.append(episodes, self._find)

    def get(self, episode_id: str) -> Episode:
        """The episode; raises StoreError when there is none."""
        episode = self.find(episode_id)
        if episode is None:
            raise StoreError(self._no_episode(episode_id))
        return episode

    def find(self, episode_id: str) -> Episode | None:
        """The episode, or None."""
        with self._database.reading() as connection:
            return self._find(connection, episode_id)

    def iter_episodes(self, episode_filter: EpisodeFilter | None = None) -> Iterator[Episode]:
        """The episodes that match, in order; those that were there at the first step and were not forgotten since.

        Memory is bounded by `PAGE_ROWS`, and no transaction stays open between steps.
        """
        unpacker = Unpacker()
        for rows, texts in self._iter_pages(episode_filter or EpisodeFilter(), _WHOLE):
            for row in rows:
                yield self._decode(row, texts, unpacker)

    def query(self, episode_filter: EpisodeFilter | None = None) -> list[Episode]:
        """`iter_episodes` as a list."""
        return list(self.iter_episodes(episode_filter))

    def list_meta(self, episode_filter: EpisodeFilter | None = None) -> list[EpisodeDto]:
        """The episodes that match, without messages and records, in order; the bodies are not read."""
        unpacker = Unpacker()
        pages = self._iter_pages(episode_filter or EpisodeFilter(), select(*_POSITION, episodes.c.meta))
        return [self._decode_meta(row, unpacker) for rows, _ in pages for row in rows]

    def count(self, episode_filter: EpisodeFilter | None = None) -> int:
        """How many match; `limit` and `offset` do not change it."""
        matching = conditions(episode_filter or EpisodeFilter())
        with self._database.connecting() as connection:
            return connection.scalar(select(func.count()).select_from(episodes).where(*matching)) or 0

    def add_labels(self, labels: Sequence[Label]) -> None:
        """Say how episodes ended, in order, in one transaction: all or none.

        Each is read, listed and filtered with its newest outcome from now on. Raises StoreError when one of them is not there.
        """
        self._writer.add_labels(labels)

    def get_labels(self, episode_id: str) -> list[Label]:
        """What was said of its outcome, oldest first; the first is what it was recorded with. Raises StoreError when it is not there."""
        with self._database.reading() as connection:
            episode = self._find(connection, episode_id)
            if episode is None:
                raise StoreError(self._no_episode(episode_id))
            return read_labels(connection, episode_id) or [recorded_label(episode)]

    def forget(self, episode_ids: Sequence[str], *, by_content: bool = True) -> int:
        """Remove episodes, their labels and every blob that no other episode has, and keep out what has their id or content.

        How many were there. Without `by_content` only what has their id is kept out. On SQLite the bytes are overwritten, in the file
        itself when its log is written back, at the latest when the store is closed; backups are not. Looks through the keys of all
        episodes once.
        """
        return self._writer.forget(episode_ids, by_content=by_content)

    def find_forgotten(self, episodes: Sequence[Episode]) -> list[bool]:
        """Of each whether it is kept out."""
        return self._writer.find_forgotten(episodes)

    def readmit(self, episodes: Sequence[Episode]) -> None:
        """Keep these out no longer."""
        self._writer.readmit(episodes)

    def _iter_pages(self, wanted: EpisodeFilter, statement: Select[Any]) -> Iterator[tuple[Sequence[Row[Any]], Mapping[bytes, bytes]]]:
        """Rows in pages, each found by the position of the last row of the one before, and the texts of the blobs that they name."""
        with self._database.connecting() as connection:
            newest = connection.scalar(select(func.max(episodes.c.seq))) or 0
        rows_of = statement.where(episodes.c.seq <= newest, *conditions(wanted)).order_by(*_POSITION)
        page, left = rows_of.offset(wanted.offset), wanted.limit
        while left != 0:
            n_rows = PAGE_ROWS if left is None else min(PAGE_ROWS, left)
            with self._database.reading() as connection:
                rows = connection.execute(page.limit(n_rows)).all()
                joined = [row.blob_keys for row in rows] if "blob_keys" in statement.selected_columns else []
                texts = self._read_blobs(connection, joined)
            yield rows, texts
            if len(rows) < n_rows:
                return
            left = None if left is None else left - n_rows
            page = rows_of.where(tuple_(*_POSITION) > tuple_(*rows[-1][:2]))

    def _find(self, connection: Connection, episode_id: str) -> Episode | None:
        row = connection.execute(_ONE, {"wanted": str(episode_id)}).first()
        if row is None:
            return None
        return self._decode(row, self._read_blobs(connection, [row.blob_keys]), Unpacker())

    def _read_blobs(self, connection: Connection, joined: Sequence[bytes]) -> dict[bytes, bytes]:
        """The texts of all keys in these values, packed."""
        wanted = {key for keys in joined for key in split_keys(keys)}
        texts: dict[bytes, bytes] = {}
        for chunk in chunks(wanted):
            rows = connection.execute(select(blobs.c.key, blobs.c.data).where(blobs.c.key.in_(chunk)))
            texts |= {row.key: row.data for row in rows}
        return texts

    def _decode(self, row: Row[Any], packed: Mapping[bytes, bytes], unpacker: Unpacker) -> Episode:
        try:
            keys = split_keys(row.blob_keys)
            texts = {key: unpacker.unpack_blob(key, packed[key]) for key in keys}
            return decode(unpacker.unpack(row.meta), unpacker.unpack(row.body), keys, texts)
        except KeyError as error:
            raise StoreError(self._unreadable(row.id, f"it lacks {error}")) from error
        except (ValueError, TypeError, AttributeError) as error:  # of a text that is another kind of value
            raise StoreError(self._unreadable(row.id, error)) from error

    def _decode_meta(self, row: Row[Any], unpacker: Unpacker) -> EpisodeDto:
        try:
            return from_body(EpisodeDto, unpacker.unpack(row.meta))
        except (ValueError, TypeError, AttributeError) as error:
            raise StoreError(self._unreadable(row.id, error)) from error

    def _no_episode(self, episode_id: str) -> str:
        return f"no episode {str(episode_id)!r} in {self.where}; `loraloop episodes list` shows those that are there"

    def _unreadable(self, episode_id: str, error: object) -> str:
        return (
            f"{self.where}: episode {episode_id} cannot be read: {error}; open the store with the loraloop that wrote it "
            "if that is a newer one, else restore it from a backup"
        )
