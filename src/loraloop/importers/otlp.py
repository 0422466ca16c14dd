"""OpenTelemetry traces as OTLP JSON: a file exporter's lines, or one export request; GenAI conventions of all ages, and OpenInference.

A trace becomes an episode for its main agent, and one for each sub-agent and side call (`trace_episodes` says which is which). The spans
of a trace lie anywhere in the file, so it is gone through twice: once for where each trace ends, once to read, holding only the traces
that have begun and not ended. A trace that lies in several files is read from each as far as it is there: join such files first.

Evaluations (`gen_ai.evaluation.result`, OpenInference annotations) give the outcome where their name says that it is one. Content is off
by default in most instrumentations; a trace without it is refused as `no_content`. Metrics are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from loraloop.episode import Episode
from loraloop.importers.entry import Entry, EntryRefused
from loraloop.importers.json_input import iter_entries, opening_keys
from loraloop.importers.otel_conventions import agent_of, kind_of, read_call, scores_of, session_of, task_of
from loraloop.importers.otlp_wire import Event, WireSpan, iter_spans, trace_ids
from loraloop.importers.span_tree import Span, Trace
from loraloop.importers.trace_episodes import convert_traces
from loraloop.training_data import Refusal

_MARKS = {"resourceSpans", "resource_spans", "resourceLogs", "resource_logs"}


@dataclass
class _Open:
    """A trace whose end has not been read yet."""

    place: str
    spans: list[WireSpan] = field(default_factory=list)
    problem: EntryRefused | None = None


class OtlpImporter:
    """Reads OTLP JSON. Attempts at one task begin with the same prompt, unless an attribute `task.id` names it."""

    name: ClassVar[str] = "otlp"
    description: ClassVar[str] = 'OpenTelemetry OTLP JSON: lines of {"resourceSpans": [...]} with gen_ai.* or OpenInference attributes'

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True for objects with `resourceSpans` or `resourceLogs`."""
        return any(keys & _MARKS for keys in opening_keys(head))

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """None: traces lie across lines."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """The episodes of each trace, in the order in which traces end. Raises ImportFailed for a file that is no JSON."""
        return convert_traces(path, self.name, _iter_traces(path))


def _iter_traces(path: Path) -> Iterator[Trace]:
    last: dict[str, int] = {}
    for number, entry in enumerate(iter_entries(path)):
        last.update(dict.fromkeys(trace_ids(entry.value), number))
    waiting: dict[str, _Open] = {}
    for number, entry in enumerate(iter_entries(path)):
        yield from _take(entry, waiting)
        for trace_id in [trace_id for trace_id in waiting if last.get(trace_id, number) <= number]:
            yield _to_trace(trace_id, waiting.pop(trace_id))
    for trace_id, begun in waiting.items():
        yield _to_trace(trace_id, begun)


def _take(entry: Entry, waiting: dict[str, _Open]) -> Iterator[Trace]:
    """Add the spans of a line to their traces; a line or span that belongs to none is given as a trace that cannot be read."""
    try:
        if entry.problem is not None:
            raise entry.problem
        for trace_id, span in iter_spans(entry.value):
            if isinstance(span, WireSpan):
                waiting.setdefault(trace_id, _Open(entry.place)).spans.append(span)
            elif trace_id:
                begun = waiting.setdefault(trace_id, _Open(entry.place))
                begun.problem = begun.problem or span
            else:
                yield Trace(trace_id, entry.place, problem=span)
    except EntryRefused as error:
        yield Trace("", entry.place, problem=error)


def _to_trace(trace_id: str, begun: _Open) -> Trace:
    place = f"{begun.place}, trace {trace_id}"
    trace = Trace(trace_id, place, problem=begun.problem)
    try:
        for order, wire in enumerate(_with_logs(begun.spans)):
            _add_span(trace, wire, order)
    except EntryRefused as error:
        trace.problem = trace.problem or error
    return trace


def _add_span(trace: Trace, wire: WireSpan, order: int) -> None:
    attributes = wire.attributes
    kind = kind_of(attributes) if wire.has_span else "model"
    own, of_trace = scores_of(attributes, wire.events)
    where = f"span {wire.id}"
    call = read_call(attributes, wire.events, where, n_dropped=wire.n_dropped) if kind == "model" else None
    trace.spans.append(
        Span(
            id=wire.id,
            parent=wire.parent,
            name=wire.name,
            kind=kind,
            start_ms=wire.start_ns // 1_000_000 if wire.start_ns else None,
            end_ms=wire.end_ns // 1_000_000 if wire.end_ns else None,
            error=wire.error,
            agent=agent_of(attributes),
            call=call,
            scores=own,
            order=order,
        )
    )
    trace.scores += of_trace
    trace.task_id = trace.task_id or task_of(attributes)
    service = attributes.get("service.name")
    trace.tags = {"service": service, "session": session_of(attributes)} | {key: part for key, part in trace.tags.items() if part}
    trace.has_real_times = trace.has_real_times and attributes.get("agentpile.time_synthetic") is not True


def _with_logs(wires: list[WireSpan]) -> list[WireSpan]:
    """The spans, each with the log records that name it among its events; log records of a span that is not there stand for it."""
    known = {wire.id: wire for wire in wires if wire.has_span}
    logged: dict[str, list[Event]] = {}
    alone: dict[str, WireSpan] = {}
    for wire in wires:
        if not wire.has_span:
            logged.setdefault(wire.id, []).extend(wire.events)
            alone.setdefault(wire.id, wire)
    spans = [wire for wire in wires if wire.has_span]
    for span_id, events in logged.items():
        if span_id in known:
            for wire in spans:
                if wire.id == span_id:
                    wire.events = [*wire.events, *events]
        elif any(event.name.startswith("gen_ai.") for event in events):
            spans.append(WireSpan(span_id, start_ns=alone[span_id].start_ns, events=events, has_span=False))
    return spans
