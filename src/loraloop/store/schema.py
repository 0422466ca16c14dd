"""The tables of an episode store, the same on SQLite and PostgreSQL.

`episodes` has what is filtered and listed by, and the keys of each episode's blobs in their order; `bodies` the rest of its text; `blobs`
every large part once. Nothing counts how often a blob is used: forgetting looks through the keys, which are few bytes.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, Dialect, Index, Integer, LargeBinary, MetaData, String, Table, Text
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import TypeDecorator, TypeEngine

from loraloop.files import content_hash

SCHEMA_VERSION = 3
"""What this loraloop writes; in `loraloop_schema`, and in SQLite's `user_version` too, where version 1 looks."""
MAX_INDEXED_BYTES = 400
"""PostgreSQL indexes no text of more than 2,700 bytes, and three of them are in one entry."""


class FilterText(TypeDecorator[str]):
    """Text that is only compared and ordered, byte by byte; what is read back is in `meta`.

    PostgreSQL has no NUL and indexes no long text. There NUL becomes backslash and 0, a backslash two, and a long text its beginning
    and a hash.
    """

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Compared by bytes on both."""
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.TEXT(collation="C"))
        return dialect.type_descriptor(Text())

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """As PostgreSQL can hold and index it."""
        if value is None or dialect.name != "postgresql":
            return value
        escaped = value.replace("\\", "\\\\").replace("\0", "\\0")
        if len(escaped.encode()) <= MAX_INDEXED_BYTES:
            return escaped
        return f"{escaped[:60]}\\#{content_hash(value)}"


SEQUENCE = BigInteger().with_variant(Integer, "sqlite")
"""In the order of commits, as there is one writer at a time."""
FILTERED_COLUMNS = ("learn_model", "scenario", "outcome", "task_id", "group_id")

metadata = MetaData()
episodes = Table(
    "episodes",
    metadata,
    Column("seq", SEQUENCE, primary_key=True, autoincrement=False),
    Column("id", FilterText, nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("learn_model", FilterText, nullable=False),
    Column("scenario", FilterText),
    Column("outcome", FilterText, nullable=False),
    Column("task_id", FilterText),
    Column("group_id", FilterText),
    Column("meta", LargeBinary, nullable=False),  # the EpisodeDto, packed
    Column("blob_keys", LargeBinary, nullable=False),  # of its blobs, one after another
    Index("episodes_by_position", "created_at", "id"),
    # with the outcome, so that counting by one of them and how it ended reads no rows
    *(Index(f"episodes_by_{name}", *dict.fromkeys((name, "created_at", "id", "outcome"))) for name in FILTERED_COLUMNS),
)
bodies = Table(
    "bodies",
    metadata,
    Column("seq", SEQUENCE, primary_key=True, autoincrement=False),
    Column("body", LargeBinary, nullable=False),
)
blobs = Table(
    "blobs",
    metadata,
    # a number of its own, so that SQLite adds at the end of a file of data, and only the index is in the order of keys
    Column("number", SEQUENCE, primary_key=True, autoincrement=True),
    Column("key", LargeBinary, nullable=False, unique=True),
    Column("data", LargeBinary, nullable=False),
)
labels = Table(
    "labels",
    metadata,
    Column("number", SEQUENCE, primary_key=True, autoincrement=True),
    Column("episode_id", FilterText, nullable=False),
    Column("label", Text, nullable=False),  # a Label as JSON
    Index("labels_by_episode", "episode_id", "number"),
)
tombstones = Table(
    "tombstones",
    metadata,
    Column("episode_id", FilterText, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("forgotten_at", BigInteger, nullable=False),
)
events = Table(
    "events",
    metadata,
    Column("number", SEQUENCE, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("kind", FilterText, nullable=False),
    Column("subject", FilterText, nullable=False),
    Column("data", Text, nullable=False),  # JSON
    Index("events_by_subject", "subject", "number"),
)
notes = Table(
    "notes",
    metadata,
    Column("name", FilterText, primary_key=True),
    Column("edition", BigInteger, nullable=False),
    Column("data", Text, nullable=False),  # JSON
)
ADDED_IN_3 = (events, notes)
generation = Table("generation", metadata, Column("value", BigInteger, primary_key=True, autoincrement=False))
"""One row, which grows whenever something was forgotten: what a process knows to be there is then asked for again."""
version = Table("loraloop_schema", metadata, Column("version_num", String(32), primary_key=True))
"""Kept by Alembic."""
