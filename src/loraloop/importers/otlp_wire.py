"""OTLP as JSON: the spans and log records of an export request, decoded and nothing more.

Both spellings of field names are read, ids in hex or base64, 64-bit numbers as text or number, times in nanoseconds. What they mean is
the matter of `otel_conventions`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.importers.entry import MAX_DEPTH, require_clean

TRACE_ID_BYTES, SPAN_ID_BYTES = 16, 8

_REQUESTS = {"resourceSpans": ("scopeSpans", "spans"), "resourceLogs": ("scopeLogs", "logRecords")}
_OLD_SCOPES = {"scopeSpans": "instrumentationLibrarySpans", "scopeLogs": "instrumentationLibraryLogs"}
_SCALARS: dict[str, tuple[type, ...]] = {
    "stringvalue": (str,),
    "bytesvalue": (str,),
    "boolvalue": (bool,),
    "doublevalue": (int, float, str),
}
_NO_ERROR = {None, 0, 1, "0", "1", "STATUS_CODE_UNSET", "STATUS_CODE_OK", "UNSET", "OK", "Unset", "Ok"}


@dataclass
class Event:
    """An event of a span, or a log record that names the span; `body` is the record's."""

    name: str
    attributes: dict[str, object] = field(default_factory=dict)
    body: object = None
    at_ms: int | None = None


@dataclass
class WireSpan:
    """One span as sent. `has_span` is False for one that only log records name."""

    id: str
    parent: str | None = None
    name: str = ""
    start_ns: int | None = None
    end_ns: int | None = None
    attributes: dict[str, object] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    error: str | None = None
    n_dropped: int = 0
    """How many attributes the exporter left out."""
    has_span: bool = True


def iter_spans(value: object) -> Iterator[tuple[str, WireSpan | EntryRefused]]:
    """(trace id, span) of an export request, log records as spans without a body of their own, in the order sent.

    A span that cannot be told is given as its refusal, under "" when its trace is not known. Raises EntryRefused (`bad_shape`) when
    `value` is no export request.
    """
    if not isinstance(value, dict):
        raise _no_request(show(value))
    known = [key for key in (*_REQUESTS, "resourceMetrics") if key in value or _snake(key) in value]
    if not known:
        raise _no_request(f"keys {show(sorted(map(str, value)))}")
    for key, (scopes, items) in _REQUESTS.items():
        for resource in _list_in(value, key):
            described = resource.get("resource")
            shared = _attributes(described) if isinstance(described, dict) else {}
            for scope in _list_in(resource, scopes) or _list_in(resource, _OLD_SCOPES[scopes]):
                for item in _list_in(scope, items):
                    yield _decoded(item, shared, is_log=key == "resourceLogs")


def trace_ids(value: object) -> set[str]:
    """The traces that an export request has spans of; none when it is no export request."""
    found: set[str] = set()
    if not isinstance(value, dict):
        return found
    for key, (scopes, items) in _REQUESTS.items():
        for resource in _list_in(value, key):
            for scope in _list_in(resource, scopes) or _list_in(resource, _OLD_SCOPES[scopes]):
                found |= {to_id(_get(item, "traceId"), TRACE_ID_BYTES) or "" for item in _list_in(scope, items)}
    return found


def to_id(value: object, n_bytes: int) -> str | None:
    """An id as hex digits, from hex or base64; None when it is absent, all zeros, or neither."""
    if not isinstance(value, str) or not value:
        return None
    if re.fullmatch(r"[0-9a-fA-F]+", value) and len(value) == 2 * n_bytes:
        found = value.lower()
    else:
        try:
            found = base64.b64decode(value, validate=True).hex()
        except (binascii.Error, ValueError):
            return value if value.isprintable() else None
        found = found if len(found) == 2 * n_bytes else value
    return None if set(found) == {"0"} else found


def decode_value(value: object, depth: int = 0) -> object:
    """An AnyValue as plain JSON; bytes stay base64 text. Raises EntryRefused (`bad_shape`)."""
    if value in (None, {}):
        return None
    if not isinstance(value, dict) or len(value) != 1 or depth > MAX_DEPTH:
        raise _bad_value(value)
    ((kind, inner),) = value.items()
    name = str(kind).replace("_", "").lower()
    if name == "arrayvalue" and isinstance(inner, dict):
        return [decode_value(item, depth + 1) for item in _any_list(inner)]
    if name == "kvlistvalue" and isinstance(inner, dict):
        return {str(_pair(item).get("key")): decode_value(_pair(item).get("value"), depth + 1) for item in _any_list(inner)}
    if name == "intvalue" and _int(inner) is not None:
        return _int(inner)
    if not isinstance(inner, _SCALARS.get(name, ())) or (isinstance(inner, bool) and name != "boolvalue"):
        raise _bad_value(value)
    return inner


