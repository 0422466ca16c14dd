"""Messages and tools in the OpenAI shape, as JSON from outside: checked and taken over as they are, or refused with a reason.

Taken over means verbatim: content null or "" (absent is null), repeated and missing tool-call ids, arguments as the JSON text
that the agent wrote. Only other spellings of the same thing change: role `developer` is `system`, role `function` is `tool`,
the old `function_call` is a tool call without an id, a list of text parts is their text, arguments given as an object are the
JSON text of it, and arguments that were encoded twice are decoded once and counted. `reasoning_content` is kept apart from the content.
What a Message has no place for is refused when the agent saw or said it (images, audio, refusals), and named in the tags otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from loraloop.chat.refused_entry import EntryRefused, find_finite, show
from loraloop.episode import FunctionCall, Message, ToolCall
from loraloop.files import canonical_json

Role = Literal["system", "user", "assistant", "tool"]

_ROLES: dict[object, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_SAID_ELSEWHERE = ("refusal", "audio")
_MESSAGE_KEYS = {
    *("role", "content", "name", "tool_calls", "tool_call_id", "function_call", "weight", "is_demo", "author", "reasoning_content"),
    *_SAID_ELSEWHERE,
}
_CALL_KEYS = {"id", "type", "function"}


@dataclass
class Taken:
    """The messages of one entry, the keys in them whose values were left behind, such as `messages.turn_idx`, and how many
    calls had their arguments encoded twice.
    """

    messages: list[Message] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    n_decoded: int = 0

    @property
    def decoded_arguments(self) -> int | None:
        """`n_decoded` as a tag: None, which is no tag, when there were none."""
        return self.n_decoded or None


def take_messages(raw: object, key: str) -> Taken:
    """The messages in `raw`, the value of an entry's `key`: one at least is the agent's, and tool results pair with calls.

    Refused as bad_shape, bad_arguments, bad_weight, unsupported_content, no_agent_turn, unpaired_tool_result or unanswered_tool_call.
    """
    if not isinstance(raw, list):
        raise EntryRefused("bad_shape", f"{key} = {show(raw)}", "a list of messages", f"write `{key}` as a list of objects")
    taken = Taken()
    for number, item in enumerate(raw, 1):
        message, n_decoded = _decode_twice_encoded(to_message(item, f"{key} {number}"), f"{key} {number}")
        taken.messages.append(message)
        taken.n_decoded += n_decoded
        taken.ignored |= _ignored_keys(item, key)
    require_turns(taken.messages, key)
    return taken


def require_turns(messages: Sequence[Message], key: str) -> None:
    """Refuse messages none of which is the agent's (`no_agent_turn`), and what `require_paired` refuses."""
    if not any(message.is_agent for message in messages):
        found = f"{len(messages)} messages, none of them a turn of the agent"
        raise EntryRefused("no_agent_turn", found, "at least one with role assistant", "leave it out: there is nothing to learn")
    require_paired(messages, key)


def take_tools(tools: object, functions: object = None) -> tuple[dict[str, object], ...]:
    """The tool schemas of an entry, verbatim; those of the deprecated `functions` as tools. Refused as `bad_shape`."""
    if tools and functions:
        raise EntryRefused("bad_shape", "both `tools` and `functions`", "one of them", "keep `tools`, the newer name")
    schemas = tools or functions or []
    if not isinstance(schemas, list) or not all(isinstance(schema, dict) for schema in schemas):
        expected = "a list of tool schemas, {type, function: {name, description, parameters}}"
        raise EntryRefused("bad_shape", f"tools = {show(schemas)}", expected, "write the schemas as objects, not as text")
    return tuple(schemas if tools else ({"type": "function", "function": schema} for schema in schemas))


