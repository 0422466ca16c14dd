"""OTLP JSON by hand: attributes, spans, requests."""

from __future__ import annotations

import json

TRACE = "0af7651916cd43dd8448eb211c80319c"


def any_value(value):
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, list):
        return {"arrayValue": {"values": [any_value(item) for item in value]}}
    if isinstance(value, dict):
        return {"kvlistValue": {"values": pairs(value)}}
    return {"stringValue": value}


def pairs(attributes):
    return [{"key": key, "value": any_value(value)} for key, value in attributes.items()]


def span(number, attributes, parent=None, *, trace=TRACE, events=(), **more):
    """Span `number`, which begins at that second; `events` are (name, attributes)."""
    made = {
        "traceId": trace,
        "spanId": f"{number:016x}",
        "name": f"span {number}",
        "startTimeUnixNano": f"{1_700_000_000 + number}000000000",
        "endTimeUnixNano": f"{1_700_000_001 + number}000000000",
        "attributes": pairs(attributes),
    }
    if parent is not None:
        made["parentSpanId"] = f"{parent:016x}"
    if events:
        made["events"] = [{"name": name, "attributes": pairs(said), "timeUnixNano": "1"} for name, said in events]
    return {**made, **more}


def request(*spans, service="kitchen"):
    return {"resourceSpans": [{"resource": {"attributes": pairs({"service.name": service})}, "scopeSpans": [{"spans": list(spans)}]}]}


def lines(*requests):
    return "".join(json.dumps(one) + "\n" for one in requests)


def text(role, words):
    return {"role": role, "parts": [{"type": "text", "content": words}]}


def calls(*named):
    """A turn of the assistant that calls (id, name, arguments) each."""
    return {
        "role": "assistant",
        "parts": [{"type": "tool_call", "id": call, "name": name, "arguments": said} for call, name, said in named],
        "finish_reason": "tool_call",
    }


def result(call, said):
    return {"role": "tool", "parts": [{"type": "tool_call_response", "id": call, "response": said}]}


def chat(given, said, **more):
    """The attributes of a model's call by the conventions of GenAI from 1.37."""
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "m-1",
        "gen_ai.input.messages": json.dumps(given),
        "gen_ai.output.messages": json.dumps([said]),
        **more,
    }


def agent(name, **more):
    return {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": name, **more}


def tool(name):
    return {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": name}
