"""A trace as any tracing tool records it: spans in a tree, some of them calls of a model, an agent's run, or a tool's.

Spans come in any order, twice when an exporter tried again, and some are missing when a trace was sampled or lies in several files: a
span whose parent is not there stands at the top. Parents in a circle and one id for two spans are refused, as nobody can tell then who
called whom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.importers.model_io import ModelCall

MAX_SPAN_DEPTH = 500
"""How deep spans may nest; real traces stay below 50."""

SpanKind = Literal["model", "agent", "tool", "other"]


@dataclass(frozen=True)
class Score:
    """What somebody said of a trace or a span: a value, a label, or both. `at` is when, in Unix milliseconds."""

    name: str
    value: object = None
    label: str | None = None
    at: int | None = None


@dataclass
class Span:
    """One span; times are Unix milliseconds. `call` is what a model was given and answered, where that was recorded."""

    id: str
    parent: str | None
    name: str
    kind: SpanKind = "other"
    start_ms: int | None = None
    end_ms: int | None = None
    error: str | None = None
    agent: str | None = None
    """The name of the agent, of its own span and of calls that name who made them."""
    call: ModelCall | None = None
    problem: EntryRefused | None = field(default=None, compare=False)
    """Why what was recorded of a call cannot be read; it spoils the trace, unless a readable call lies within."""
    scores: list[Score] = field(default_factory=list)
    order: int = field(default=0, compare=False)
    """The position in the file, for spans that began at the same time."""


@dataclass
class Trace:
    """One trace: its spans, what was said of it as a whole, and what it says of its task."""

    id: str
    place: str
    """Where in the file it is, for messages."""
    spans: list[Span] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    task_id: str | None = None
    tags: dict[str, object] = field(default_factory=dict)
    """What else it says of itself: session, version, environment. None is not said."""
    has_real_times: bool = True
    """False where the recorder made the times up to have an order."""
    problem: EntryRefused | None = None
    """Why it cannot be read at all."""


def try_call(read: Callable[[], ModelCall]) -> tuple[ModelCall | None, EntryRefused | None]:
    """(the call, None), or (None, why it cannot be read)."""
    try:
        return read(), None
    except EntryRefused as error:
        return None, error


class SpanTree:
    """The spans of one trace by id, each once. Raises EntryRefused (`cyclic_spans`, `duplicate_spans`)."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans: dict[str, Span] = {}
        for span in spans:
            known = self._spans.setdefault(span.id, span)
            if known != span:
                found = f"two spans with the id {show(span.id)}: {show(known.name)} and {show(span.name)}"
                raise EntryRefused("duplicate_spans", found, "one span an id", "export the trace again")
        self.n_missing = len({span.parent for span in self._spans.values() if span.parent and span.parent not in self._spans})
        """How many spans are named as a parent and are not there."""
        self._require_acyclic()

    def __iter__(self) -> Iterator[Span]:
        return iter(self._spans.values())

    def line_up(self, span: Span) -> Iterator[Span]:
        """The parent of `span`, that one's parent, and so on to the top."""
        while span.parent is not None and span.parent in self._spans:
            span = self._spans[span.parent]
            yield span

    def owner(self, span: Span) -> Span | None:
        """Who made the call: the nearest agent above it, or the tool within which it was made."""
        return next((above for above in self.line_up(span) if above.kind in {"agent", "tool"}), None)

    def _require_acyclic(self) -> None:
        depths: dict[str, int] = {}
        for span in self._spans.values():
            path: dict[str, None] = {}
            at: Span | None = span
            while at is not None and at.id not in depths:
                if at.id in path:
                    circle = [*path][[*path].index(at.id) :]
                    found = f"spans that are one another's parents: {show(circle)}"
                    raise EntryRefused("cyclic_spans", found, "a tree of spans", "export the trace again, or leave it out")
                path[at.id] = None
                at = self._spans.get(at.parent) if at.parent is not None else None
            above = depths[at.id] if at is not None else 0
            depths.update({span_id: above + n for n, span_id in enumerate(reversed(path), 1)})
            if depths[span.id] > MAX_SPAN_DEPTH:
                found = f"spans nested deeper than {MAX_SPAN_DEPTH}"
                raise EntryRefused("bad_shape", found, "less", "leave it out: something called itself without end")