def require_paired(messages: Sequence[Message], key: str = "messages") -> None:
    """Refuse messages whose tool results do not answer calls of the agent's turn before them, one each.

    Results of parallel calls come in any order, by id; where ids repeat or are missing, in the order of the calls. A result that
    no call waits for is an `unpaired_tool_result`, a call without result when the agent speaks again an `unanswered_tool_call`.
    Calls at the very end may be open: the episode ended with them.
    """
    waiting: list[ToolCall] = []
    for number, message in enumerate(messages, 1):
        if message.role == "assistant":
            if waiting:
                found = f"{key} {number}, a turn of the agent, while {_name(waiting[0])} has no result"
                raise EntryRefused("unanswered_tool_call", found, "a result for every call first", "add it or drop the call")
            waiting = list(message.tool_calls)
        elif message.role == "tool":
            answered = next((at for at, call in enumerate(waiting) if _is_answer(message, call, waiting)), None)
            if answered is None:
                found = f"{key} {number}, the result of call {show(message.tool_call_id)}, which no call before it waits for"
                advice = "put the result after its call, or remove it"
                raise EntryRefused("unpaired_tool_result", found, "one result for each call of the turn before", advice)
            waiting.pop(answered)


def _is_answer(message: Message, call: ToolCall, waiting: list[ToolCall]) -> bool:
    """An id that is there decides; a call or result without one is met in order."""
    if message.tool_call_id is None:
        return True
    if any(other.id == message.tool_call_id for other in waiting):
        return call.id == message.tool_call_id
    return call.id is None


def _name(call: ToolCall) -> str:
    return f"the call of {show(call.function.name)} (id {show(call.id)})"


def to_message(raw: object, place: str) -> Message:
    """One message, verbatim. Refused as bad_shape, bad_weight or unsupported_content, with `place` in the reason."""
    if not isinstance(raw, dict):
        raise _bad_shape(f"{place} = {show(raw)}", "an object with role and content")
    role = _ROLES.get(raw.get("role")) if isinstance(raw.get("role"), str) else None
    if role is None:
        raise _bad_shape(f"role {show(raw.get('role'))} in {place}", f"one of {', '.join(map(str, _ROLES))}")
    for key in _SAID_ELSEWHERE:
        if raw.get(key):
            raise _unsupported(f"`{key}` in {place}: {show(raw[key])}")
    calls = _to_tool_calls(raw, place)
    if calls and role != "assistant":
        raise _bad_shape(f"tool calls in {place}, whose role is {role}", "tool calls in turns of the assistant only")
    return Message(
        role=role,
        content=_to_content(raw.get("content"), place),
        name=_text_or_none(raw, "name", place),
        tool_calls=calls,
        tool_call_id=_text_or_none(raw, "tool_call_id", place),
        is_demo=_to_flag(raw, "is_demo", place),
        author=_text_or_none(raw, "author", place) or None,
        weight=_to_weight(raw.get("weight"), place),
        reasoning=_text_or_none(raw, "reasoning_content", place) or None,
    )


def _to_content(raw: object, place: str) -> str | None:
    if raw is None or isinstance(raw, str):
        return raw
    if not isinstance(raw, list):
        raise _bad_shape(f"content {show(raw)} in {place}", "text, null, or a list of text parts")
    for part in raw:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else part
            raise _unsupported(f"a content part of type {show(kind)} in {place}")
    return "".join(part["text"] for part in raw)


def _to_tool_calls(raw: dict[str, object], place: str) -> tuple[ToolCall, ...]:
    calls, old = raw.get("tool_calls") or [], raw.get("function_call")
    if not isinstance(calls, list):
        raise _bad_shape(f"tool_calls = {show(calls)} in {place}", "a list of tool calls")
    if old is None:
        return tuple(_to_tool_call(call, place) for call in calls)
    if calls:
        raise _bad_shape(f"both tool_calls and function_call in {place}", "one of them")
    return (ToolCall(function=_to_function(old, place)),)