def _decoded(item: dict[str, object], shared: dict[str, object], *, is_log: bool) -> tuple[str, WireSpan | EntryRefused]:
    trace_id = to_id(_get(item, "traceId"), TRACE_ID_BYTES)
    span_id = to_id(_get(item, "spanId"), SPAN_ID_BYTES)
    if trace_id is None or span_id is None:
        found = f"a {'log record' if is_log else 'span'} {show(item.get('name'))} with traceId {show(_get(item, 'traceId'))}"
        found += f" and spanId {show(_get(item, 'spanId'))}"
        return trace_id or "", EntryRefused("bad_shape", found, "both ids, as hex or base64", "export it again with its ids")
    try:
        require_clean([trace_id, span_id, item.get("name")])
        return trace_id, _to_log(item, span_id) if is_log else _to_span(item, span_id, shared)
    except EntryRefused as error:
        return trace_id, error


def _to_span(item: dict[str, object], span_id: str, shared: dict[str, object]) -> WireSpan:
    events = [
        Event(str(event.get("name", "")), _attributes(event), None, _to_ms(_int(_get(event, "timeUnixNano"))))
        for event in _list_in(item, "events")
    ]
    return WireSpan(
        id=span_id,
        parent=to_id(_get(item, "parentSpanId"), SPAN_ID_BYTES),
        name=str(item.get("name", "")),
        start_ns=_int(_get(item, "startTimeUnixNano")) or None,
        end_ns=_int(_get(item, "endTimeUnixNano")) or None,
        attributes={**shared, **_attributes(item)},
        events=events,
        error=_error_of(item.get("status"), events),
        n_dropped=_int(_get(item, "droppedAttributesCount")) or 0,
    )


def _to_log(item: dict[str, object], span_id: str) -> WireSpan:
    attributes = _attributes(item)
    name = _get(item, "eventName") or attributes.get("event.name") or ""
    at_ns = _int(_get(item, "timeUnixNano")) or _int(_get(item, "observedTimeUnixNano"))
    event = Event(str(name), attributes, decode_value(item.get("body")), _to_ms(at_ns))
    return WireSpan(id=span_id, events=[event], start_ns=at_ns or None, has_span=False)


def _error_of(status: object, events: list[Event]) -> str | None:
    if not isinstance(status, dict) or not isinstance(status.get("code"), int | str | None) or status.get("code") in _NO_ERROR:
        return None
    raised = next((event.attributes.get("exception.message") for event in events if event.name == "exception"), None)
    said = status.get("message") or raised or "an error that is not described"
    return said if isinstance(said, str) else show(said)


def _attributes(owner: dict[str, object]) -> dict[str, object]:
    return {str(pair.get("key")): decode_value(pair.get("value")) for pair in _list_in(owner, "attributes")}


def _any_list(inner: dict[str, object]) -> list[object]:
    values = inner.get("values", [])
    if not isinstance(values, list):
        raise _bad_value(inner)
    return values


def _pair(item: object) -> dict[str, object]:
    if not isinstance(item, dict):
        raise _bad_value(item)
    return item


def _list_in(owner: dict[str, object], key: str) -> list[dict[str, object]]:
    listed = _get(owner, key)
    return [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []


def _get(owner: dict[str, object], key: str) -> object:
    return owner.get(key, owner.get(_snake(key)))


def _snake(key: str) -> str:
    return re.sub(r"[A-Z]", lambda found: "_" + found[0].lower(), key)


def _int(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    return value if isinstance(value, int) else int(value) if re.fullmatch(r"-?[0-9]{1,20}", value) else None


def _to_ms(nanos: int | None) -> int | None:
    return nanos // 1_000_000 if nanos else None


def _no_request(found: str) -> EntryRefused:
    advice = "export it as OTLP JSON, or leave it out"
    return EntryRefused("bad_shape", found, "an export request, {resourceSpans: [...]} or {resourceLogs: [...]}", advice)


def _bad_value(value: object) -> EntryRefused:
    return EntryRefused("bad_shape", f"the value {show(value)}", "an AnyValue such as {stringValue: ...}", "export it as OTLP JSON")
