"""The elements of a long JSON list, one at a time, in memory for one element; the list is the whole file, or a member of its object.

Each is read by Python's own JSON decoder at its place in a buffer that grows until the element is whole. One that is longer than the
limit is passed over by counting brackets, so it costs no memory and none of its neighbours. Where the text is no JSON, nothing tells the
place of the next element: what follows is one problem.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO, cast

from loraloop.chat.refused_entry import EntryRefused, shorten

_PIECE, _MAX_PIECE = 1 << 20, 16 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_MARK = re.compile(r'\\.|["{}\[\],]', re.DOTALL)
_BEHIND = frozenset(", ]}:\t\r\n")
_NEAR_END = 16
"""A fault so near to the end of the buffer may be but a cut: `tru`, `-`, half an escape."""
_ADVICE = "check that the file is complete; if a run is still writing it, ingest it again at its end"


def too_large(limit: int) -> EntryRefused:
    """What an entry longer than `limit` bytes is refused with."""
    return EntryRefused("too_large", f"an entry of more than {limit} bytes", f"{limit} at most", "leave it out, or record less in it")


def iter_elements(file: BinaryIO, limit: int) -> Iterator[tuple[object, EntryRefused | None]]:
    """(value, None) for each element of the list that begins in `file`, (None, problem) for one that is left out, and for a broken end."""
    text = _Text(file)
    try:
        yield from _take_elements(text, limit)
        if text.peek(""):
            raise text.refuse("more behind the end of the list", "nothing there")
    except EntryRefused as problem:
        yield None, problem


def read_around(file: BinaryIO, key: str, limit: int) -> tuple[dict[str, object], EntryRefused | None]:
    """(the object in `file`, with an empty list for the list under `key`, which is passed over; why it breaks off in or behind that list).

    Refused when it breaks off before that list, when a member is longer than `limit` bytes, or when `key` comes twice.
    """
    text = _Text(file, "object")
    found: dict[str, object] = {}
    try:
        for name in _iter_names(text, limit):
            if name == key and key in found:
                raise text.refuse(f"a second `{key}`", "one of each name")
            if name == key and text.peek("["):
                found[name] = []
                text.skip_value()
            else:
                found[name] = text.take_value(limit)
        if text.peek(""):
            raise text.refuse("more behind the end of the object", "nothing there")
    except EntryRefused as problem:
        if found.get(key) != []:
            raise
        return found, problem
    return found, None


def iter_inside(file: BinaryIO, key: str, limit: int) -> Iterator[tuple[object, EntryRefused | None]]:
    """`iter_elements` of the list under `key` of the object in `file`; nothing where there is no such list."""
    text = _Text(file, "object")
    try:
        for name in _iter_names(text, limit):
            if name == key and text.peek("["):
                yield from _take_elements(text, limit)
                return
            text.skip_value()
    except EntryRefused as problem:
        yield None, problem


def _iter_names(text: _Text, limit: int) -> Iterator[str]:
    """The names of an object's members; the value of each is to be taken before the next."""
    text.take("{")
    is_first = True
    while not text.peek("}"):
        if not is_first:
            text.take(",")
        is_first = False
        if not text.peek('"'):
            raise text.refuse("no whole JSON object", "a name in quotes")
        name = cast("str", text.take_value(limit))
        text.take(":")
        yield name
    text.take("}")


def _take_elements(text: _Text, limit: int) -> Iterator[tuple[object, EntryRefused | None]]:
    text.take("[")
    is_first = True
    while not text.peek("]"):
        if not is_first:
            text.take(",")
        is_first = False
        try:
            yield text.take_value(limit), None
        except EntryRefused as problem:
            if problem.reason != "too_large":
                raise
            yield None, problem
            text.skip_value()
    text.take("]")


