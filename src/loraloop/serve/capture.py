"""Every call becomes a record of an episode, and no call waits for that, or fails with it.

A call is given a receipt before it is passed on, and a place in a bounded queue. One thread writes what has ended into a journal, as many
lines as wait with one fsync: from then on the record outlives any death of the process. Another moves the journal into the episode
store. Where there is no place, no disk or no permission, calls are answered as ever: the receipt says so, and the drops are counted.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import JsonValue

from loraloop.episode import Episode, EpisodeId, LlmCallRecord, Outcome, now_ms
from loraloop.errors import ServingError, StoreError
from loraloop.files import json_line, read_jsonl
from loraloop.ids import SortableId
from loraloop.plugins import EpisodeStore
from loraloop.serve.call_record import Call, to_line, to_records
from loraloop.serve.conversations import Conversations, hash_beginnings
from loraloop.serve.episode_book import EpisodeBook, find_stored
from loraloop.serve.journal import Journal

RETRY_SECONDS = 1.0
"""How long after the journal failed calls are not recorded, before it is tried again."""
MAX_STORE_WAIT = 30.0
IDLE_CHECK_SECONDS = 60.0
OnOutcome = Callable[[frozenset[str], Outcome], None]


class UnknownEpisode(ServingError):
    """No call of that episode came through this router, and the store has none of that name."""


class RecordId(SortableId):
    """The receipt of a call."""

    prefix: ClassVar[str] = "rec"


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """How much waits, how long, and when an episode is over."""

    max_queued: int = 1000
    """Calls that are under way or wait for the journal, at most; further ones are answered and not recorded."""
    max_journal_bytes: int = 1 << 30
    """The journal's size while the store takes nothing, at most."""
    segment_bytes: int = 4 << 20
    store_seconds: float = 2.0
    """How long a record is in the journal alone before it goes into the store, about."""
    idle_seconds: float = 3600.0
    """An episode without an outcome is closed so long after its last call."""
    max_known: int = 100_000
    """How many receipts can be asked for by name."""


@dataclass(frozen=True)
class Receipt:
    """What a call is given before it is passed on."""

    id: str
    episode: str
    before: bytes
    """The hash of the messages that it came with."""
    refused: str | None = None
    """Why it will not be recorded."""

    @property
    def header(self) -> str:
        """The record's id; or that there is none, and why."""
        return self.id if self.refused is None else f"none; {self.refused}"


State = Literal["queued", "recorded", "dropped"]


@dataclass
class _Known:
    """What became of a record."""

    episode: str
    state: State = "queued"
    why: str = ""


@dataclass
class _Waiting:
    """A line on its way into the journal."""

    line: Mapping[str, Any]
    receipt: Receipt | None = None
    kept: Future[None] | None = None
    problem: Exception | None = None


