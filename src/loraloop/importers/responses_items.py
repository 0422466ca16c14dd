"""Items of OpenAI's Responses API as messages in the chat shape.

What a model produced in a row, thoughts, words and calls, is one turn of the agent; a second message of it begins another turn unless calls
are waiting. The input of a custom tool is no JSON: it becomes `{"input": text}` and is counted. Thoughts are kept apart, in full where they
are recorded, else as their summary; encrypted ones are named. Tools that ran on the server are refused by name, as their results
are not recorded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.importers.agent_turns import as_list, as_object, to_call
from loraloop.importers.entry import require_object

_TEXT = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_CALLS = ("function_call", "custom_tool_call", "local_shell_call")
_OUTPUTS = ("function_call_output", "custom_tool_call_output", "local_shell_call_output")


@dataclass
class Items:
    """Messages as they come out of items. `marks` are put on every message, such as `is_demo` on copied ones."""

    messages: list[dict[str, object]] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    n_custom: int = 0
    marks: dict[str, object] = field(default_factory=dict)
    _turn: dict[str, object] | None = None
    _thoughts: list[str] = field(default_factory=list)

    def add(self, item: object, place: str) -> None:
        """One item; a message may lack its type. Refused as `bad_shape`, `unsupported_content` or `history_rewritten`."""
        raw = require_object(item, (), f"an item in {place}")
        kind = raw.get("type") or ("message" if "role" in raw else None)
        if kind == "message":
            self._add_message(raw)
        elif kind == "reasoning":
            self._add_reasoning(raw)
        elif kind in _CALLS:
            self._add_call(raw, str(kind))
        elif kind in _OUTPUTS:
            self._turn = None
            self._add({"role": "tool", "tool_call_id": raw.get("call_id") or raw.get("id"), "content": _to_text(raw.get("output"))})
        elif kind == "compaction":
            raise EntryRefused("history_rewritten", f"{place}, a compaction", "the history that the agent saw", "log calls before it")
        else:
            found = f"an item of type {show(kind)} in {place}"
            raise EntryRefused("unsupported_content", found, "text and calls of functions", "leave it out: its result is not recorded")

    def _add_message(self, raw: dict[str, object]) -> None:
        content = _to_text(raw.get("content"))
        if raw.get("role") != "assistant":
            self._turn = None
            self._add({"role": raw.get("role"), "content": content})
        elif self._turn is not None and self._turn["content"] is None:
            self._turn["content"] = content
        else:
            self._begin(content)

    def _add_reasoning(self, raw: dict[str, object]) -> None:
        said = as_list(raw.get("content")) or as_list(raw.get("summary"))
        texts = [as_object(part).get("text") for part in said]
        self._thoughts += [text for text in texts if isinstance(text, str)]
        if raw.get("encrypted_content"):
            self.ignored.add("items.encrypted_content")

    def _add_call(self, raw: dict[str, object], kind: str) -> None:
        name, arguments = raw.get("name"), raw.get("arguments")
        if kind == "custom_tool_call":
            arguments = json.dumps({"input": raw.get("input")}, ensure_ascii=False)
            self.n_custom += 1
        elif kind == "local_shell_call":
            name, arguments = "local_shell", as_object(raw.get("action"))
        turn = self._turn if self._turn is not None else self._begin(None)
        calls = as_list(turn["tool_calls"])
        calls.append(to_call(raw.get("call_id") or raw.get("id"), name, arguments))

    def _begin(self, content: object) -> dict[str, object]:
        turn: dict[str, object] = {"role": "assistant", "content": content, "tool_calls": []}
        if self._thoughts:
            turn["reasoning_content"] = "\n".join(self._thoughts)
            self._thoughts = []
        self._turn = turn
        self._add(turn)
        return turn

    def _add(self, message: dict[str, object]) -> None:
        message.update(self.marks)
        self.messages.append(message)


def _to_text(content: object) -> object:
    """Parts of text in the chat shape; what else there is stays, so that `take_messages` refuses it by name."""
    if isinstance(content, dict):  # an output with its content and whether it succeeded
        return _to_text(content.get("content"))
    if not isinstance(content, list):
        return content
    parts = [as_object(part) for part in content]
    return [{"type": "text", "text": part.get("text")} if part.get("type") in _TEXT else part for part in parts]
