"""Messages as the providers and frameworks of this world write them, in the one shape that `openai_messages` takes.

Known: OpenAI chat, OpenAI Responses items, GenAI and Gemini `parts`, Anthropic and Bedrock blocks, LangChain messages. Only the
spelling changes: words, ids and the order of parallel calls stay, arguments that were written as an object become its JSON text in the
order of its own keys, arguments that were left out are `{}`. What the model thought is apart, under `REASONING`. What is no text and
no function call (an image, a search that the provider ran) stays as it came, so that `take_messages` refuses it by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.files import json_line

RawMessage = dict[str, object]
"""A message in the OpenAI shape that is not checked yet."""
REASONING = "reasoning_content"
"""The key of what the model thought before it spoke; a Message has no place for it."""
SILENT = "silent"
"""The key of a message whose words were left out, as tracing tools do that are told to record no content."""
REBUILT = "rebuilt"
"""The key of a message that was cut out of a telling in one text."""
NOTES = (SILENT, REBUILT, "finish_reason")
"""What is noted on a message on its way and is no part of it."""

_ROLES = {
    "human": "user",
    "ai": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "HumanMessage": "user",
    "AIMessage": "assistant",
    "AIMessageChunk": "assistant",
    "SystemMessage": "system",
    "ToolMessage": "tool",
    "FunctionMessage": "tool",
}
_SAME_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_KEPT = ("name", "refusal", "audio", "weight", "function_call", "finish_reason")
_PROVIDER_CALLS = ("custom_tool_call", "local_shell_call", "web_search_call", "file_search_call", "computer_call")
_CALL_ITEMS = ("function_call", *_PROVIDER_CALLS)
_RESULT_ITEMS = ("function_call_output", "custom_tool_call_output", "local_shell_call_output", "computer_call_output")
_ITEM = "item"
"""Marks a message made of one item of the Responses API: items of one turn stand apart there."""
_LANGCHAIN_TYPES = ("human", "ai", "system", "tool", "function", "AIMessageChunk", *_ROLES)
_TEXT = ("text", "input_text", "output_text")
_THOUGHT = ("thinking", "reasoning", "redacted_thinking", "summary_text", "reasoning_text")
_CALL = ("tool_call", "tool_use", "function_call", "functionCall", "toolUse")
_MEDIA = ("image", "image_url", "input_image", "audio", "input_audio", "video", "document", "file", "blob", "uri")
_RESULT = ("tool_call_response", "tool_result", "function_response", "functionResponse", "toolResult")


@dataclass
class _Turn:
    """What the parts of one message say."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[object] = field(default_factory=list)
    results: list[RawMessage] = field(default_factory=list)
    others: list[object] = field(default_factory=list)
    is_silent: bool = False


def to_raw_messages(value: object, place: str) -> list[RawMessage]:
    """The messages in `value`, a message or a list of them. Refused as `bad_shape` where one has no role or is no message."""
    found: list[RawMessage] = []
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        for message in _to_messages(item, f"{place}, message {number}"):
            before = found[-1] if found else {}
            if message.get(_ITEM) and before.get(_ITEM) and message["role"] == before["role"] == "assistant":
                _join(before, message)
            else:
                found.append(message)
    return [{key: part for key, part in message.items() if key != _ITEM} for message in found]


def assistant_message(parts: object, place: str) -> RawMessage:
    """The last turn of the agent in `parts`, also where a recorder cut it into several messages. Refused as `bad_shape` without one."""
    messages = to_raw_messages(parts, place)
    last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    if last < 0:
        raise _bad_shape(f"{place} = {show(parts)}", "a turn of the agent")
    first = last
    while first and messages[first - 1]["role"] == "assistant":
        first -= 1
    turn = dict(messages[first])
    for more in messages[first + 1 : last + 1]:
        _join(turn, more)
    return turn


def find_json(value: object) -> object:
    """What `value` says as JSON text of an object or a list; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in {"[", "{"}:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def as_text(value: object) -> str:
    """`value` when it is text; the text of text parts; JSON text of anything else, keys in their own order."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_text_part(part) for part in value):
        return "".join(part if isinstance(part, str) else str(part.get("text", part.get("content"))) for part in value)
    return _line(value)