class Recorder:
    """Records into `folder`, which it has to itself, and from there into `store`.

    `on_outcome` is told which versions answered in an episode, and how it ended, once that is on the disk; in the event loop's thread.
    """

    def __init__(
        self, folder: Path, store: EpisodeStore, *, on_outcome: OnOutcome | None = None, settings: CaptureSettings | None = None
    ) -> None:
        self._settings = settings or CaptureSettings()
        self._on_outcome = on_outcome
        self._store = store
        self._journal = Journal(folder)
        self._book = EpisodeBook(folder, store)
        self._conversations = Conversations()
        self._versions: OrderedDict[str, set[str]] = OrderedDict()  # episode -> the versions that answered
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._lock = threading.Lock()  # of what the threads share: the queue, what is known, the counts
        self._ready = threading.Condition(self._lock)
        self._queue: deque[_Waiting] = deque()
        self._n_reserved = 0
        self._counts = {"recorded": 0, "dropped": 0, "unreadable": 0}
        self._last_error = ""
        self._broken_until = 0.0
        self._journal_bytes = 0
        self._is_closing = False
        self._sealed = threading.Event()
        self._threads: list[threading.Thread] = []

    # --- life ---------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take up what was left by the last one, and begin. A store that takes nothing now is tried again later.

        Raises LeaseHeld when another process records into the folder, OSError when it cannot be used.
        """
        self._journal.open()
        try:
            self._book.load()
            self._store_sealed()
            for episode in self._book.load():
                self._recall(episode)
        except StoreError as error:
            self._last_error = str(error)
        self._threads = [
            threading.Thread(target=self._write_journal, name="loraloop-journal"),
            threading.Thread(target=self._move_to_store, name="loraloop-capture"),
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Write down what waits, move it into the store where that takes it, and end; a second time does nothing."""
        with self._ready:
            self._is_closing = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads = []
        self._journal.close()

    def status(self) -> dict[str, JsonValue]:
        """What waits, what was recorded and dropped since the start, and the last trouble."""
        with self._lock:
            counts: dict[str, JsonValue] = {"queued": self._n_reserved, **self._counts, "journal_bytes": self._journal_bytes}
            return {**counts, "last_error": self._last_error or None}

    # --- calls --------------------------------------------------------------------------------------------------------------

    def begin(self, alias: str, messages: Sequence[Mapping[str, Any]], episode: str | None) -> Receipt:
        """The receipt of a call that is about to be passed on, and the episode it belongs to. Followed by `end` or `cancel`."""
        hashes = hash_beginnings(alias, messages)
        found = episode or self._conversations.find(hashes, messages) or str(EpisodeId.new())
        before = hashes[-1] if hashes else b""
        with self._lock:
            refused = self._why_not()
            if refused is not None:
                self._counts["dropped"] += 1
                return Receipt("", found, before, refused)
            receipt = Receipt(str(RecordId.new()), found, before)
            self._n_reserved += 1
            self._remember(receipt.id, _Known(found))
        return receipt

    def end(self, receipt: Receipt, call: Call) -> None:
        """The call is over: its answer can be gone on with, and it is recorded where it has a receipt."""
        if call.error is None:
            for choice in call.answer.choices.values():
                self._conversations.add(receipt.before, choice.message, receipt.episode)
        if receipt.refused is not None:
            return
        with self._ready:
            self._versions.setdefault(receipt.episode, set()).add(call.version)
            self._versions.move_to_end(receipt.episode)
            while len(self._versions) > self._settings.max_known:
                self._versions.popitem(last=False)
            self._queue.append(_Waiting(to_line(receipt.id, receipt.episode, call), receipt))
            self._ready.notify()

    def cancel(self, receipt: Receipt) -> None:
        """The call was never passed on."""
        if receipt.refused is None:
            with self._lock:
                self._n_reserved -= 1
                self._known.pop(receipt.id, None)

    async def find_record(self, record_id: str) -> dict[str, JsonValue]:
        """`state` recorded (with the record, once the store has it), queued, dropped or unknown (with `why`)."""
        with self._lock:
            known = self._known.get(record_id)
        if known is None:
            return {"state": "unknown", "why": f"no record {record_id!r} is known here any more; its episode has it, if it was recorded"}
        told: dict[str, JsonValue] = {"id": record_id, "episode": known.episode, "state": known.state}
        if known.state == "dropped":
            return {**told, "why": f"record {record_id} was dropped: {known.why}"}
        if known.state == "recorded":
            told["records"] = await asyncio.to_thread(self._read_records, record_id, known.episode)
        return told

    # --- outcomes -----------------------------------------------------------------------------------------------------------

    async def add_outcome(self, episode: str, outcome: Outcome | None, comment: str) -> None:
        """Say how an episode ended, or only something about it; on the disk when this returns.

        Raises UnknownEpisode; StoreError when it cannot be told whether there is such an episode; OSError when it cannot be written.
        """
        with self._lock:
            versions = frozenset(self._versions.get(episode, ()))
        if not versions:
            versions = await asyncio.to_thread(self._find_versions, episode)
        line = {"kind": "outcome", "episode": episode, "outcome": _to_json(outcome), "comment": comment, "at": now_ms()}
        kept: Future[None] = Future()
        with self._ready:
            if self._is_closing or not self._threads:
                raise OSError("the recorder is closed")
            self._queue.append(_Waiting(line, kept=kept))
            self._ready.notify()
        await asyncio.wrap_future(kept)
        if outcome is not None and self._on_outcome is not None:
            self._on_outcome(versions, outcome)

    def _find_versions(self, episode: str) -> frozenset[str]:
        found = find_stored(self._store, episode)
        if not found:
            raise UnknownEpisode(f"no episode {episode!r}; the header X-Loraloop-Episode of each answer names its episode")
        return frozenset(record.model for record in found)

    # --- the thread of the journal ------------------------------------------------------------------------------------------

    def _write_journal(self) -> None:
        while True:
            with self._ready:
                if not self._queue and not self._is_closing:
                    self._ready.wait(timeout=self._settings.store_seconds / 2)
                waiting, self._queue = list(self._queue), deque()
                is_last = self._is_closing and not waiting
            if waiting:
                self._write(waiting)
            is_due = self._journal.age_seconds >= self._settings.store_seconds or self._journal.size_bytes >= self._settings.segment_bytes
            if is_due or is_last:
                self._journal.seal()
                self._sealed.set()
            if is_last:
                return

    def _write(self, waiting: Sequence[_Waiting]) -> None:
        lines: list[str] = []
        for each in waiting:
            try:
                lines.append(json_line(each.line))
            except (ValueError, RecursionError) as odd:  # such as a NaN among a server's log-probabilities: this record, no other
                each.problem = odd
        error: OSError | None = None
        try:
            self._journal.append(lines)
        except OSError as caught:
            error = caught
        size = self._count_bytes()
        with self._lock:
            self._journal_bytes = size
            if error is not None:
                self._last_error = f"the journal cannot be written: {error}"
                self._broken_until = time.monotonic() + RETRY_SECONDS
            for each in waiting:
                each.problem = each.problem or error
                if each.receipt is not None:
                    self._settle(each.receipt, each.problem)
        for each in waiting:
            if each.kept is not None and not each.kept.cancelled():
                with suppress(Exception):  # whoever waited has left meanwhile
                    each.kept.set_exception(each.problem) if each.problem is not None else each.kept.set_result(None)

    def _settle(self, receipt: Receipt, error: Exception | None) -> None:
        self._n_reserved -= 1
        self._counts["dropped" if error is not None else "recorded"] += 1
        if error is not None and not isinstance(error, OSError):
            self._last_error = f"record {receipt.id} cannot be written as JSON: {error}"
        known = self._known.get(receipt.id)
        if known is not None:
            known.state, known.why = ("recorded", "") if error is None else ("dropped", str(error))

    # --- the thread of the store --------------------------------------------------------------------------------------------

    def _move_to_store(self) -> None:
        wait, checked = 0.0, time.monotonic()
        while True:
            self._sealed.wait(timeout=wait or min(IDLE_CHECK_SECONDS, self._settings.idle_seconds))
            self._sealed.clear()
            is_last = self._is_closing and not self._threads[0].is_alive()
            try:
                self._store_sealed()
                if time.monotonic() - checked >= min(IDLE_CHECK_SECONDS, self._settings.idle_seconds):
                    self._book.close_idle(round(self._settings.idle_seconds * 1000))
                    checked = time.monotonic()
                wait = 0.0
            except (StoreError, OSError) as error:
                wait = min(MAX_STORE_WAIT, max(0.5, 2 * wait))
                with self._lock:
                    self._last_error = f"the store takes nothing: {error}"
            if is_last:
                return
            if self._is_closing:
                self._threads[0].join()
                self._sealed.set()

    def _store_sealed(self) -> None:
        """Move each sealed segment into the store. Raises StoreError or OSError at the first that it does not take."""
        for segment in self._journal.sealed():
            n_unreadable = self._book.store(read_jsonl(segment))
            self._journal.remove(segment)
            size = self._count_bytes()
            with self._lock:
                self._counts["unreadable"] += n_unreadable
                self._journal_bytes = size

    # --- within -------------------------------------------------------------------------------------------------------------

    def _why_not(self) -> str | None:
        """Why nothing is recorded now; the lock is held."""
        if self._is_closing or not self._threads:
            return "the recorder is closed"
        if self._n_reserved >= self._settings.max_queued:
            return "the queue is full"
        if self._journal_bytes >= self._settings.max_journal_bytes:
            return "the journal is full, as the store takes nothing"
        if time.monotonic() < self._broken_until:
            return "the journal cannot be written"
        return None

    def _remember(self, record_id: str, known: _Known) -> None:
        self._known[record_id] = known
        while len(self._known) > self._settings.max_known:
            self._known.popitem(last=False)

    def _recall(self, episode: Episode) -> None:
        """What an open episode of the last run can be gone on with, and what its records are."""
        name = episode.metadata.tags.get("part_of") or str(episode.id)
        for record in episode.records:
            if not isinstance(record, LlmCallRecord) or record.served is None:
                continue
            self._versions.setdefault(name, set()).add(record.model)
            self._remember(record.served.id, _Known(name, "recorded"))
            if record.error is None:
                hashes = hash_beginnings(record.served.alias, [message.to_openai() for message in record.messages])
                self._conversations.add(hashes[-1] if hashes else b"", record.response.to_openai(), name)

    def _read_records(self, record_id: str, episode: str) -> list[JsonValue]:
        """The records of a call, from the journal or the store; none where neither can be read now."""
        for segment in self._journal.segments():
            with suppress(OSError, ValueError):
                for line in read_jsonl(segment, skip_torn=True):
                    if line.get("id") == record_id:
                        return [record.model_dump() for record in to_records(line)]
        with suppress(StoreError):
            return [record.model_dump() for record in find_stored(self._store, episode) if record.served and record.served.id == record_id]
        return []

    def _count_bytes(self) -> int:
        try:
            return self._journal.total_bytes()
        except OSError:
            return self._journal_bytes


def _to_json(outcome: Outcome | None) -> dict[str, JsonValue] | None:
    if outcome is None:
        return None
    return {key: value for key, value in vars(outcome).items() if not key.startswith("_")}
