"""Rows of the tables: made of episodes, and read back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

from sqlalchemy import ColumnElement, Connection, Table
from sqlalchemy.dialects import postgresql, sqlite

from loraloop.episode import Episode, EpisodeFilter
from loraloop.store.parts import Encoded, Packer, join_keys
from loraloop.store.schema import FILTERED_COLUMNS, episodes

CHUNK = 500
"""Values in one statement; SQLite allows a thousand at least."""

Value = TypeVar("Value")


def to_row(seq: int, episode: Episode, encoded: Encoded, packer: Packer) -> dict[str, object]:
    """The row of `episodes`."""
    return {
        "seq": seq,
        "id": str(episode.id),
        "created_at": episode.metadata.created_at,
        "learn_model": episode.learn_model,
        "scenario": episode.metadata.scenario,
        "outcome": episode.outcome.kind,
        "task_id": episode.task_id,
        "group_id": episode.group_id,
        "meta": packer.pack(encoded.meta),
        "blob_keys": join_keys(encoded.keys),
    }


def insert_new(connection: Connection, table: Table, rows: Sequence[Mapping[str, object]]) -> None:
    """Add those rows whose key is not there."""
    if rows:
        kind = postgresql if connection.dialect.name == "postgresql" else sqlite
        connection.execute(kind.insert(table).on_conflict_do_nothing(), rows)


def chunks(values: Iterable[Value]) -> Iterator[list[Value]]:
    """`values` in lists of at most `CHUNK`."""
    rest = iter(values)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


def conditions(wanted: EpisodeFilter) -> list[ColumnElement[bool]]:
    """`EpisodeFilter.matches` in SQL."""
    values = ((episodes.c[name], getattr(wanted, name)) for name in FILTERED_COLUMNS)
    found = [column == value for column, value in values if value is not None]
    if wanted.since is not None:
        found.append(episodes.c.created_at >= wanted.since)
    if wanted.until is not None:
        found.append(episodes.c.created_at < wanted.until)
    return found
