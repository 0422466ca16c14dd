"""What went into a model and what came out, as tracing tools keep it in one free field: messages, tools, the answer.

A field is a JSON value or its text: a list of messages, a request (`messages`, `contents`, `input`), a response (`choices`,
`generations`, `candidates`, `output`), or plain words. `ModelCall` is the one form of a call that every trace importer makes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.importers.chat_dialects import REBUILT, RawMessage, assistant_message, find_json, to_raw_messages

REDACTED = "__REDACTED__"
"""What OpenInference writes where it was told to hide content."""

_SPEAKER = re.compile(r"^(system|developer|user|assistant|tool): ", re.MULTILINE)
_REQUEST_KEYS = ("messages", "contents", "input", "prompt", "prompts", "args")
_SYSTEM_KEYS = ("system", "instructions", "system_instruction", "systemInstruction")


@dataclass
class ModelCall:
    """One call of a model: the whole history it was given, its answer, and the tools it could use.

    `messages` empty or `response` None: not recorded. `is_delta`: `messages` are only what came since the call before.
    """

    messages: list[RawMessage] = field(default_factory=list)
    response: RawMessage | None = None
    tools: list[dict[str, object]] = field(default_factory=list)
    model: str | None = None
    finish: str | None = None
    is_delta: bool = False
    is_copied: bool = False
    """The whole call was copied from another run: context, never the agent's own."""


def read_request(value: object, place: str) -> tuple[list[RawMessage], list[dict[str, object]]]:
    """(messages, tools) of what a model was given; nothing for null. Refused as `bad_shape` when it holds no message."""
    value = find_json(value)
    if value in (None, "", [], {}):
        return [], []
    if isinstance(value, str):
        return _spoken(value), []
    if isinstance(value, list):
        return _split_tools(value, place)
    if not isinstance(value, dict):
        raise _no_message(value, place)
    key = next((key for key in _REQUEST_KEYS if value.get(key) not in (None, "", [])), None)
    if key is None or "role" in value:
        if "role" not in value and "kwargs" not in value:
            raise _no_message(value, place)
        return to_raw_messages(value, place), []
    settings = value.get("config") if isinstance(value.get("config"), dict) else value
    request = {**settings, **value} if isinstance(settings, dict) else value
    system = next(
        (request[name] for name in ("system", "instructions", "system_instruction", "systemInstruction") if request.get(name)), None
    )
    messages, tools = _split_tools(_listed(value[key]), place)
    return with_system(system, messages, place), to_tools(request.get("tools") or request.get("functions")) or tools


def find_tools(value: object) -> list[dict[str, object]]:
    """The tools in a request whose messages are known from elsewhere; none where it names none."""
    request = find_json(value)
    settings = request.get("config", request) if isinstance(request, dict) else None
    return to_tools(settings.get("tools") or settings.get("functions")) if isinstance(settings, dict) else []


def read_response(value: object, place: str) -> tuple[RawMessage | None, str | None]:
    """(answer, why the model stopped); (None, None) for null. Refused as `bad_shape` when it holds no answer."""
    value = find_json(value)
    if value in (None, "", [], {}):
        return None, None
    if isinstance(value, str):
        return {"role": "assistant", "content": value}, None
    finish: object = None
    if isinstance(value, dict):
        value, finish = _answer_in(value, place)
        if value is None:
            return None, None
    if isinstance(value, str):
        return {"role": "assistant", "content": value}, as_finish(finish)
    answer = assistant_message(value, place)
    said = answer.pop("finish_reason", None)
    return answer, as_finish(finish or said)


def with_system(system: object, messages: list[RawMessage], place: str) -> list[RawMessage]:
    """`messages` behind the system prompt that the request keeps apart; as they are when they begin with it."""
    system = find_json(system)
    if system in (None, "", [], {}):
        return messages
    parts = system.get("parts", system) if isinstance(system, dict) else system
    if isinstance(parts, list) and parts and all(isinstance(part, dict) and "role" in part for part in parts):
        first = to_raw_messages(parts, place)
    else:
        first = to_raw_messages({"role": "system", "content": parts}, place)
    return messages if messages[: len(first)] == first else [*first, *messages]


def to_tools(value: object) -> list[dict[str, object]]:
    """Tool schemas in the OpenAI shape: a list of schemas, JSON text of one each, or Gemini's function declarations."""
    found: list[dict[str, object]] = []
    listed = find_json(value)
    for given in listed.values() if isinstance(listed, dict) and "name" not in listed else _listed(listed or []):
        tool = find_json(given)
        if not isinstance(tool, dict):
            continue
        declared = tool.get("function_declarations", tool.get("functionDeclarations"))
        found += [_to_tool(one) for one in (declared if isinstance(declared, list) else [tool]) if isinstance(one, dict)]
    return found