def _to_tool_call(raw: object, place: str) -> ToolCall:
    if not isinstance(raw, dict):
        raise _bad_shape(f"tool call {show(raw)} in {place}", "{id, type, function: {name, arguments}}")
    if raw.get("type") not in (None, "function"):
        raise _unsupported(f"a tool call of type {show(raw['type'])} in {place}")
    return ToolCall(id=_text_or_none(raw, "id", place), function=_to_function(raw.get("function"), place))


def _to_function(raw: object, place: str) -> FunctionCall:
    name, arguments = (raw.get("name"), raw.get("arguments")) if isinstance(raw, dict) else (None, None)
    if isinstance(arguments, dict):
        arguments = canonical_json(arguments)
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise _bad_shape(f"function {show(raw)} in {place}", '{name, arguments}, arguments as JSON text ("{}" for none)')
    return FunctionCall(name=name, arguments=arguments)


def _decode_twice_encoded(message: Message, place: str) -> tuple[Message, int]:
    """(the message, how many of its calls were decoded): arguments that are JSON text of JSON text of an object.

    What is inside is kept to the letter. JSON text of a plain string is refused as `bad_arguments`, as it names no parameter; other
    text, broken JSON too, is what the agent wrote.
    """
    texts = [_inner_text(call, place) for call in message.tool_calls]
    if not any(texts):
        return message, 0
    calls = [
        call if text is None else call.model_copy(update={"function": FunctionCall(name=call.function.name, arguments=text)})
        for call, text in zip(message.tool_calls, texts, strict=True)
    ]
    return message.model_copy(update={"tool_calls": tuple(calls)}), sum(text is not None for text in texts)


def _inner_text(call: ToolCall, place: str) -> str | None:
    """The JSON text of an object inside arguments that are a JSON string, None when they are none."""
    text = call.function.arguments
    if not text.lstrip().startswith('"'):
        return None
    value: object = text
    while isinstance(value, str):
        text = value
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            break
    if isinstance(value, dict):
        return text
    if text == call.function.arguments:  # not JSON at all
        return None
    found = f"the arguments {show(call.function.arguments)} of {show(call.function.name)} in {place}"
    advice = "write each parameter under its name"
    raise EntryRefused("bad_arguments", found, "JSON text of an object, encoded once", advice)


def _text_or_none(raw: dict[str, object], key: str, place: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise _bad_shape(f"{key} = {show(value)} in {place}", "text or null")
    return value


def _to_flag(raw: dict[str, object], key: str, place: str) -> bool:
    value = raw.get(key)
    if value not in (None, False, True):
        raise _bad_shape(f"{key} = {show(value)} in {place}", "true or false")
    return bool(value)


def _to_weight(raw: object, place: str) -> float:
    weight = 1.0 if raw is None else find_finite(raw)
    if weight is None or weight not in (0.0, 1.0):
        advice = "write 1 to train on the message, 0 to keep it as context"
        raise EntryRefused("bad_weight", f"weight {show(raw)} in {place}", "0 or 1", advice)
    return weight


def _ignored_keys(raw: dict[str, object], key: str) -> set[str]:
    """Keys with a value that a Message has no place for, in the message and in its tool calls."""
    found = {f"{key}.{name}" for name in _keys_left(raw, _MESSAGE_KEYS)}
    for call in cast("list[dict[str, object]]", raw.get("tool_calls") or []):
        found |= {f"{key}.tool_calls.{name}" for name in _keys_left(call, _CALL_KEYS)}
    return found


def _keys_left(raw: dict[str, object], known: set[str]) -> set[str]:
    return {name for name, value in raw.items() if name not in known and value not in (None, "", [], {})}


def _bad_shape(found: str, expected: str) -> EntryRefused:
    return EntryRefused("bad_shape", found, expected, "write it in the OpenAI chat format, or give its own --format")


def _unsupported(found: str) -> EntryRefused:
    advice = "remove it, if the rest makes sense without it, or leave the entry out"
    return EntryRefused("unsupported_content", found, "text and function calls only", advice)
