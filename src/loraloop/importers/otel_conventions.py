"""What the attributes and events of a span mean: who names what a model was given and answered.

Conventions, in the order in which they are asked: OpenInference (`llm.input_messages.0.message.role`), OpenTelemetry GenAI from 1.37
(`gen_ai.input.messages`, on the span or its details event), OpenLLMetry (`gen_ai.prompt.0.role`), GenAI before 1.37 (an event a message,
also gathered in the attribute `events`), and `input.value` / `output.value`. Where two conventions tell the same call, the first that
tells a side of it is taken. Values that were cut, so that their JSON is broken, are refused as `truncated_content`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from loraloop.chat.refused_entry import EntryRefused, find_finite, show
from loraloop.importers.call_threads import GAP
from loraloop.importers.chat_dialects import RawMessage, assistant_message, find_json, to_raw_messages
from loraloop.importers.model_io import REDACTED, ModelCall, as_finish, read_request, read_response, to_tools, with_system
from loraloop.importers.otlp_wire import Event
from loraloop.importers.span_tree import Score, SpanKind

Attributes = Mapping[str, object]

DETAILS_EVENT = "gen_ai.client.inference.operation.details"
EVALUATION_EVENT = "gen_ai.evaluation.result"

_KINDS: dict[str, SpanKind] = {
    "LLM": "model",
    "CHAT_MODEL": "model",
    "AGENT": "agent",
    "TOOL": "tool",
    "chat": "model",
    "completion": "model",
    "generate_content": "model",
    "text_completion": "model",
    "invoke_agent": "agent",
    "execute_tool": "tool",
    "agent": "agent",
    "tool": "tool",
}
_KIND_KEYS = ("openinference.span.kind", "gen_ai.operation.name", "llm.request.type", "traceloop.span.kind")
_AGENT_KEYS = ("gen_ai.agent.name", "agent.name", "agent_name")
_TASK_KEYS = ("task.id", "task_id", "gen_ai.task.id", "langfuse.experiment.item.id")
_SESSION_KEYS = ("gen_ai.conversation.id", "session.id")
_MODEL_KEYS = ("gen_ai.response.model", "llm.model_name", "gen_ai.request.model")
_MESSAGE_EVENTS = {f"gen_ai.{role}.message" for role in ("system", "user", "assistant", "tool")}
_BEDROCK_BLOCKS = {"text", "toolUse", "toolResult", "reasoningContent"}
_SAID = {"content", "contents", "tool_calls", "function_call_name"}
_MAX_INDEX_DIGITS = 6


def kind_of(attributes: Attributes) -> SpanKind:
    """What the span is; a span that no convention names is `other`."""
    for key in _KIND_KEYS:
        named = attributes.get(key)
        if isinstance(named, str) and named:
            return _KINDS.get(named, "other")
    if "agent_name" in attributes:
        return "agent"
    return "model" if "gen_ai.request.model" in attributes else "other"


def agent_of(attributes: Attributes) -> str | None:
    """The name of the agent that the span is of, or that it says made the call."""
    return _text(attributes, _AGENT_KEYS)


def task_of(attributes: Attributes) -> str | None:
    """The task, where somebody named it."""
    return _text(attributes, _TASK_KEYS)


def session_of(attributes: Attributes) -> str | None:
    """The conversation that the trace is a part of."""
    return _text(attributes, _SESSION_KEYS)


def read_call(attributes: Attributes, events: list[Event], place: str, *, n_dropped: int = 0, free_form: bool = True) -> ModelCall:
    """What the model was given and answered, as far as it was recorded; without `input.value` and `output.value` unless `free_form`.

    Refused as `truncated_content` or `bad_shape`.
    """
    details = {key: part for event in events if event.name == DETAILS_EVENT for key, part in _event_payload(event).items()}
    known = {**details, **attributes}
    call = ModelCall(
        model=_text(known, _MODEL_KEYS),
        finish=as_finish(known.get("gen_ai.response.finish_reasons")),
        is_delta=known.get("agentpile.input_reconstructed") is True,
        is_copied=str(known.get("agentpile.step.is_copied_context")).lower() == "true",
    )
    for read in (_openinference, _genai, _openllmetry, *([_free_form] if free_form else [])):
        if call.messages and call.response and call.tools:
            break
        read(known, call, place)
        if read is _openllmetry:
            _message_events(_as_events(known.get("events"), place) or events, call, place)
    if n_dropped and call.response is not None and any(key.startswith(("llm.input_messages.", "gen_ai.prompt.")) for key in known):
        found = f"{place}: {n_dropped} attributes that the exporter dropped"
        advice = "raise OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT, and record the run anew"
        raise EntryRefused("truncated_content", found, "every message of the history", advice)
    return call


def scores_of(attributes: Attributes, events: list[Event]) -> tuple[list[Score], list[Score]]:
    """(scores of the span, scores of its trace): evaluation events, OpenInference annotations, agentpile's outcome."""
    own = [_score_of_event(event) for event in events if event.name == EVALUATION_EVENT]
    of_trace: list[Score] = []
    for prefix in ("", "trace."):
        for group in ("annotations", "evaluations"):
            for _, entry in _entries(attributes, f"{prefix}{group}."):
                said = entry.get(group.removesuffix("s"))
                if isinstance(said, dict) and isinstance(said.get("name"), str):
                    label = said.get("label")
                    score = Score(said["name"], find_finite(said.get("score")), label if isinstance(label, str) else None)
                    (of_trace if prefix else own).append(score)
    outcome = find_json(attributes.get("agentpile.ext.outcome"))
    if isinstance(outcome, dict):
        said = {"success": outcome.get("success"), "reward": find_finite(outcome.get("score"))}
        own += [Score(name, value) for name, value in said.items() if value is not None]
    return own, of_trace


