"""JSON files from outside: lines, whole documents, and what the first bytes of a file tell.

Files are UTF-8 with or without a byte order mark, with any line ends. A line that cannot be read spoils itself only; a document
that cannot be read is an ImportFailed. Nothing here knows what the JSON means.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pydantic_core import from_json

from loraloop.chat.refused_entry import EntryRefused, shorten
from loraloop.errors import ImportFailed
from loraloop.importers.entry import Entry
from loraloop.importers.json_list import iter_elements, iter_inside, read_around, too_large

MAX_ENTRY_BYTES = 64 * 1024**2
"""The longest line, and element of a list, that is read; a longer one is refused as `too_large` and passed over."""
MAX_DOCUMENT_BYTES = 256 * 1024**2
"""The longest file that is read as a whole, for formats that need that."""
WHOLE_BYTES = 32 * 1024**2
"""Up to this length, a document whose entries are a list inside an object is read as a whole too; that takes five times the memory."""
BUFFER_BYTES = 1 << 18
"""What is read of a file of lines at a time: a line that lies in it whole is copied once."""

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|["{}\[\],]', re.DOTALL)
_FIRST_OBJECT = re.compile(r"[\ufeff\s]*\[?\s*\{")


def load_document(path: Path) -> object:
    """The value of a file that is one JSON document. Raises ImportFailed when it cannot be read, is no JSON, or `too_large`."""
    with _open(path) as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        expected = f"{MAX_DOCUMENT_BYTES} at most, as this document must be read as a whole"
        raise ImportFailed(f"{path}: found more than {MAX_DOCUMENT_BYTES} bytes; expected {expected}; do this: split it", "too_large")
    try:
        return parse_json(data)
    except EntryRefused as error:
        raise _no_document(path, error) from error


def load_with_list(path: Path, key: str, place: str) -> tuple[object, Iterator[Entry] | None]:
    """The value of a file that is one JSON document, and None; or, when it is long and an object with a list under `key`, that object with
    an empty list there, and the list's entries, one at a time ("entry 3", with the word `place` for "entry").

    A long one that breaks off within the list gives what came before, and a problem. Raises ImportFailed as `load_document` does.
    """
    with _open(path) as file:
        if os.fstat(file.fileno()).st_size <= WHOLE_BYTES or not _head(file).startswith(b"{"):
            return load_document(path), None
        file.seek(0)
        try:
            document, problem = read_around(file, key, MAX_DOCUMENT_BYTES)
        except EntryRefused as error:
            raise _no_document(path, error) from error
    return (document, _iter_inside(path, key, place, problem)) if document.get(key) == [] else (load_document(path), None)


def _iter_inside(path: Path, key: str, place: str, problem: EntryRefused | None) -> Iterator[Entry]:
    number = 0
    with _open(path) as file:
        for number, (value, why) in enumerate(iter_inside(file, key, MAX_DOCUMENT_BYTES), 1):
            yield Entry(f"{place} {number}", value, why)
            if why is not None and why.reason != "too_large":
                return
    if problem is not None:
        yield Entry(f"behind {place} {number}", problem=problem)


def iter_entries(path: Path, parse: Callable[[bytes], object] | None = None) -> Iterator[Entry]:
    """The entries of a file of JSON Lines ("line 3"), or of one JSON document that is a list or a single object ("entry 3").

    A file whose first line is a whole JSON object is read line by line, and so is one whose lines merely look broken. Blank lines
    are skipped; an empty file has no entries. Neither lines nor a list are held as a whole. A list that breaks off gives what came
    before, and a problem. Raises ImportFailed when a document is not even begun, or a single object is incomplete. `parse` is a faster
    `parse_json`, for lines.
    """
    if is_by_line(path):
        yield from _iter_lines(path, parse or parse_json)
    elif is_list(path):
        yield from iter_list(path)
    else:
        yield Entry("entry 1", load_document(path))


def iter_list(path: Path) -> Iterator[Entry]:
    """The elements of a file that is one JSON list ("entry 3"), one at a time. Raises ImportFailed when not even the first can be read."""
    with _open(path) as file:
        if not is_list(path):
            raise _no_document(path, EntryRefused("bad_json", shorten(_head(file).decode(errors="replace")), "a list", _WHOLE_ADVICE))
        for number, (value, problem) in enumerate(iter_elements(file, MAX_ENTRY_BYTES), 1):
            if problem is not None and number == 1 and problem.reason != "too_large":
                raise _no_document(path, problem) from problem
            yield Entry(f"entry {number}", value, problem)


def is_list(path: Path) -> bool:
    """Whether the file begins as a JSON list."""
    with _open(path) as file:
        return _head(file).startswith(b"[")


def count_entries(path: Path) -> int | None:
    """How many entries `iter_entries` gives when it goes by line, else None, as a document must be parsed to be counted."""
    if not is_by_line(path):
        return None
    with _open(path) as file:
        return sum(1 for line, _ in _bounded_lines(file) if _strip(line))


def is_by_line(path: Path) -> bool:
    """Whether each line is an entry, rather than the whole file one document."""
    with _open(path) as file:
        lines = _bounded_lines(file)
        first, is_whole = next(((line, whole) for part, whole in lines if (line := _strip(part))), (b"", True))
        has_more = any(_strip(line) for line, _ in lines)
    if not is_whole:
        return not first.startswith(b"[")
    if first.startswith(b"[") and not has_more:
        return False
    try:
        parse_json(first)
    except EntryRefused:
        return not (first == b"{" or first.startswith(b"["))
    return True


def parse_json(data: bytes) -> object:
    """The JSON value of `data`. Refused as `bad_encoding` for NUL bytes and other than UTF-8, as `bad_json` for what is not JSON.

    NaN and Infinity pass, as Python writes them; who uses a number checks it.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    with suppress(ValueError):  # what it takes, it reads as Python does; what it does not, Python judges
        parsed: object = from_json(data, allow_inf_nan=False)
        return parsed
    text = _decode(data)
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        found = f"no JSON ({error.msg} at {where}): {shorten(text)}"
        raise EntryRefused("bad_json", found, "one JSON object", _LINE_ADVICE) from error
    except (ValueError, RecursionError) as error:  # integers of thousands of digits; thousands of nested brackets
        found = f"JSON that Python cannot read ({shorten(str(error))}): {shorten(text)}"
        raise EntryRefused("bad_json", found, "one JSON object", _LINE_ADVICE) from error
    return value


