"""A member that line after line repeats to the byte, such as the tool schemas of a fine-tuning file: parsed once, then cut out of the line.

A line without it is JSON with a mark in its place. Where the mark stands as that member of the outermost object, and only there, its value
is what was cut out, since JSON text means the same wherever a value may stand. Anything else is parsed whole: what a line is never depends
on the lines before it, only the time that it takes.
"""

from __future__ import annotations

import json
import re

from loraloop.chat.refused_entry import EntryRefused
from loraloop.importers.json_input import parse_json

MAX_BYTES = 1 << 16
"""The longest member that is kept for the next lines."""
MIN_BYTES = 256
"""A shorter one is parsed in no time."""
MAX_KEPT = 16
"""How many of them are."""
MAX_IN_VAIN = 32
"""After so many that did not come again, no more are kept."""

_MARK = "\0"


class Repeated:
    """Parses the lines of one file. The member is a list under `key`, and the same object in all lines that repeat it: do not change it."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._name = json.dumps(key).encode()
        self._begin = re.compile(re.escape(self._name) + rb"\s*:\s*(?=\[)")
        self._kept: dict[bytes, object] = {}
        self._left = MAX_IN_VAIN
        self._last = b"", 0  # the member that was met last, and how far from the end of its line

    def parse(self, line: bytes) -> object:
        """`parse_json` of the line. Refused as there."""
        if b"\\u0000" in line:  # so that the mark is ours
            return parse_json(line)
        at, known = self._find(line)
        if known is not None:
            try:
                row = parse_json(line[:at] + self._name + b':"\\u0000"' + line[at + len(known) :])
            except EntryRefused:
                row = None
            if isinstance(row, dict) and row.get(self._key) == _MARK:
                row[self._key] = self._kept[known] = self._kept.pop(known)  # the newest is forgotten last
                self._left = MAX_IN_VAIN
                self._last = known, len(line) - at
                return row
        row = parse_json(line)
        if known is None and self._left and isinstance(row, dict) and isinstance(row.get(self._key), list):
            self._keep(line)
        return row

    def keeps(self, value: object) -> bool:
        """Whether `value` is a member that is kept, so that further lines may have the very same object."""
        return any(value is kept for kept in self._kept.values())

    def _find(self, line: bytes) -> tuple[int, bytes | None]:
        """Where a member that is kept stands in the line, and which; as far from its end as in the line before, or else the first."""
        known, from_end = self._last
        at = len(line) - from_end
        if known in self._kept and at >= 0 and line.startswith(known, at):
            return at, known
        at = line.find(self._name) if self._kept else -1
        return at, next((text for text in self._kept if line.startswith(text, at)), None) if at >= 0 else None

    def _keep(self, line: bytes) -> None:
        """Keep the first such member of the line."""
        begin = self._begin.search(line)
        if begin is None:
            return
        text = line[begin.end() :].decode()
        try:
            _, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return
        member = text[:end].encode()
        if not MIN_BYTES <= len(member) <= MAX_BYTES:
            return
        self._left -= 1
        while len(self._kept) >= MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[begin[0] + member] = parse_json(member)