class _Text:
    """The text of a file, of which `buffer` from `at` on is in memory."""

    def __init__(self, file: BinaryIO, whole: str = "list") -> None:
        self.file = file
        self.whole = whole
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.json = json.JSONDecoder()
        self.buffer, self.at, self.is_over = "", 0, False
        self.n_before = 0
        """How many characters there were before the buffer."""
        self.n_bytes = 0
        self.problem: EntryRefused | None = None

    def grow(self) -> bool:
        """Read on, as much again as there is, within bounds; False at the end. Refused as `bad_encoding` behind the last good byte."""
        if self.problem is not None:
            raise self.problem
        if self.is_over:
            return False
        kept = self.buffer[self.at :]
        data = self.file.read(min(max(_PIECE, len(kept)), _MAX_PIECE))
        self.is_over = not data
        begin, self.n_bytes = self.n_bytes, self.n_bytes + len(data)
        if b"\0" in data:
            at = data.index(b"\0")
            self.problem = self._encoding(f"a NUL byte at byte {begin + at + 1}")
            data = data[:at]
        try:
            more = self.decoder.decode(data, final=self.is_over)
        except UnicodeDecodeError as error:
            self.problem = self._encoding(f"byte 0x{error.object[error.start]:02x} near byte {begin + error.start + 1}, which is not UTF-8")
            more = error.object[: error.start].decode(errors="replace")
        self.n_before += self.at
        self.buffer, self.at = kept + more, 0
        return bool(more) or not self.is_over

    def peek(self, mark: str) -> bool:
        """Whether `mark` follows behind spaces; with an empty `mark`, whether anything does."""
        while True:
            self.at = _SPACE.match(self.buffer, self.at).end()  # type: ignore[union-attr]  # it always matches
            if self.at < len(self.buffer):
                return self.buffer.startswith(mark, self.at)
            if not self.grow():
                return False

    def take(self, mark: str) -> None:
        if not self.peek(mark):
            raise self.refuse(f"no whole JSON {self.whole}", f"`{mark}`")
        self.at += 1

    def take_value(self, limit: int) -> object:
        """The value that follows. Refused as `bad_json`, or as `too_large`, and then still to be skipped."""
        self.peek("")
        while True:
            try:
                value, end = self.json.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or not self.buffer[error.pos + _NEAR_END :].strip()
                if not is_cut or self._is_exhausted(limit):
                    raise self.refuse(f"no JSON ({error.msg})", "a list of whole entries", error.pos) from error
            except (ValueError, RecursionError) as error:  # integers of thousands of digits; thousands of nested brackets
                raise self.refuse(f"JSON that Python cannot read ({shorten(str(error))})", "a list of whole entries") from error
            else:
                if end - self.at > limit:
                    raise too_large(limit)
                is_settled = self.buffer[end : end + 1] in _BEHIND or len(self.buffer) - end > _NEAR_END  # `1` may be the begin of `1.5`
                if is_settled or self._is_exhausted(limit):
                    self.at = end
                    return value

    def skip_value(self) -> None:
        """Pass over the value that follows, and hold none of it."""
        depth, in_string = 0, False
        while True:
            found = None
            for found in _MARK.finditer(self.buffer, self.at):
                mark = found.group()
                if mark == '"':
                    in_string = not in_string
                elif in_string or mark.startswith("\\"):
                    continue
                elif mark in "{[":
                    depth += 1
                elif depth == 0:  # a comma or the end of the list
                    self.at = found.start()
                    return
                elif mark in "}]":
                    depth -= 1
            ends = found.end() if found else self.at
            self.at = len(self.buffer) - (self.buffer.endswith("\\") and ends < len(self.buffer))
            if not self.grow():
                raise self.refuse(f"no whole JSON {self.whole}", "its end")

    def refuse(self, what: str, expected: str, at: int | None = None) -> EntryRefused:
        place = self.at if at is None else at
        found = f"{what} at character {self.n_before + place + 1}: {shorten(self.buffer[self.at : self.at + 1000])}"
        return EntryRefused("bad_json", found, expected, _ADVICE)

    def _is_exhausted(self, limit: int) -> bool:
        """Whether no more can be read; refused as `too_large` when the value is longer than `limit` already."""
        if len(self.buffer) - self.at > limit:
            raise too_large(limit)
        return not self.grow()

    def _encoding(self, found: str) -> EntryRefused:
        return EntryRefused("bad_encoding", found, "UTF-8 text", "convert the text to UTF-8 without NUL bytes")
