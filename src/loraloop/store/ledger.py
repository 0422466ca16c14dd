"""What happened, as events that are only ever added, and what must not be forgotten, as notes that are written anew.

A note and the events that go with it are one transaction: whoever finds the note as it was knows that nothing of it has happened. Each
writing of a note has an edition, so that of two who change the same one the second is told.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field, JsonValue
from sqlalchemy import Connection, insert, select, update

from loraloop.episode import Frozen, now_ms
from loraloop.errors import StoreError
from loraloop.files import json_line
from loraloop.store.database import Database
from loraloop.store.schema import events, notes
from loraloop.store.text import escape_surrogates

PAGE_ROWS = 500


class Event(Frozen):
    """One thing that happened. `number` is 0 until it is kept, then in the order of commits."""

    kind: str
    """What, in a word or two: `gate`, `apply`."""
    subject: str = ""
    """To what: an alias, a run, a model."""
    data: dict[str, JsonValue] = Field(default_factory=dict)
    at: int = Field(default_factory=now_ms)
    """When, in Unix milliseconds."""
    number: int = 0


class Note(Frozen):
    """What is kept under a name; edition 0 is one that nobody has written yet."""

    name: str
    data: dict[str, JsonValue] = Field(default_factory=dict)
    edition: int = 0


class NoteChanged(StoreError):
    """Another has written the note meanwhile."""


class Ledger:
    """The events and notes of one store. Every failure is a StoreError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, *happened: Event) -> None:
        """Keep events, all or none."""
        with self._database.writing() as connection:
            _add(connection, happened)

    def iter_events(self, *, after: int = 0, kind: str | None = None, subject: str | None = None) -> Iterator[Event]:
        """The events with a number above `after`, oldest first, in pages, so that memory does not grow with them."""
        wanted = select(events).order_by(events.c.number).limit(PAGE_ROWS)
        for column, value in ((events.c.kind, kind), (events.c.subject, subject)):
            if value is not None:
                wanted = wanted.where(column == value)
        while True:
            with self._database.reading() as connection:
                rows = connection.execute(wanted.where(events.c.number > after)).all()
            for row in rows:
                data = json.loads(row.data)
                yield Event(kind=data["kind"], subject=data["subject"], data=data["data"], at=row.at, number=row.number)
            if len(rows) < PAGE_ROWS:
                return
            after = rows[-1].number

    def read(self, name: str) -> Note:
        """The note of that name; one with edition 0 and no data where nobody has written it."""
        with self._database.reading() as connection:
            return _read(connection, name)

    def write(self, note: Note, *happened: Event) -> Note:
        """Write `note` in the place of the one that it was read as, with the events that go with it: all or none. The note as kept.

        Raises NoteChanged when it has another edition by now, and then keeps nothing.
        """
        with self._database.writing() as connection:
            found = _read(connection, note.name).edition
            if found != note.edition:
                raise NoteChanged(f"{note.name!r} was read in edition {note.edition} and is at {found} now; read it again")
            kept = note.model_copy(update={"edition": found + 1})
            row = {"edition": kept.edition, "data": _to_json(note.name, note.data)}
            if found:
                connection.execute(update(notes).where(notes.c.name == note.name).values(**row))
            else:
                connection.execute(insert(notes).values(name=note.name, **row))
            _add(connection, happened)
        return kept


def _read(connection: Connection, name: str) -> Note:
    row = connection.execute(select(notes).where(notes.c.name == name)).first()
    return Note(name=name) if row is None else Note(name=name, data=json.loads(row.data), edition=row.edition)


def _add(connection: Connection, happened: Sequence[Event]) -> None:
    if happened:
        rows = [
            {
                "at": event.at,
                "kind": event.kind,
                "subject": event.subject,
                "data": _to_json(event.kind, {"kind": event.kind, "subject": event.subject, "data": event.data}),
            }
            for event in happened
        ]
        connection.execute(insert(events), rows)


def _to_json(name: str, data: Mapping[str, JsonValue]) -> str:
    try:
        return escape_surrogates(json_line(data))
    except (ValueError, TypeError) as error:
        raise StoreError(f"{name!r} cannot be stored as JSON: {error}; correct that value") from error