def as_finish(value: object) -> str | None:
    """Why the model stopped, in lower case; of several answers, why the first did."""
    value = find_json(value)
    first = value[0] if isinstance(value, list) and value else value
    return first.lower() if isinstance(first, str) and first else None


def _to_tool(tool: dict[str, object]) -> dict[str, object]:
    if isinstance(tool.get("function"), dict):
        return {"type": "function", "function": tool["function"]}
    if tool.get("type") not in (None, "function", "custom") and "input_schema" not in tool and "parameters" not in tool:
        return tool  # a tool that the provider runs itself
    schema_names = ("parameters", "input_schema", "inputSchema", "parameters_json_schema", "args_schema")
    schema = next((tool[name] for name in schema_names if isinstance(tool.get(name), dict)), None)
    function = {"name": tool.get("name"), "description": tool.get("description"), "parameters": schema, "strict": tool.get("strict")}
    return {"type": "function", "function": {key: part for key, part in function.items() if part is not None}}


def _split_tools(listed: list[object], place: str) -> tuple[list[RawMessage], list[dict[str, object]]]:
    """Messages, and the tool schemas that Langfuse's LangChain handler writes among them as if a tool had spoken."""
    listed = listed[0] if len(listed) == 1 and isinstance(listed[0], list) else listed  # LangChain: of a batch of one
    schemas = [item["content"] for item in listed if _is_schema(item)]  # type: ignore[index]
    return to_raw_messages([item for item in listed if not _is_schema(item)], place), to_tools(schemas)


def _is_schema(item: object) -> bool:
    content = item.get("content") if isinstance(item, dict) and item.get("role") == "tool" else None
    return isinstance(content, dict) and content.get("type") == "function" and isinstance(content.get("function"), dict)


def _spoken(text: str) -> list[RawMessage]:
    """Words as a user's turn; a telling `system: …`, `user: …` line by line is cut at its speakers."""
    marks = list(_SPEAKER.finditer(text))
    if not marks or marks[0].start() != 0:
        return [{"role": "user", "content": text}]
    ends = [mark.start() - 1 for mark in marks[1:]] + [len(text)]
    turns = [(mark[1], text[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)]
    return [{"role": role, "content": None if role == "assistant" and said == "None" else said, REBUILT: True} for role, said in turns]


def _answer_in(value: dict[str, object], place: str) -> tuple[object, object]:
    """(the messages or words of the answer, why the model stopped) in the response of an API or of a framework."""
    for key in ("choices", "candidates"):
        first = _first(value.get(key))
        if isinstance(first, dict):
            said = next((first[name] for name in ("message", "content", "text") if first.get(name) is not None), None)
            answer = {**said, "role": "assistant"} if isinstance(said, dict) else said  # some writers copy the user's role
            return answer, first.get("finish_reason", first.get("finishReason"))
    generation = _first(_first(value.get("generations")))
    if isinstance(generation, dict):
        info = generation.get("generation_info")
        finish = info.get("finish_reason") if isinstance(info, dict) else None
        return generation.get("message") or generation.get("text"), finish
    if isinstance(value.get("output"), list) and value["output"]:
        incomplete = value.get("incomplete_details")
        return value["output"], incomplete.get("reason") if isinstance(incomplete, dict) else None
    finish = value.get("stop_reason", value.get("finish_reason"))
    if isinstance(value.get("message"), dict) or "role" in value or "kwargs" in value or value.get("type") in ("ai", "AIMessageChunk"):
        return value, finish
    return _in_free_form(value, place), finish


def _in_free_form(value: dict[str, object], place: str) -> object:
    """The answer under a name that people give it."""
    for key in ("messages", "content", "output", "text", "response"):
        said = value.get(key)
        if isinstance(said, dict):
            return read_response(said, place)[0]
        if isinstance(said, str) or (isinstance(said, list) and said):
            return {"role": "assistant", "content": said} if key == "content" else said
    raise _no_message(value, place)


def _first(value: object) -> object:
    return value[0] if isinstance(value, list) and value else None


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _no_message(value: object, place: str) -> EntryRefused:
    advice = "record the messages as the model was given them, or leave the run out"
    return EntryRefused("bad_shape", f"{place} = {show(value)}", "the messages that the model was given, or its answer", advice)
