"""Logs of OpenAI's APIs: lines or a list of {request, response}, or of requests with `choices` or `output` beside them.

Chat Completions: the request's messages and the message of a choice; every further choice is an episode of its own. Responses:
`instructions`, `input` and `output` items (see `responses_items`). Either way a call repeats its history: see `call_log` for what is
learned of it. A call that leans on `previous_response_id` or a stored conversation has no history in the record and is refused, and so
is a response that failed. Why it stopped is a tag; `length` and `max_output_tokens` mean that it was cut. The outcome is Unknown
until it is labelled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

from pydantic import JsonValue

from loraloop.chat.openai_messages import take_messages, take_tools
from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.episode import Episode, EpisodeMetadata
from loraloop.importers.agent_turns import as_list, as_object, times_of, to_tools
from loraloop.importers.anthropic import is_anthropic
from loraloop.importers.call_log import ToldTurns, to_task_id
from loraloop.importers.entry import Entry, convert_entries, find_id, require_clean, require_object, to_tags
from loraloop.importers.json_input import first_object_keys, iter_entries
from loraloop.importers.responses_items import Items
from loraloop.training_data import Refusal

_CHOICES = re.compile(r'"choices"\s*:\s*\[')
_RESPONSE = re.compile(r'"object"\s*:\s*"response"')
_KNOWN_SAID = {"annotations", "provider_specific_fields"}
_KNOWN = {
    *("request", "response", "body", "messages", "choices", "input", "output", "instructions", "tools", "functions", "model", "usage"),
    *("id", "object", "created", "created_at", "status", "incomplete_details", "error", "metadata", "custom_id", "task_id"),
}
_EXAMPLE = '{"request": {"messages" or "input"}, "response": {"choices" or "output"}}'


def is_call_log(head: str) -> bool:
    """Whether `head` begins with a request and its response in one of OpenAI's shapes."""
    keys = first_object_keys(head)
    has_answer = _CHOICES.search(head) is not None or _RESPONSE.search(head) is not None
    if "choices" in keys and keys & {"messages", "request"}:
        return True
    if keys & {"response"} and keys & {"request", "messages", "input", "body"}:
        return has_answer and not is_anthropic(head)
    return "output" in keys and _RESPONSE.search(head) is not None


class OpenAICallsImporter:
    """Reads requests and responses of the Chat Completions and the Responses API. What a conversation opens with is its task."""

    name: ClassVar[str] = "openai-calls"
    description: ClassVar[str] = 'OpenAI request and response logs: JSON Lines of {"request", "response"}, Chat Completions or Responses'

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True for a first object that is a request with `choices`, or with a `response` that has them or `output`."""
        return is_call_log(head)

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """None: a call may have several choices."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """One Episode or Refusal for each call and choice, in order. Raises ImportFailed for an unreadable file."""
        told = ToldTurns()
        yield from convert_entries(path, _iter_choices(iter_entries(path)), lambda row: _to_episode(row, told))


@dataclass(frozen=True)
class _Choice:
    """A further choice of a call."""

    row: object
    number: int


def _iter_choices(entries: Iterable[Entry]) -> Iterator[Entry]:
    for entry in entries:
        yield entry
        row = as_object(entry.value)
        for number in range(1, len(as_list((_body(row.get("response")) or row).get("choices")))):
            yield Entry(f"{entry.place}, choice {number + 1}", _Choice(entry.value, number))


def _body(value: object) -> dict[str, object]:
    """A request or response, also where a batch wraps it in `body`."""
    outer = as_object(value)
    return as_object(outer.get("body")) or outer


def _to_episode(value: object, told: ToldTurns) -> Episode:
    choice = value if isinstance(value, _Choice) else _Choice(value, 0)
    row = require_object(choice.row, (), _EXAMPLE)
    require_clean(row)
    request, response = _body(row.get("request")) or _body(row), _body(row.get("response")) or row
    _require_answer(request, response)
    if "choices" in response:
        messages, stopped = _take_chat(request, response, choice.number)
        ignored, n_custom = set[str](), 0
        tools = take_tools(request.get("tools"), request.get("functions"))
    else:
        items = _take_items(request, response)
        messages, ignored, n_custom = [*items.messages], items.ignored, items.n_custom
        stopped = as_object(response.get("incomplete_details")).get("reason") or response.get("status")
        tools = to_tools(request.get("tools") or response.get("tools"))
    taken = take_messages(messages, "messages")
    named = find_id(row, "task_id") or find_id(as_object(request.get("metadata")), "task_id")
    tags = to_tags(
        OpenAICallsImporter.name,
        taken.ignored | ignored | (row.keys() - _KNOWN),
        decoded_arguments=taken.decoded_arguments,
        custom_calls=n_custom or None,
        choice=choice.number + 1 if choice.number else None,
        model=response.get("model") or request.get("model"),
        stop_reason=stopped,
    )
    return Episode(
        task_id=named or to_task_id(taken.messages),
        group_id=named,
        messages=tuple(told.mark(taken.messages)),
        tools=cast("tuple[dict[str, JsonValue], ...]", tools),
        metadata=EpisodeMetadata(
            scenario=OpenAICallsImporter.name, tags=tags, **times_of([response.get("created") or response.get("created_at")])
        ),
    )


def _require_answer(request: dict[str, object], response: dict[str, object]) -> None:
    error = response.get("error")
    if error or response.get("status") in ("failed", "cancelled"):
        found = f"a response that failed: {show(error or response['status'])}"
        raise EntryRefused("run_error", found, "a response of the model", "leave the call out: the model said nothing")
    for key in ("previous_response_id", "conversation"):
        if request.get(key) or response.get(key):
            found = f"a call that leans on `{key}`, whose history is not in the record"
            raise EntryRefused("no_content_recorded", found, "the whole input of the call", "log the input items with every call")
    if not ("choices" in response or "output" in response) or not request.keys() & {"messages", "input"}:
        found = f"keys {show(sorted(request.keys() | response.keys()))}"
        raise EntryRefused("bad_shape", found, _EXAMPLE, "log the request with its response")


def _take_chat(request: dict[str, object], response: dict[str, object], number: int) -> tuple[list[object], object]:
    choices = as_list(response["choices"])
    if number >= len(choices):
        raise EntryRefused("no_agent_turn", "a response without choices", "at least one", "leave the call out: the model said nothing")
    choice = require_object(choices[number], ("message",), "a choice with its message")
    said = require_object(choice["message"], (), "a message of the assistant")
    answer = {key: part for key, part in said.items() if key not in _KNOWN_SAID}
    return [*as_list(request.get("messages")), {**answer, "role": "assistant"}], choice.get("finish_reason")


def _take_items(request: dict[str, object], response: dict[str, object]) -> Items:
    items = Items()
    instructions = request.get("instructions") or response.get("instructions")
    if isinstance(instructions, str) and instructions:
        items.messages.append({"role": "system", "content": instructions})
    given = request.get("input")
    for number, item in enumerate([{"role": "user", "content": given}] if isinstance(given, str) else as_list(given), 1):
        items.add(item, f"input {number}")
    for number, item in enumerate(as_list(response.get("output")), 1):
        items.add(item, f"output {number}")
    return items
