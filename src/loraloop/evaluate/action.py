"""What an agent's turn does: its tool calls, a command on its last line, or a reply.

Calls are read from a message, where they were recorded as such, or from text as a model writes them: Hermes' and Qwen's
<tool_call>{…}</tool_call>, a JSON object or list with name and arguments (Llama, Mistral), or LFM2's [name(key=value)].
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loraloop.episode import Message
from loraloop.evaluate.environment import last_line
from loraloop.files import canonical_json

REPLY = "(reply)"
"""The name of a turn without a call in a conversation with tools."""


@dataclass(frozen=True)
class Action:
    """One thing that is done."""

    name: str
    """The tool, or the first word of a command."""
    arguments: str
    """As canonical JSON, or the text of a command or reply."""


def actions_of(message: Message, *, has_tools: bool) -> tuple[Action, ...]:
    """What a recorded turn does."""
    if message.tool_calls:
        return tuple(Action(call.function.name, _canonical(call.function.arguments)) for call in message.tool_calls)
    return read_actions(message.content or "", has_tools=has_tools)


def read_actions(text: str, *, has_tools: bool) -> tuple[Action, ...]:
    """What a turn that a model wrote does; special tokens may stand in `text`."""
    calls = tuple(_iter_calls(text))
    if calls:
        return calls
    plain = re.sub(r"<\|[^|<>]*\|>", "", text).strip()
    if has_tools:
        return (Action(REPLY, plain),)
    command = last_line(plain)
    return (Action(command.partition(" ")[0], command),)


def _iter_calls(text: str) -> Iterator[Action]:
    tagged = re.findall(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", text, re.DOTALL)
    for part in tagged or [text]:
        yield from _json_calls(part)
    for listed in re.findall(r"<\|tool_call_start\|>(.*?)(?:<\|tool_call_end\|>|$)", text, re.DOTALL):
        yield from _python_calls(listed.strip())


def _json_calls(text: str) -> Iterator[Action]:
    """The objects with a name and arguments in `text`, those within others left out."""
    decoder = json.JSONDecoder()
    position = 0
    while (start := text.find("{", position)) >= 0:
        try:
            value, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            position = start + 1
            continue
        arguments = value.get("arguments", value.get("parameters"))
        if isinstance(value.get("name"), str) and arguments is not None:
            yield Action(value["name"], _canonical(arguments))


def _python_calls(text: str) -> Iterator[Action]:
    """The calls of a Python list, with constants for arguments."""
    try:
        found = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError):
        return
    for call in found.elts if isinstance(found, ast.List) else [found]:
        if isinstance(call, ast.Call):
            try:
                arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
            except (ValueError, TypeError, RecursionError):
                continue
            yield Action(ast.unparse(call.func), _canonical(arguments))


def _canonical(arguments: Any) -> str:
    """The same text for arguments that are the same; what is no JSON stays as it is."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            return str(arguments)
    try:
        return canonical_json(arguments)
    except (ValueError, TypeError):
        return str(arguments)