def _openinference(known: Attributes, call: ModelCall, place: str) -> None:
    if not call.messages:
        call.messages = _indexed(known, "llm.input_messages.", "message", place)
    if call.response is None:
        answers = _indexed(known, "llm.output_messages.", "message", place)
        call.response = assistant_message(answers, place) if answers else None
    call.tools = call.tools or to_tools([_node(entry, "tool", "json_schema") for _, entry in _entries(known, "llm.tools.")])


def _genai(known: Attributes, call: ModelCall, place: str) -> None:
    if not call.messages:
        messages = to_raw_messages(_json_at(known, "gen_ai.input.messages", place) or [], place)
        system = _json_at(known, "gen_ai.system_instructions", place)
        call.messages = with_system(system, messages, place) if messages else []
    if call.response is None and (said := _json_at(known, "gen_ai.output.messages", place)):
        call.response = assistant_message(said, place)
        call.finish = as_finish(call.response.pop("finish_reason", None)) or call.finish
    asked = find_json(known.get("model_request_parameters"))  # Pydantic AI
    named = [tool for key in ("function_tools", "output_tools") for tool in asked.get(key) or []] if isinstance(asked, dict) else []
    call.tools = call.tools or to_tools(_json_at(known, "gen_ai.tool.definitions", place)) or to_tools(named)


def _openllmetry(known: Attributes, call: ModelCall, place: str) -> None:
    if not call.messages:
        call.messages = _indexed(known, "gen_ai.prompt.", None, place)
    if call.response is None:
        answers = _indexed(known, "gen_ai.completion.", None, place)
        call.response = assistant_message(answers, place) if answers else None
        call.finish = as_finish(call.response.pop("finish_reason", None) if call.response else None) or call.finish
    call.tools = call.tools or to_tools([entry for _, entry in _entries(known, "llm.request.functions.")])


def _free_form(known: Attributes, call: ModelCall, place: str) -> None:
    given, said = known.get("input.value"), known.get("output.value")
    if not call.messages and given not in (None, "", REDACTED):
        call.messages, tools = read_request(_json_at(known, "input.value", place), place)
        call.tools = call.tools or tools
    if call.response is None and said not in (None, "", REDACTED):
        call.response, finish = read_response(_json_at(known, "output.value", place), place)
        call.finish = finish or call.finish


def _message_events(events: list[Event], call: ModelCall, place: str) -> None:
    """GenAI before 1.37: an event a message, and one for each choice, of which the first is the answer."""
    given = [event for event in events if event.name in _MESSAGE_EVENTS]
    if not call.messages:
        call.messages = [message for event in given for message in to_raw_messages(_message_of(event), place)]
    choice = next((event for event in events if event.name == "gen_ai.choice"), None)
    if call.response is None and choice is not None:
        said = _message_of(choice)
        call.finish = as_finish(said.get("finish_reason")) or call.finish
        if any(said.get(key) is not None for key in ("content", "tool_calls", "parts")):
            call.response = assistant_message({**said, "role": "assistant"}, place)
            call.response.pop("finish_reason", None)


def _message_of(event: Event) -> dict[str, object]:
    said = _event_payload(event)
    inner = find_json(said.get("message"))
    if isinstance(inner, dict):
        said = {**said, **inner}
    elif inner is not None and said.get("content") is None:
        said["content"] = inner
    blocks = find_json(said.get("content"))
    if isinstance(blocks, list) and blocks and all(isinstance(block, dict) and block.keys() <= _BEDROCK_BLOCKS for block in blocks):
        said["content"] = blocks
    role = "assistant" if event.name == "gen_ai.choice" else event.name.split(".")[1]
    kept = ("content", "parts", "tool_calls", "name", "finish_reason", "reasoning_content")
    message = {key: said[key] for key in kept if said.get(key) is not None}
    return {"role": role, **message, **({"tool_call_id": said.get("id", said.get("tool_call_id"))} if role == "tool" else {})}


