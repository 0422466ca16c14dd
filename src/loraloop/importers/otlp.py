"""OpenTelemetry traces as OTLP JSON: a file exporter's lines, or one export request; GenAI conventions of all ages, and OpenInference.

A trace becomes an episode for its main agent, and one for each sub-agent and side call (`trace_episodes` says which is which). Its spans
lie anywhere in the file; of a trace that lies in several files each gives its part, so join such files first.

Evaluations (`gen_ai.evaluation.result`, OpenInference annotations) give the outcome where their name says that it is one. Content is off
by default in most instrumentations; a trace without it is refused as `no_content`. Metrics are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from loraloop.chat.refused_entry import EntryRefused
from loraloop.episode import Episode
from loraloop.importers.json_input import opening_keys
from loraloop.importers.otel_conventions import agent_of, kind_of, read_call, scores_of, session_of, task_of
from loraloop.importers.otlp_wire import Event, WireSpan, iter_spans, trace_ids
from loraloop.importers.span_tree import Span, Trace, try_call
from loraloop.importers.trace_episodes import convert_traces
from loraloop.importers.trace_files import Gathered, gather
from loraloop.training_data import Refusal

CAPTURE_ADVICE = (
    "turn on the recording of message content in the instrumentation (it is off by default; OpenTelemetry: "
    "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=true), and record the runs anew"
)
_MARKS = {"resourceSpans", "resource_spans", "resourceLogs", "resource_logs"}


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
        return convert_traces(path, self.name, map(_to_trace, gather(path, iter_spans, trace_ids)), CAPTURE_ADVICE)


def _to_trace(gathered: Gathered[WireSpan]) -> Trace:
    place = f"{gathered.place}, trace {gathered.id}" if gathered.id else gathered.place
    trace = Trace(gathered.id, place, problem=gathered.problem)
    try:
        for order, wire in enumerate(_with_logs(gathered.parts)):
            _add_span(trace, wire, order)
    except EntryRefused as error:
        trace.problem = trace.problem or error
    return trace


def _add_span(trace: Trace, wire: WireSpan, order: int) -> None:
    attributes = wire.attributes
    kind = kind_of(attributes) if wire.has_span else "model"
    own, of_trace = scores_of(attributes, wire.events)
    where = f"span {wire.id}"
    call, problem = None, None
    if kind == "model":
        call, problem = try_call(lambda: read_call(attributes, wire.events, where, n_dropped=wire.n_dropped))
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
            problem=problem,
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