def first_object_keys(head: str) -> set[str]:
    """The keys of the first object in `head`, the beginning of an object or of a list of objects, which may be cut anywhere.

    Keys of values inside are not among them. Empty when `head` begins in another way.
    """
    begin = _FIRST_OBJECT.match(head)
    keys: set[str] = set()
    depth, key_follows = 1, True
    for token in _TOKEN.finditer(head, begin.end()) if begin else ():
        mark = token.group()
        if mark == '"':  # a string that is cut off
            break
        if mark in "{[":
            depth += 1
        elif mark in "}]":
            depth -= 1
            if depth == 0:
                break
        elif depth == 1 and mark == ",":
            key_follows = True
        elif depth == 1 and key_follows:
            keys.add(mark[1:-1])
            key_follows = False
    return keys


def opening_keys(head: str) -> list[set[str]]:
    """`first_object_keys` of `head` and of every further line that begins an object, as the first line may be broken or blank."""
    openings = [head, *(line for line in head.splitlines() if line.startswith("{"))]
    return [keys for keys in map(first_object_keys, openings) if keys]


_LINE_ADVICE = "repair or delete it; if the file is still being written, ingest it again when it is complete"
_WHOLE_ADVICE = "check that the file is complete; if a run is still writing it, wait for its end"


def _iter_lines(path: Path, parse: Callable[[bytes], object]) -> Iterator[Entry]:
    with _open(path, BUFFER_BYTES) as file:
        for number, (line, is_whole) in enumerate(_bounded_lines(file), 1):
            place = f"line {number}"
            if not is_whole:
                yield Entry(place, problem=too_large(MAX_ENTRY_BYTES))
            elif stripped := _strip(line):
                try:
                    yield Entry(place, parse(stripped))
                except EntryRefused as error:
                    yield Entry(place, problem=error)


def _bounded_lines(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """(line, whether that is all of it): of a line beyond `MAX_ENTRY_BYTES` only the first bytes are given."""
    while line := file.readline(MAX_ENTRY_BYTES):
        if line.endswith(b"\n") or len(line) < MAX_ENTRY_BYTES:
            yield line, True
            continue
        begin = line[:1000]
        while line and not line.endswith(b"\n"):
            line = file.readline(1 << 20)
        yield begin, False


def _decode(data: bytes) -> str:
    expected = "UTF-8 text"
    if b"\0" in data:
        at = data.index(b"\0")
        raise EntryRefused("bad_encoding", f"a NUL byte at byte {at + 1}", expected, "write it again as UTF-8 without NUL bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at byte {error.start + 1}, which is not UTF-8"
        raise EntryRefused("bad_encoding", found, expected, "convert the text to UTF-8") from error


def _strip(line: bytes) -> bytes:
    return line.strip().removeprefix(codecs.BOM_UTF8).strip()


def _head(file: BinaryIO) -> bytes:
    """The first bytes that are no space, and the place in the file behind them."""
    return next((stripped for part in iter(lambda: file.read(1 << 16), b"") if (stripped := _strip(part))), b"")


def _no_document(path: Path, error: EntryRefused) -> ImportFailed:
    return ImportFailed(f"{path}: found {error.found}; expected one whole JSON document; do this: {_WHOLE_ADVICE}")


def _open(path: Path, buffer_bytes: int = -1) -> BinaryIO:
    try:
        return path.open("rb", buffering=buffer_bytes)
    except OSError as error:
        raise ImportFailed(f"{path}: cannot be opened ({error.strerror}); give a file that can be read") from error