def _event_payload(event: Event) -> dict[str, object]:
    written = find_json(event.attributes.get("gen_ai.event.content"))
    body = event.body if isinstance(event.body, dict) else {"content": event.body} if event.body is not None else {}
    return {**event.attributes, **body, **(written if isinstance(written, dict) else {})}


def _as_events(value: object, place: str) -> list[Event]:
    """The events that Pydantic AI gathers in one attribute."""
    listed = _parsed(value, "events", place)
    told = [event for event in listed if isinstance(event, dict)] if isinstance(listed, list) else []
    return [Event(str(event.get("event.name", "")), event) for event in told]


def _score_of_event(event: Event) -> Score:
    said = _event_payload(event)
    label = said.get("gen_ai.evaluation.score.label")
    value = find_finite(said.get("gen_ai.evaluation.score.value"))
    return Score(str(said.get("gen_ai.evaluation.name", "score")), value, label if isinstance(label, str) else None, event.at_ms)


def _indexed(known: Attributes, prefix: str, inner: str | None, place: str) -> list[RawMessage]:
    """The messages that lie flat under `prefix`; a number that is left out in the middle is a gap."""
    found: list[RawMessage] = []
    for at, entry in _entries(known, prefix):
        node = entry.get(inner) if inner else entry
        if not isinstance(node, dict) or not (node.keys() & _SAID or node.get("role") in ("system", "user", "tool")):
            continue  # a turn of the agent whose words are not there: what comes next shows the gap
        if node.get("content") == REDACTED:
            return []
        found += [{"role": "assistant", "content": None, GAP: True} for _ in range(min(at - len(found), 1))]
        if at > len(found):
            limit = "raise the limits on attributes (OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT), and record the run anew"
            raise EntryRefused("truncated_content", f"{place}: message {at} after {len(found)}", "every message of the history", limit)
        found += to_raw_messages(_to_chat(node), place)[:1]
    return found


def _to_chat(node: dict[str, object]) -> dict[str, object]:
    """A message that lay flat, in the OpenAI shape."""
    message = {key: part for key, part in node.items() if key not in {"contents", "tool_calls"}}
    contents = node.get("contents")
    if isinstance(contents, dict):
        message["content"] = [_node(entry, "message_content") for _, entry in _ordered(contents)] or None
    calls = node.get("tool_calls")
    if isinstance(calls, dict):
        told = [entry.get("tool_call", entry) for _, entry in _ordered(calls)]
        message["tool_calls"] = told
    if node.get("function_call_name") is not None:
        message["tool_calls"] = [{"name": node["function_call_name"], "arguments": node.get("function_call_arguments_json")}]
    message.setdefault("role", "assistant")
    return message


def _entries(known: Attributes, prefix: str) -> list[tuple[int, dict[str, object]]]:
    """(number, what lies under it) of all attributes `<prefix><number>.…`, in the order of the numbers, as nested objects."""
    tree: dict[str, object] = {}
    for key, value in known.items():
        if not key.startswith(prefix):
            continue
        *path, last = key[len(prefix) :].split(".")
        at = tree
        for step in path:
            deeper = at.setdefault(step, {})
            if not isinstance(deeper, dict):
                break
            at = deeper
        else:
            at[last] = value
    return _ordered(tree)


def _ordered(tree: dict[str, object]) -> list[tuple[int, dict[str, object]]]:
    numbered = [(int(key), entry) for key, entry in tree.items() if key.isdecimal() and len(key) <= _MAX_INDEX_DIGITS]
    return sorted(((at, entry) for at, entry in numbered if isinstance(entry, dict)), key=lambda pair: pair[0])


def _node(entry: dict[str, object], *path: str) -> object:
    at: object = entry
    for step in path:
        at = at.get(step) if isinstance(at, dict) else None
    return at


def _json_at(known: Attributes, key: str, place: str) -> object:
    return _parsed(known.get(key), key, place)


def _parsed(value: object, key: str, place: str) -> object:
    """What JSON text says; plain words as they are. Refused as `truncated_content` when it begins as JSON and breaks off."""
    if not isinstance(value, str) or value.lstrip()[:2] not in {"[{", '{"', "[]", "{}", '["', "[["}:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        if key == "output.value":
            return value  # the model's own words, which may well begin like JSON
        found = f"{place}: {key} is no whole JSON ({show(str(error))}), {len(value):,} characters, at the end {show(value[-40:])}"
        advice = "raise the limit on the length of values (OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT), and record the run anew"
        raise EntryRefused("truncated_content", found, "the whole value", advice) from error


def _text(attributes: Attributes, keys: tuple[str, ...]) -> str | None:
    return next((value for key in keys if isinstance(value := attributes.get(key), str) and value), None)
