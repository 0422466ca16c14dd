"""Langfuse exports: {trace, observations}, traces as its API gives them, or rows of the blob export (`observations_v2/`, `scores/`).

An observation is a span: GENERATION the call of a model, AGENT an agent's run, TOOL a tool's. Its input and output hold whatever the
instrumentation sent, mostly as JSON text; where that came over OpenTelemetry the attributes left in `metadata` are asked first. Rows of
one trace may lie anywhere in a file; scores of the blob export are looked for in the folder `scores` beside that of the observations.

A score decides the outcome where its name means success, scores of an observation only for what it ended. Corrections are not stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import ClassVar

from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.episode import Episode
from loraloop.importers.chat_dialects import find_json
from loraloop.importers.entry import require_clean
from loraloop.importers.json_input import iter_entries, opening_keys
from loraloop.importers.model_io import ModelCall, as_finish, find_tools, read_request, read_response, to_tools
from loraloop.importers.otel_conventions import agent_of, kind_of, read_call, task_of
from loraloop.importers.span_tree import Score, Span, SpanKind, Trace, try_call
from loraloop.importers.trace_episodes import convert_traces
from loraloop.importers.trace_files import Gathered, gather, to_ms
from loraloop.training_data import Refusal

Row = dict[str, object]

CAPTURE_ADVICE = "let the SDK send input and output (no mask, capture_input and capture_output on), and record the runs anew"

_KINDS: dict[object, SpanKind] = {"GENERATION": "model", "AGENT": "agent", "TOOL": "tool"}
_EXAMPLE = "{trace, observations}, or an observation with trace_id and type"
_SCORE_FOLDER = "scores"
_TASK_KEYS = ("task_id", "dataset_item_id")


class LangfuseImporter:
    """Reads Langfuse exports. Attempts at one task begin with the same prompt, unless the trace's metadata has a `task_id`."""

    name: ClassVar[str] = "langfuse"
    description: ClassVar[str] = 'Langfuse export: {"trace", "observations"}, or lines of observations {"id", "trace_id", "type", …}'

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True for {trace, observations}, a trace with its observations inside, and rows of observations in either spelling."""
        return any(_is_export(keys, head) for keys in opening_keys(head))

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """None: a trace is many observations."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """The episodes of each trace, in the order in which traces end. Raises ImportFailed for a file that is no JSON."""
        beside = _scores_beside(path)
        traces = (_to_trace(gathered, beside.get(gathered.id, [])) for gathered in gather(path, _iter_rows, _trace_ids))
        return convert_traces(path, self.name, traces, CAPTURE_ADVICE)


def _is_export(keys: set[str], head: str) -> bool:
    if "trace" in keys and ("observations" in keys or '"projectId"' in head or '"traceId"' in head):
        return True
    if "observations" in keys and keys & {"sessionId", "htmlPath", "latency", "scores"}:
        return True
    return {"trace_id", "parent_observation_id"} <= keys or {"traceId", "parentObservationId"} <= keys


def _iter_rows(value: object) -> Iterator[tuple[str, Row | EntryRefused]]:
    for row in _rows_in(value):
        trace_id = _trace_id(row)
        if not trace_id:
            advice = "export it again with these fields"
            yield "", EntryRefused("bad_shape", f"keys {show(sorted(map(str, row)))}", _EXAMPLE, advice)
        else:
            yield trace_id, row


def _trace_ids(value: object) -> Iterator[str]:
    try:
        yield from filter(None, map(_trace_id, _rows_in(value)))
    except EntryRefused:
        return


def _rows_in(value: object) -> Iterator[Row]:
    """The trace, its scores and observations, each as a row that names the trace; or the row that `value` is."""
    if not isinstance(value, dict):
        raise EntryRefused("bad_shape", show(value), _EXAMPLE, "export the trace again, or leave it out")
    trace = find_json(value.get("trace")) if "trace" in value else value if isinstance(value.get("observations"), list) else None
    if not isinstance(trace, dict):
        yield value
        return
    listed = value["observations"] if isinstance(value.get("observations"), list) else trace.get("observations")
    trace_id = trace.get("id")
    own = {key: part for key, part in trace.items() if key not in {"observations", "scores", "corrections"}}
    yield {**own, "traceId": trace_id, "type": "TRACE"}
    scores = [*_listed(trace.get("scores")), *(_listed(value.get("scores")) if value is not trace else [])]
    for row in chain(scores, _listed(listed)):
        if not isinstance(row, dict):
            raise EntryRefused("bad_shape", f"{show(row)} among the observations", "objects", "export the trace again")
        yield row if _trace_id(row) else {**row, "traceId": trace_id}


def _trace_id(row: Row) -> str | None:
    return _text(row, "traceId", "trace_id")


def _is_score(row: Row) -> bool:
    return "type" not in row and "name" in row and ("dataType" in row or "data_type" in row or "value" in row)


def _to_trace(gathered: Gathered[Row], beside: list[Row]) -> Trace:
    place = f"{gathered.place}, trace {show(gathered.id)}" if gathered.id else gathered.place
    trace = Trace(gathered.id, place, problem=gathered.problem)
    scores = [row for row in [*gathered.parts, *beside] if _is_score(row)]
    try:
        require_clean(gathered.id)
        for order, row in enumerate(row for row in gathered.parts if not _is_score(row)):
            if row.get("type") == "TRACE":
                _describe(trace, row)
            else:
                _add_observation(trace, row, order)
    except EntryRefused as error:
        trace.problem = trace.problem or error
    by_id = {span.id: span for span in trace.spans}
    for row in scores:
        if (score := _to_score(row)) is not None:
            span = by_id.get(_text(row, "observationId", "observation_id") or "")
            (span.scores if span else trace.scores).append(score)
    return trace


def _describe(trace: Trace, row: Row) -> None:
    metadata = find_json(row.get("metadata"))
    known: Row = metadata if isinstance(metadata, dict) else {}
    trace.task_id = next((found for key in _TASK_KEYS if (found := _text(known, key))), trace.task_id)
    trace.tags |= {
        "environment": _text(row, "environment"),
        "labels": row.get("tags") or None,
        "release": _text(row, "release"),
        "session": _text(row, "sessionId", "session_id"),
        "trace_name": _text(row, "name"),
        "version": _text(row, "version"),
    }


def _add_observation(trace: Trace, row: Row, order: int) -> None:
    span_id = _text(row, "id")
    if span_id is None:
        raise EntryRefused("bad_shape", f"an observation with id {show(row.get('id'))}", "an id", "export it again with its id")
    require_clean([span_id, row.get("name"), row.get("statusMessage"), row.get("status_message")])
    attributes = _attributes(row)
    named = row.get("type")
    kind = _KINDS.get(named, kind_of(attributes)) if isinstance(named, str) else "other"
    if kind == "model" and named != "GENERATION":
        kind = "other"
    call, problem = try_call(lambda: _to_call(row, attributes, f"observation {show(span_id)}")) if kind == "model" else (None, None)
    said = _text(row, "statusMessage", "status_message")
    trace.spans.append(
        Span(
            id=span_id,
            parent=_text(row, "parentObservationId", "parent_observation_id"),
            name=_text(row, "name") or "",
            kind=kind,
            start_ms=to_ms(row.get("startTime", row.get("start_time"))),
            end_ms=to_ms(row.get("endTime", row.get("end_time"))),
            error=(said or "an error that is not described") if row.get("level") == "ERROR" else None,
            agent=agent_of(attributes),
            call=call,
            problem=problem,
            order=order,
        )
    )
    trace.task_id = trace.task_id or task_of(attributes)
    if not trace.tags.get("session"):
        trace.tags["session"] = _text(row, "sessionId", "session_id")


def _to_call(row: Row, attributes: Row, place: str) -> ModelCall:
    call = read_call(attributes, [], place, free_form=False)
    call.model = _text(row, "model", "provided_model_name") or call.model
    if not call.messages:
        call.messages, tools = read_request(row.get("input"), f"{place}, input")
        call.tools = call.tools or tools
    if call.response is None:
        call.response, finish = read_response(row.get("output"), f"{place}, output")
        call.finish = call.finish or as_finish(finish)
    settings = find_json(row.get("modelParameters", row.get("model_parameters")))
    offered = settings.get("tools") if isinstance(settings, dict) else None
    defined = to_tools(row.get("toolDefinitions", row.get("tool_definitions")))
    call.tools = defined or call.tools or to_tools(offered) or find_tools(row.get("input"))
    return call


def _attributes(row: Row) -> Row:
    """The attributes that OpenTelemetry sent and Langfuse had no place for, numbers and objects as text or as they are."""
    metadata = find_json(row.get("metadata"))
    found = find_json(metadata.get("attributes")) if isinstance(metadata, dict) else None
    return found if isinstance(found, dict) else {}


def _to_score(row: Row) -> Score | None:
    """A score; None for a correction, which is what somebody else would have said."""
    kind = row.get("dataType", row.get("data_type"))
    value, label = row.get("value"), _text(row, "stringValue", "string_value")
    if kind == "CORRECTION":
        return None
    if kind == "BOOLEAN" and value in (0, 1):
        value = bool(value)
    elif kind in ("CATEGORICAL", "TEXT"):
        value = label
    return Score(_text(row, "name") or "score", value, label, to_ms(row.get("timestamp", row.get("updatedAt"))))


def _scores_beside(path: Path) -> dict[str, list[Row]]:
    """The scores of a blob export by trace: rows in the files of the folder `scores` beside the folder of `path`."""
    found: dict[str, list[Row]] = {}
    folder = path.parent.parent / _SCORE_FOLDER
    if not path.parent.name.startswith("observations") or not folder.is_dir():
        return found
    for file in sorted(folder.iterdir()):
        for entry in iter_entries(file) if file.suffix in {".json", ".jsonl"} else []:
            if isinstance(entry.value, dict) and (trace_id := _trace_id(entry.value)):
                found.setdefault(trace_id, []).append(entry.value)
    return found


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _text(row: Row, *keys: str) -> str | None:
    return next((value for key in keys if isinstance(value := row.get(key), str) and value), None)
