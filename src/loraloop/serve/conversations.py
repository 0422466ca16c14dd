"""Which conversation a call goes on with: one whose messages and answer it repeats to the letter, and adds to.

Kept are hashes over the beginnings of conversations, a few bytes each and a bounded number. Where two conversations have been the same so
far, each is gone on with once before one is a second time, so that two attempts that run side by side stay two.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraloop.files import json_line

MAX_ENDS = 100_000
"""How many answers can be gone on with; the oldest are given up first."""


@dataclass
class _End:
    waiting: list[str] = field(default_factory=list)
    """Episodes that ended here so far, and that nobody has gone on with, oldest first."""
    last: str = ""
    """The one that was gone on with last."""


class Conversations:
    """The ends of the conversations that are open."""

    def __init__(self, max_ends: int = MAX_ENDS) -> None:
        self._max_ends = max_ends
        self._ends: OrderedDict[bytes, _End] = OrderedDict()

    def find(self, hashes: Sequence[bytes], messages: Sequence[Mapping[str, Any]]) -> str | None:
        """The episode that a request goes on with; None when it begins one. `hashes` are `hash_beginnings` of its messages."""
        for at in range(len(hashes) - 2, -1, -1):
            end = self._ends.get(hashes[at]) if messages[at].get("role") == "assistant" else None
            if end is None:
                continue
            self._ends.move_to_end(hashes[at])
            if end.waiting:
                end.last = end.waiting.pop(0)
            return end.last
        return None

    def add(self, before: bytes, answer: Mapping[str, Any], episode: str) -> None:
        """`episode` has come to the end that `answer` is, behind the messages whose hash is `before`."""
        end = self._ends.setdefault(_chain(before, answer), _End())
        if episode not in end.waiting:
            end.waiting.append(episode)
        self._ends.move_to_end(_chain(before, answer))
        while len(self._ends) > self._max_ends:
            self._ends.popitem(last=False)


def hash_beginnings(alias: str, messages: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """A hash over the first message, the first two, and so on; of what was said to `alias`."""
    before, hashes = alias.encode("utf-8", "surrogatepass"), []
    for message in messages:
        before = _chain(before, message)
        hashes.append(before)
    return hashes


def _chain(before: bytes, message: Mapping[str, Any]) -> bytes:
    said = json_line(_wording(message)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(before + b"\0" + said, digest_size=16).digest()


def _wording(message: Mapping[str, Any]) -> list[Any]:
    """What counts: clients leave out empty keys, write null for them, or give text in parts."""
    content, calls = message.get("content") or "", message.get("tool_calls")
    if isinstance(content, list):
        content = "".join(str(part.get("text", part)) if isinstance(part, dict) else str(part) for part in content)
    functions = []
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            functions.append([call.get("id"), function.get("name"), function.get("arguments")])
    return [message.get("role"), content, message.get("name"), message.get("tool_call_id"), functions]
