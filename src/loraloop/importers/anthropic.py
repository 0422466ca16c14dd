"""Anthropic messages: lines or a list of requests {system, messages, tools, model}, alone, with their `response`, or {request, response}.

A request with a response is a call, and calls repeat their history: see `call_log` for what is learned of them. Requests alone are whole
conversations. Nothing in them says how the task ended, so the outcome is Unknown until it is labelled; a response that ends in an
error is refused, and the reason for which it stopped is a tag (`max_tokens` means that it was cut).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, cast

from pydantic import JsonValue

from loraloop.chat.openai_messages import take_messages
from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.episode import Episode, EpisodeMetadata
from loraloop.importers.agent_turns import as_object, require_list, times_of, to_tools
from loraloop.importers.anthropic_messages import Blocks
from loraloop.importers.call_log import ToldTurns, to_task_id
from loraloop.importers.entry import convert_entries, find_id, require_clean, require_object, to_tags
from loraloop.importers.json_input import count_entries, first_object_keys, iter_entries
from loraloop.training_data import Refusal

_BLOCK = re.compile(r'"type"\s*:\s*"(?:tool_use|tool_result|thinking|redacted_thinking)"')
_RESPONSE = re.compile(r'"type"\s*:\s*"message"')
_OPENAI_ANSWER = re.compile(r'"choices"\s*:\s*\[|"object"\s*:\s*"response"')
_SCHEMA = re.compile(r'"input_schema"\s*:')
_OWN_KEYS = {"system", "anthropic_version", "stop_sequences"}
_KNOWN = {
    *("messages", "system", "tools", "model", "response", "request", "max_tokens", "temperature", "top_p", "top_k", "stream", "metadata"),
    *("stop_sequences", "tool_choice", "anthropic_version", "thinking", "task_id", "timestamp"),
}


def is_anthropic(head: str) -> bool:
    """Whether `head` begins with a request in Anthropic's shape rather than OpenAI's."""
    keys = first_object_keys(head)
    if keys & {"choices", "response"} and _OPENAI_ANSWER.search(head) is not None:
        return False
    has_blocks = _BLOCK.search(head) is not None or _SCHEMA.search(head) is not None
    if "messages" in keys:
        return bool(keys & _OWN_KEYS) or has_blocks or ("response" in keys and _RESPONSE.search(head) is not None)
    return "request" in keys and '"messages"' in head and (has_blocks or _RESPONSE.search(head) is not None)


class AnthropicImporter:
    """Reads requests and responses of Anthropic's messages API. What a conversation opens with is its task."""

    name: ClassVar[str] = "anthropic"
    description: ClassVar[str] = 'Anthropic messages: JSON Lines or a list of {"system", "messages", "tools"}, also with their "response"'

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True for a first object with `messages` that has a `system` beside them, content blocks or an Anthropic response."""
        return is_anthropic(head)

    def count(self, path: Path) -> int | None:
        """The number of lines that are not blank; None for a JSON list."""
        return count_entries(path)

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """One Episode or Refusal for each request, in order. Raises ImportFailed for an unreadable file."""
        told = ToldTurns()
        yield from convert_entries(path, iter_entries(path), lambda row: _to_episode(row, told))


def _to_episode(value: object, told: ToldTurns) -> Episode:
    row = require_object(value, (), "{system, messages, tools}")
    request = require_object(row.get("request") or row, ("messages",), "{system, messages, tools}")
    require_clean({key: part for key, part in row.items() if key not in ("temperature", "top_p")})
    blocks = Blocks()
    blocks.add_system(request.get("system"))
    for number, message in enumerate(require_list(request["messages"], "messages"), 1):
        blocks.add(message, f"message {number}")
    response = _take_response(row.get("response"))
    if response:
        blocks.add({"role": "assistant", "content": response["content"]}, "the response")
    taken = take_messages(blocks.messages, "messages")
    ignored = taken.ignored | blocks.ignored | (row.keys() - _KNOWN) | (request.keys() - _KNOWN)
    tags = to_tags(
        AnthropicImporter.name,
        ignored,
        decoded_arguments=taken.decoded_arguments,
        model=response.get("model") or request.get("model"),
        stop_reason=response.get("stop_reason"),
    )
    return Episode(
        task_id=find_id(row, "task_id") or to_task_id(taken.messages),
        group_id=find_id(row, "task_id"),
        messages=tuple(told.mark(taken.messages) if response else taken.messages),
        tools=cast("tuple[dict[str, JsonValue], ...]", to_tools(request.get("tools"))),
        metadata=EpisodeMetadata(scenario=AnthropicImporter.name, tags=tags, **times_of([row.get("timestamp")])),
    )


def _take_response(response: object) -> dict[str, object]:
    if response is None:
        return {}
    if as_object(response).get("type") == "error":
        found = f"a response that is an error: {show(as_object(response).get('error'))}"
        raise EntryRefused("run_error", found, "a response of the model", "leave the call out: the model said nothing")
    return require_object(response, ("content",), "a response with its content")