def _to_messages(raw: object, place: str) -> list[RawMessage]:
    if isinstance(raw, str):
        return [{"role": "user", "content": raw}]
    if not isinstance(raw, dict):
        raise _bad_shape(f"{place} = {show(raw)}", "a message with role and content")
    message = _unwrapped(raw)
    kind = message.get("type")
    if kind in (*_CALL_ITEMS, *_RESULT_ITEMS) or (kind == "reasoning" and "role" not in message):
        return [_from_item(message, str(kind))]
    role = _role_of(message, place)
    content = message["parts"] if isinstance(message.get("parts"), list) else message.get("content")
    turn = _Turn()
    for part in content if isinstance(content, list) else [] if content is None else [content]:
        _read_part(part, turn)
    written = _written_calls(role, message)
    if written:
        role, turn, content = "assistant", _Turn(calls=written), None
    named = _join_calls(_calls_of(message) or turn.calls, message)
    told = _told(role, turn, content, named)
    told |= {key: message[key] for key in _KEPT if message.get(key) not in (None, "", [])}
    thought = _thought_of(message, turn)
    if thought:
        told[REASONING] = thought
    if turn.is_silent or (role in {"system", "user"} and told["content"] is None and not turn.results):
        told[SILENT] = True
    if kind == "message":
        told[_ITEM] = True
    if role in {"tool", "function"} and not turn.results:
        told["content"] = _of_tool(content) if content is not None else None
        told["tool_call_id"] = message.get("tool_call_id", message.get("call_id", message.get("id")))
        return [told]
    is_empty = turn.results and not turn.texts and not turn.others and not named
    return [*turn.results, *([] if is_empty else [told])]


def _unwrapped(message: dict[str, object]) -> dict[str, object]:
    """The message inside a choice, an event, or LangChain's `constructor` and `data`."""
    inner = message.get("message")
    if "role" not in message and isinstance(inner, dict):
        finish = message.get("finish_reason")
        return {"role": "assistant", **_unwrapped(inner), **({"finish_reason": finish} if finish else {})}
    names, made_with = message.get("id"), message.get("kwargs")
    if isinstance(made_with, dict) and isinstance(names, list) and names:
        return {**made_with, "type": str(names[-1])}
    data = message.get("data")
    if isinstance(data, dict) and message.get("type") in _LANGCHAIN_TYPES:
        return {**data, "type": message["type"]}
    event = message.get("event.name")
    if "role" not in message and isinstance(event, str) and event.startswith("gen_ai."):
        return {**message, "role": "assistant" if event == "gen_ai.choice" else event.split(".")[1]}
    return message


def _role_of(message: dict[str, object], place: str) -> str:
    role = message.get("role") or message.get("type")
    if role in _SAME_ROLES:
        return str(role)
    if isinstance(role, str) and role in _ROLES:
        return _ROLES[role]
    raise _bad_shape(f"{place} = {show(message)}", "a role that a chat has")


def _told(role: str, turn: _Turn, content: object, calls: list[object]) -> RawMessage:
    text: object = "".join(turn.texts) if turn.texts else "" if content == "" else None
    if turn.others:
        text = [*({"type": "text", "text": part} for part in turn.texts), *turn.others]
    message: RawMessage = {"role": role, "content": text}
    if calls:
        message["tool_calls"] = calls
    return message


def _read_part(part: object, turn: _Turn) -> None:
    if isinstance(part, str):
        turn.texts.append(part)
        return
    if not isinstance(part, dict):
        turn.others.append({"type": show(part)})
        return
    kind = (
        part.get("type") or part.get("kind") or next((key for key in (*_CALL, *_RESULT) if key in part), "text" if "text" in part else None)
    )
    inner = part.get(kind) if isinstance(kind, str) and isinstance(part.get(kind), dict) else part
    words = part.get("text", part.get("content", part.get("thinking", part.get("refusal"))))
    if part.get("thought") is True or kind in _THOUGHT:
        turn.thoughts.append(words if isinstance(words, str) else "")
    elif kind in _TEXT and isinstance(words, str):
        turn.texts.append(words)
    elif kind in _TEXT and words is None:
        turn.is_silent = True
    elif kind in _CALL and isinstance(inner, dict):
        turn.calls.append(_to_call(inner))
    elif kind in _RESULT and isinstance(inner, dict):
        turn.results.append(_to_result(inner))
    else:
        turn.others.append(part if isinstance(part.get("type"), str) else {"type": str(kind or next(iter(part), None))})


def _to_result(part: dict[str, object]) -> RawMessage:
    said = next((part[key] for key in ("response", "result", "content", "output") if part.get(key) is not None), "")
    message: RawMessage = {"role": "tool", "content": _of_tool(said)}
    found = next((part[key] for key in ("tool_use_id", "toolUseId", "call_id", "tool_call_id", "id") if part.get(key)), None)
    return {**message, "tool_call_id": found}


def _of_tool(said: object) -> object:
    """What a tool said as text; as it came when there is a picture or the like in it, so that it is refused by name."""
    parts = said if isinstance(said, list) else []
    return said if any(isinstance(part, dict) and part.get("type") in _MEDIA for part in parts) else as_text(said)


