"""MLflow traces: {info, data: {spans}} as `trace.to_json()` and `mlflow traces get` write it, or the artifact {spans}; MLflow 2 and 3.

Every attribute is JSON text. `mlflow.spanInputs` and `mlflow.spanOutputs` of spans of type CHAT_MODEL and LLM are the calls of models,
`mlflow.chat.tools` their tools; where those say nothing, the attributes of OpenTelemetry are asked. Previews in `info` are cut and are
never read. Feedback among the assessments decides the outcome where its name means success; expectations are the ground truth and are
not stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.episode import Episode
from loraloop.importers.chat_dialects import find_json, to_raw_messages
from loraloop.importers.entry import Entry, require_clean
from loraloop.importers.json_input import iter_entries, opening_keys
from loraloop.importers.model_io import ModelCall, find_tools, read_request, read_response, to_tools
from loraloop.importers.otel_conventions import agent_of, kind_of, read_call
from loraloop.importers.otlp_wire import SPAN_ID_BYTES, to_id
from loraloop.importers.span_tree import Score, Span, SpanKind, Trace, try_call
from loraloop.importers.trace_episodes import convert_traces
from loraloop.importers.trace_files import to_ms
from loraloop.training_data import Refusal

Row = dict[str, object]

CAPTURE_ADVICE = "export the whole trace with its spans (trace.to_json()), recorded with inputs and outputs"

_KINDS: dict[object, SpanKind] = {"CHAT_MODEL": "model", "LLM": "model", "AGENT": "agent", "TOOL": "tool"}
_MODEL_KEYS = ("mlflow.llm.model", "model", "model_name", "gen_ai.response.model", "gen_ai.request.model")
_EXAMPLE = "a trace, {info, data: {spans}}"
_FINE = {"OK", "STATUS_CODE_OK", "UNSET", "STATUS_CODE_UNSET", ""}


class MlflowImporter:
    """Reads MLflow traces. Attempts at one task begin with the same prompt, unless a tag or metadata `task_id` names it."""

    name: ClassVar[str] = "mlflow"
    description: ClassVar[str] = 'MLflow trace: {"info", "data": {"spans"}}, one a file or line, or a list'

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True for objects with `data` or `spans` that speak of MLflow."""
        return '"mlflow.' in head and any(keys & {"data", "spans"} for keys in opening_keys(head))

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """None: a trace may give several episodes."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """The episodes of each trace, in order. Raises ImportFailed for a file that is no JSON."""
        return convert_traces(path, self.name, map(_to_trace, iter_entries(path)), CAPTURE_ADVICE)


def _to_trace(entry: Entry) -> Trace:
    trace = Trace("", entry.place, problem=entry.problem)
    if entry.problem is not None:
        return trace
    try:
        _fill(trace, entry.value)
    except EntryRefused as error:
        trace.problem = error
    return trace


def _fill(trace: Trace, value: object) -> None:
    info, spans = _parts_of(value)
    trace.id = _text(info, "trace_id", "request_id") or _own_id(spans[0]) or ""
    require_clean(trace.id)
    trace.place = f"{trace.place}, trace {show(trace.id)}"
    metadata = {**_object(info.get("request_metadata")), **_object(info.get("trace_metadata"))}
    labels = _object(info.get("tags"))
    state = info.get("state", info.get("status"))
    trace.task_id = _text(labels, "task_id") or _text(metadata, "task_id")
    trace.tags = {
        "session": _text(metadata, "mlflow.trace.session"),
        "state": state if isinstance(state, str) and state != "OK" else None,
        "trace_name": _text(labels, "mlflow.traceName"),
    }
    for order, span in enumerate(spans):
        trace.spans.append(_to_span(span, order))
    by_id = {span.id: span for span in trace.spans}
    for span_id, score in _scores(info.get("assessments")):
        owner = by_id.get(span_id or "")
        (owner.scores if owner else trace.scores).append(score)


def _parts_of(value: object) -> tuple[Row, list[Row]]:
    data = _object(find_json(value.get("data"))) if isinstance(value, dict) and "data" in value else value
    spans = data.get("spans") if isinstance(data, dict) else None
    if not isinstance(value, dict) or not isinstance(spans, list) or not spans or not all(isinstance(span, dict) for span in spans):
        found = f"keys {show(sorted(map(str, value)))} without spans" if isinstance(value, dict) else show(value)
        raise EntryRefused("bad_shape", found, _EXAMPLE, CAPTURE_ADVICE)
    return _object(find_json(value.get("info"))), spans


def _to_span(span: Row, order: int) -> Span:
    context = _object(span.get("context"))
    span_id = to_id(span.get("span_id", context.get("span_id")), SPAN_ID_BYTES)
    if span_id is None:
        raise EntryRefused("bad_shape", f"a span {show(span.get('name'))} without span_id", "an id", "export the trace again")
    attributes = {key: _decoded(part) for key, part in _object(span.get("attributes")).items()}
    require_clean([span_id, span.get("name")])
    named = attributes.get("mlflow.spanType")
    kind = _KINDS.get(named) if isinstance(named, str) else None
    kind = kind or ("other" if named not in (None, "UNKNOWN") else kind_of(attributes))
    call, problem = try_call(lambda: _to_call(attributes, f"span {span_id}")) if kind == "model" else (None, None)
    name = _text(span, "name") or ""
    return Span(
        id=span_id,
        parent=to_id(span.get("parent_span_id", span.get("parent_id")), SPAN_ID_BYTES),
        name=name,
        kind=kind,
        start_ms=to_ms(span.get("start_time_unix_nano", span.get("start_time"))),
        end_ms=to_ms(span.get("end_time_unix_nano", span.get("end_time"))),
        error=_error_of(span),
        agent=agent_of(attributes) or (name if kind == "agent" else None),
        call=call,
        problem=problem,
        order=order,
    )


def _to_call(attributes: Row, place: str) -> ModelCall:
    call = read_call(attributes, [], place, free_form=False)
    given, said = attributes.get("mlflow.spanInputs"), attributes.get("mlflow.spanOutputs")
    told = attributes.get("mlflow.chat.messages")
    if not call.messages and isinstance(told, list) and len(told) > 1:  # MLflow 2: the history and the answer in one list
        call.messages, call.response = to_raw_messages(told[:-1], place), read_response(told[-1], place)[0]
    if not call.messages:
        call.messages, call.tools = read_request(given, f"{place}, inputs")
    if said is not None and (call.response is None or call.finish is None):
        answer, finish = read_response(said, f"{place}, outputs")
        call.response, call.finish = call.response or answer, call.finish or finish
    call.tools = to_tools(attributes.get("mlflow.chat.tools")) or call.tools or find_tools(given)
    call.model = call.model or _text(attributes, *_MODEL_KEYS) or _text(_object(given), "model", "model_name")
    return call


def _scores(assessments: object) -> Iterator[tuple[str | None, Score]]:
    """(span id or None for the trace, score) of all feedback that holds: none that failed, was withdrawn, or was given anew."""
    listed = [row for row in assessments if isinstance(row, dict)] if isinstance(assessments, list) else []
    replaced = {row["overrides"] for row in listed if isinstance(row.get("overrides"), str)}
    for row in listed:
        feedback = _object(row.get("feedback"))
        name = _text(row, "assessment_name", "name")
        is_replaced = _text(row, "assessment_id") in replaced
        if name is None or row.get("valid") is False or is_replaced or feedback.get("error") or feedback.get("value") is None:
            continue
        at = to_ms(row.get("last_update_time", row.get("create_time", row.get("last_update_time_ms"))))
        yield to_id(row.get("span_id"), SPAN_ID_BYTES), Score(name, feedback["value"], None, at)


def _error_of(span: Row) -> str | None:
    status = span.get("status")
    code = status.get("code") if isinstance(status, dict) else span.get("status_code", status)
    if not isinstance(code, str) or code in _FINE:
        return None
    said = status.get("message") or status.get("description") if isinstance(status, dict) else span.get("status_message")
    return said if isinstance(said, str) and said else "an error that is not described"


def _own_id(span: Row) -> str | None:
    """The trace's id as the first span knows it, for an artifact without `info`."""
    attributes = _object(span.get("attributes"))
    found = _decoded(attributes.get("mlflow.traceRequestId"))
    return found if isinstance(found, str) else _text(span, "trace_id") or _text(_object(span.get("context")), "trace_id")


def _decoded(value: object) -> object:
    """What an attribute says: all are JSON text, though some writers leave plain words."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _object(value: object) -> Row:
    return value if isinstance(value, dict) else {}


def _text(row: Row, *keys: str) -> str | None:
    return next((value for key in keys if isinstance(value := row.get(key), str) and value), None)
