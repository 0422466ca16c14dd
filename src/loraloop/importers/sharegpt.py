"""ShareGPT data: a JSON list, or JSON Lines, of {conversations: [{from, value}], system, tools}.

`human` and `user` speak as the user, `gpt` and `assistant` as the agent, `observation` and `tool` are results; a `function_call` holds
JSON {name, arguments}, or a list of them, and is the agent's. `tools` is JSON text. Every entry is a demonstration, so a Success(1.0) by
convention of the format, tagged `outcome_from: format`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal, cast

from pydantic import JsonValue

from loraloop.chat.openai_messages import take_messages, take_tools
from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.episode import Episode, EpisodeMetadata, Success
from loraloop.importers.entry import convert_entries, require_clean, require_object, require_text, to_tags
from loraloop.importers.json_input import count_entries, iter_entries, opening_keys
from loraloop.importers.null_padding import without_padded_arguments, without_padding
from loraloop.importers.openai_chat import require_own_words
from loraloop.training_data import Refusal

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
_KNOWN = {"conversations", "system", "tools"}
_OTHERS = {"chosen", "rejected", "kto_tag", "reward", "images", "videos", "audios"}
"""What changes the meaning of an entry and is not read here."""


class ShareGptImporter:
    """Reads ShareGPT data, with or without function calls."""

    name: ClassVar[str] = "sharegpt"
    description: ClassVar[str] = 'ShareGPT data: a JSON list of {"conversations": [{"from", "value"}], "tools"}'
    lines_stand_alone: ClassVar[Literal[True]] = True

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True for objects with `conversations` of turns that say who they are `from`."""
        return any("conversations" in keys for keys in opening_keys(head)) and '"from"' in head

    def count(self, path: Path) -> int | None:
        """The number of lines that are not blank; None for a JSON list."""
        return count_entries(path)

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """One Episode or Refusal for each entry, in order. Raises ImportFailed for an unreadable file."""
        return convert_entries(path, iter_entries(path), _to_episode)


def _to_episode(value: object) -> Episode:
    row = require_object(value, ("conversations",), "{conversations: [{from, value}], tools}")
    require_clean(row)
    for key in sorted(_OTHERS & row.keys()):
        if row[key] not in (None, "", [], {}):
            advice = "write it in the OpenAI chat format, or leave it out"
            raise EntryRefused("not_a_demonstration", f"the key `{key}` = {show(row[key])}", "a conversation to learn", advice)
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise EntryRefused("bad_shape", f"conversations = {show(turns)}", "a list of turns", "write each as {from, value}")
    tools, n_keys = without_padding(_to_tools(row.get("tools")))
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    raw, n_arguments = without_padded_arguments([*system, *(_to_openai(turn, number) for number, turn in enumerate(turns, 1))], tools)
    taken = take_messages(raw, "conversations")
    require_own_words(taken.messages)
    tags = to_tags(
        ShareGptImporter.name,
        taken.ignored | (row.keys() - _KNOWN),
        outcome_from="format",
        decoded_arguments=taken.decoded_arguments,
        padded_keys_removed=n_keys + n_arguments or None,
    )
    return Episode(
        messages=tuple(taken.messages),
        tools=cast("tuple[dict[str, JsonValue], ...]", tools),
        outcome=Success(1.0),
        metadata=EpisodeMetadata(tags=tags),
    )


def _to_openai(raw: object, number: int) -> dict[str, object]:
    turn = require_object(raw, ("from", "value"), f"turn {number} with from and value")
    speaker, value = require_text(turn, "from"), require_text(turn, "value")
    if speaker not in _ROLES:
        raise EntryRefused("bad_shape", f"from {show(speaker)} in turn {number}", f"one of {', '.join(_ROLES)}", "say who speaks")
    if speaker != "function_call":
        return {"role": _ROLES[speaker], "content": value}
    calls = _parse(value, f"turn {number}, a function call")
    return {"role": "assistant", "tool_calls": [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]}


def _to_tools(raw: object) -> tuple[dict[str, object], ...]:
    """Schemas from JSON text; plain ones, without the `function` round them, get it."""
    schemas = _parse(raw, "tools") if isinstance(raw, str) and raw.strip() else raw
    tools = take_tools(schemas)
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _parse(text: str, what: str) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EntryRefused("bad_shape", f"{what} that is no JSON: {show(text)}", "JSON", "repair it, or leave the entry out") from error
    return value