def _calls_of(message: dict[str, object]) -> list[object]:
    calls = find_json(message.get("tool_calls"))
    if not isinstance(calls, list) or not calls:
        more = message.get("additional_kwargs")
        calls = more.get("tool_calls") if isinstance(more, dict) else None
    invalid = message.get("invalid_tool_calls")
    listed = [*(calls if isinstance(calls, list) else []), *(invalid if isinstance(invalid, list) else [])]
    return [_to_call(call) for call in map(find_json, listed)]


def _written_calls(role: str, message: dict[str, object]) -> list[object]:
    """The calls of a turn whose recorder (Koog) wrote them into the content, and in a history under the role of a tool."""
    if role != "tool" and message.get("finish_reason") != "tool_calls":
        return []
    listed = find_json(message.get("content"))
    if not isinstance(listed, list) or "tool_call_id" in message:
        return []
    is_calls = all(isinstance(call, dict) and call.keys() == {"function", "id", "type"} for call in listed)
    return [_to_call(call) for call in listed] if is_calls else []


def _join_calls(calls: list[object], message: dict[str, object]) -> list[object]:
    """The calls, with the arguments as the agent wrote them where LangChain kept that text beside what it read from it."""
    more = message.get("additional_kwargs")
    written = more.get("tool_calls") if isinstance(more, dict) else None
    texts = {str(call["id"]): call.get("function") for call in _listed(written) if isinstance(call, dict) and call.get("id")}
    joined = []
    for call in calls:
        text = texts.get(str(call.get("id"))) if isinstance(call, dict) else None
        joined.append({**call, "function": text} if isinstance(call, dict) and text else call)
    return joined


def _to_call(call: object) -> object:
    """A call as {id, type, function: {name, arguments}}; what is no function call stays as it is."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        function = call["function"]
        return {**_id_of(call), "type": call.get("type", "function"), "function": {**function, "arguments": _arguments(function)}}
    if call.get("type") in _PROVIDER_CALLS:
        return call
    return {**_id_of(call), "type": "function", "function": {"name": call.get("name"), "arguments": _arguments(call)}}


def _id_of(call: dict[str, object]) -> dict[str, object]:
    found = next((call[key] for key in ("call_id", "toolUseId", "tool_call_id", "id") if call.get(key)), None)
    return {"id": found}


def _arguments(call: dict[str, object]) -> object:
    given = next((call[key] for key in ("arguments", "args", "input", "parameters") if call.get(key) is not None), None)
    return given if isinstance(given, str) and given else "{}" if given in (None, "") else _line(given)


def _from_item(item: dict[str, object], kind: str) -> RawMessage:
    """An item of the Responses API: a call, a result, or what the model thought."""
    if kind in _RESULT_ITEMS:
        return _to_result(item)
    if kind == "reasoning":
        parts = [part for key in ("content", "summary") for part in _listed(item.get(key))]
        thought = "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
        return {"role": "assistant", "content": None, REASONING: thought, _ITEM: True}
    return {"role": "assistant", "content": None, "tool_calls": [_to_call(item)], _ITEM: True}


def _join(turn: RawMessage, more: RawMessage) -> None:
    """Add to a turn of the agent what a further message of the same turn says."""
    thoughts = [message[REASONING] for message in (turn, more) if message.get(REASONING)]
    if thoughts:
        turn[REASONING] = "".join(map(str, thoughts))
    said = [message["content"] for message in (turn, more) if message.get("content") not in (None, "")]
    if any(isinstance(part, list) for part in said):
        turn["content"] = [piece for part in said for piece in _parts_of(part)]
    elif said:
        turn["content"] = "".join(map(str, said))
    calls = [call for message in (turn, more) for call in _listed(message.get("tool_calls"))]
    if calls:
        turn["tool_calls"] = calls
    if more.get("finish_reason"):
        turn["finish_reason"] = more["finish_reason"]


def _thought_of(message: dict[str, object], turn: _Turn) -> str:
    kept = next((message[key] for key in ("reasoning_content", "reasoning", "thinking") if isinstance(message.get(key), str)), None)
    return kept if isinstance(kept, str) else "".join(turn.thoughts)


def _is_text_part(part: object) -> bool:
    if isinstance(part, str):
        return True
    return isinstance(part, dict) and part.get("type", "text") in _TEXT and isinstance(part.get("text", part.get("content")), str)


def _parts_of(content: object) -> list[object]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _line(value: object) -> str:
    try:
        return json_line(value)
    except ValueError as error:
        raise EntryRefused("bad_shape", f"the number in {show(value)}", "finite numbers, as JSON has no others", "write null") from error


def _bad_shape(found: str, expected: str) -> EntryRefused:
    return EntryRefused("bad_shape", found, expected, "record the messages as the model was given them, or leave the run out")
