"""Messages in Anthropic's shape, content blocks, as messages in the OpenAI shape.

`text` is content, `tool_use` a call, its input as JSON text with the keys in their order; `thinking` is kept apart. The results of a
turn's calls stand in the next user message; each becomes a tool message, and the text around them turns of the user. Blocks that have no
such place (images, documents, tools that ran on the server) are passed on as they are, so that `take_messages` refuses them by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.importers.agent_turns import to_call
from loraloop.importers.entry import require_object

_HIDDEN = {"redacted_thinking"}


@dataclass
class Blocks:
    """Messages as they are taken over, and the names of what was left behind."""

    messages: list[dict[str, object]] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)

    def add_system(self, system: object) -> None:
        """The system prompt, which Anthropic keeps beside the messages: text or blocks of text; none when it is absent or empty."""
        if system not in (None, "", []):
            self.messages.append({"role": "system", "content": system})

    def add(self, message: object, place: str) -> None:
        """One message. Refused as `bad_shape` when its role or its content is none of Anthropic's."""
        raw = require_object(message, ("role", "content"), f"{place} with role and content")
        role, content = raw["role"], raw["content"]
        if role not in ("user", "assistant", "system"):
            raise EntryRefused("bad_shape", f"role {show(role)} in {place}", "user or assistant", "give the messages as Anthropic has them")
        if not isinstance(content, str | list):
            raise EntryRefused("bad_shape", f"content {show(content)} in {place}", "text or a list of blocks", "write it as one of these")
        if role == "assistant":
            self.messages.append(self._to_turn(content, place))
        elif isinstance(content, str):
            self.messages.append({"role": role, "content": content})
        else:
            self._add_user_blocks(role, [_to_block(block, place) for block in content])

    def _to_turn(self, content: str | list[object], place: str) -> dict[str, object]:
        if isinstance(content, str):
            return {"role": "assistant", "content": content}
        shown, thoughts, calls = [], [], []
        for block in (_to_block(part, place) for part in content):
            kind = block["type"]
            if kind == "tool_use":
                calls.append(to_call(block.get("id"), block.get("name"), block.get("input")))
            elif kind == "thinking":
                thoughts.append(str(block.get("thinking") or ""))
            elif kind in _HIDDEN:
                self.ignored.add(f"messages.{kind}")
            else:
                shown.append(_plain(block))
        turn: dict[str, object] = {"role": "assistant", "content": shown or None, "tool_calls": calls}
        return {**turn, "reasoning_content": "\n".join(thoughts)} if any(thoughts) else turn

    def _add_user_blocks(self, role: object, blocks: list[dict[str, object]]) -> None:
        text: list[object] = []
        for block in blocks:
            if block["type"] != "tool_result":
                text.append(_plain(block))
                continue
            if text:
                self.messages.append({"role": role, "content": text})
                text = []
            if block.get("is_error"):
                self.ignored.add("messages.is_error")
            self.messages.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": block.get("content")})
        if text or not blocks:
            self.messages.append({"role": role, "content": text})


def _to_block(block: object, place: str) -> dict[str, object]:
    found = require_object(block, ("type",), f"a block with its type in {place}")
    if not isinstance(found["type"], str):
        raise EntryRefused("bad_shape", f"a block of type {show(found['type'])} in {place}", "a name", "write the type as text")
    return found


def _plain(block: dict[str, object]) -> dict[str, object]:
    """A block of text as a part of text; others as they are."""
    return {"type": "text", "text": block.get("text")} if block["type"] == "text" else block
