"""Events and notes: both kept or neither, in order, and nobody writes over what another has written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loraloop.errors import StoreError
from loraloop.store.ledger import PAGE_ROWS, Event, Ledger, Note, NoteChanged
from loraloop.store.sql import SqlEpisodeStore


@pytest.fixture(params=["sqlite", "postgresql"])
def open_ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Ledger]]:
    """Opens the ledger of one store, on SQLite and on a real server; each call is another process's view."""
    where = tmp_path / "episodes.db" if request.param == "sqlite" else request.getfixturevalue("make_url")()
    stores: list[SqlEpisodeStore] = []

    def open_one() -> Ledger:
        stores.append(SqlEpisodeStore(where))
        return stores[-1].ledger

    yield open_one
    for store in stores:
        store.close()


def test_events_come_back_in_order_by_kind_and_by_subject(open_ledger):
    ledger = open_ledger()
    ledger.add(Event(kind="gate", subject="agent", data={"n": 1}, at=7), Event(kind="apply", subject="other"))
    ledger.add(Event(kind="gate", subject="a \0 b", data={"text": "\ud83e \0 é"}))
    numbers = [event.number for event in open_ledger().iter_events()]
    assert numbers == sorted(set(numbers))
    assert [event.subject for event in ledger.iter_events(kind="gate")] == ["agent", "a \0 b"]
    assert [event.data for event in ledger.iter_events(subject="agent")] == [{"n": 1}]
    assert next(ledger.iter_events()).at == 7
    assert [event.data for event in ledger.iter_events(after=numbers[1])] == [{"text": "\ud83e \0 é"}]


def test_more_events_than_a_page(open_ledger):
    ledger = open_ledger()
    ledger.add(*(Event(kind="count", data={"n": n}) for n in range(2 * PAGE_ROWS + 1)))
    assert [event.data["n"] for event in ledger.iter_events()] == list(range(2 * PAGE_ROWS + 1))


def test_a_note_and_its_events_are_kept_together_or_not_at_all(open_ledger):
    ledger, other = open_ledger(), open_ledger()
    first = ledger.write(Note(name="cycle", data={"stage": "build"}), Event(kind="stage", data={"stage": "build"}))
    assert (first.edition, other.read("cycle")) == (1, first)
    second = other.write(first.model_copy(update={"data": {"stage": "train"}}))
    with pytest.raises(NoteChanged, match="edition 1 and is at 2"):
        ledger.write(first.model_copy(update={"data": {"stage": "lost"}}), Event(kind="stage", data={"stage": "lost"}))
    assert ledger.read("cycle") == second
    with pytest.raises(StoreError, match="cannot be stored as JSON"):
        ledger.write(second, Event(kind="stage").model_copy(update={"data": {"loss": float("nan")}}))
    assert ledger.read("cycle") == second
    assert [event.data for event in ledger.iter_events()] == [{"stage": "build"}]
    assert ledger.read("another") == Note(name="another")


def test_of_threads_that_count_up_one_note_none_is_lost(open_ledger):
    ledgers = [open_ledger() for _ in range(4)]

    def count(ledger: Ledger) -> None:
        for _ in range(10):
            while True:
                note = ledger.read("count")
                try:
                    ledger.write(note.model_copy(update={"data": {"n": int(note.data.get("n", 0)) + 1}}), Event(kind="one more"))
                except NoteChanged:
                    continue
                break

    threads = [threading.Thread(target=count, args=[ledger]) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledgers[0].read("count") == Note(name="count", data={"n": 40}, edition=40)
    assert len(list(ledgers[0].iter_events())) == 40


_COUNT = """
import sys
from loraloop.store.ledger import Event
from loraloop.store.sql import SqlEpisodeStore
with SqlEpisodeStore(sys.argv[1]) as store:
    while True:
        note = store.ledger.read("count")
        store.ledger.write(note.model_copy(update={"data": {"n": note.edition + 1}}), Event(kind="one more", data={"n": note.edition + 1}))
        print(note.edition + 1, flush=True)
"""


def test_what_a_killed_process_acknowledged_is_there_with_its_event(tmp_path):
    path = tmp_path / "episodes.db"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", _COUNT, str(path)], stdout=subprocess.PIPE, text=True)
        seen = [process.stdout.readline() for _ in range(20)]
        os.kill(process.pid, signal.SIGKILL)
        with process.stdout as rest:
            seen += rest
        process.wait()
        acknowledged = int([line for line in seen if line.endswith("\n")][-1])
        with SqlEpisodeStore(path) as store:
            note, told = store.ledger.read("count"), [event.data["n"] for event in store.ledger.iter_events()]
        assert note.edition in (acknowledged, acknowledged + 1)
        assert told == list(range(1, note.edition + 1))
