"""Files in which the parts of a trace lie anywhere: gathered by trace, in memory only between a trace's first and last part.

The file is gone through twice, once for where each trace ends and once to read; a part that nobody can place is a trace of its own that
cannot be read. Also here: times as the tools write them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

from loraloop.chat.refused_entry import EntryRefused
from loraloop.importers.json_input import iter_entries

Part = TypeVar("Part")
_SECONDS, _MILLIS, _MICROS = 1e11, 1e14, 1e17
"""Below these a number is a time in seconds, milliseconds, microseconds since 1970; above, in nanoseconds."""


@dataclass
class Gathered(Generic[Part]):
    """The parts of one trace, in the order of the file; or why it cannot be read."""

    id: str
    place: str
    """Where it begins: line or entry."""
    parts: list[Part] = field(default_factory=list)
    problem: EntryRefused | None = None


def gather(
    path: Path,
    parts_of: Callable[[object], Iterable[tuple[str, Part | EntryRefused]]],
    ids_of: Callable[[object], Iterable[str]],
) -> Iterator[Gathered[Part]]:
    """The traces of a file, in the order in which they end.

    `parts_of` gives (trace id, part or why it cannot be read) of an entry, under "" when the trace is not known, and raises
    EntryRefused for an entry that is none; `ids_of` gives the ids only. Raises ImportFailed for a file that is no JSON.
    """
    last: dict[str, int] = {}
    for number, entry in enumerate(iter_entries(path)):
        if entry.problem is None:
            last.update(dict.fromkeys(ids_of(entry.value), number))
    waiting: dict[str, Gathered[Part]] = {}
    for number, entry in enumerate(iter_entries(path)):
        try:
            if entry.problem is not None:
                raise entry.problem
            for trace_id, part in parts_of(entry.value):
                if not trace_id:
                    yield Gathered("", entry.place, problem=part if isinstance(part, EntryRefused) else None)
                    continue
                begun = waiting.setdefault(trace_id, Gathered(trace_id, entry.place))
                if isinstance(part, EntryRefused):
                    begun.problem = begun.problem or part
                else:
                    begun.parts.append(part)
        except EntryRefused as error:
            yield Gathered("", entry.place, problem=error)
        for trace_id in [trace_id for trace_id in waiting if last.get(trace_id, number) <= number]:
            yield waiting.pop(trace_id)
    yield from waiting.values()


def to_ms(value: object) -> int | None:
    """A time as Unix milliseconds: ISO 8601 (UTC where it names no zone), or a number since 1970 in s, ms, µs or ns by its size."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        if isinstance(value, str):
            told = datetime.fromisoformat(value.replace(" UTC", "+00:00"))
            return round((told if told.tzinfo else told.replace(tzinfo=UTC)).timestamp() * 1000)
        per_ms = next((unit for limit, unit in ((_SECONDS, 1e-3), (_MILLIS, 1), (_MICROS, 1e3)) if abs(value) < limit), 1e6)
        return int(value / per_ms)
    except (ValueError, OverflowError):
        return None
