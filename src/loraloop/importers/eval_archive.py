"""Inspect's `.eval` archives: a zip of one JSON file for each sample, read one at a time and within bounds.

What a zip says of itself is not believed: a member is read up to `MAX_SAMPLE_BYTES` and no further, and an archive whose members claim
to be more than `MAX_RATIO` times as long as the file is not read at all. Names in it are never used as paths.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.errors import ImportFailed
from loraloop.importers.entry import Entry
from loraloop.importers.json_input import parse_json

MAX_SAMPLE_BYTES = 256 * 1024 * 1024
"""The longest sample that is read, unpacked."""
MAX_MEMBERS = 200_000
MAX_RATIO = 300
"""How many times longer than the archive its members together may claim to be; real logs stay below 100."""

_HEADERS = ("header.json", "_journal/start.json")
_SAMPLES = "samples/"
_ADVICE = "write the log again, or convert it with `inspect log convert --to json`"


def is_archive(head: str) -> bool:
    """Whether `head` begins a zip; what its bytes are as text is enough for that."""
    return head.startswith("PK\x03\x04")


def has_archive(path: Path) -> bool:
    """Whether the file at `path` is a zip. Raises ImportFailed when it cannot be opened."""
    try:
        with path.open("rb") as file:
            return is_archive(file.read(4).decode("latin-1"))
    except OSError as error:
        raise ImportFailed(f"{path}: cannot be opened ({error.strerror}); give a file that can be read") from error


def load_header(path: Path) -> object:
    """What the archive says of the whole run. Raises ImportFailed when it is no such archive, or one that is out of bounds."""
    with _open(path) as archive:
        for name in _HEADERS:
            if name in archive.NameToInfo:
                try:
                    return parse_json(_read(archive, archive.getinfo(name)))
                except EntryRefused as error:
                    raise ImportFailed(f"{path}: {name}: {error}") from error
    raise ImportFailed(f"{path}: found no {' or '.join(_HEADERS)} in it; expected an Inspect log; do this: give a file that Inspect wrote")


def iter_samples(path: Path) -> Iterator[Entry]:
    """The samples in the order of the archive; a name that was written twice counts once, as it was written last."""
    with _open(path) as archive:
        for name in dict.fromkeys(archive.namelist()):
            if not name.startswith(_SAMPLES) or not name.endswith(".json"):
                continue
            try:
                yield Entry(f"member {show(name)}", parse_json(_read(archive, archive.getinfo(name))))
            except EntryRefused as error:
                yield Entry(f"member {show(name)}", problem=error)


def _open(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ImportFailed(f"{path}: found no whole zip ({error}); expected an Inspect log; do this: {_ADVICE}") from error
    claimed = sum(member.file_size for member in archive.infolist())
    size = path.stat().st_size
    if len(archive.infolist()) > MAX_MEMBERS or claimed > MAX_RATIO * size:
        archive.close()
        found = f"{len(archive.infolist())} members of {claimed} bytes in a zip of {size}"
        limits = f"at most {MAX_MEMBERS} members and {MAX_RATIO} times its length"
        raise ImportFailed(f"{path}: found {found}; expected {limits}; do this: do not trust it, or {_ADVICE}")
    return archive


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """The bytes of a member. Refused as `too_large` or `bad_archive`."""
    try:
        with archive.open(member) as file:
            data = file.read(MAX_SAMPLE_BYTES + 1)
    except NotImplementedError as error:
        found = f"compression method {member.compress_type}"
        raise EntryRefused("bad_archive", found, "deflate", _ADVICE) from error
    except (OSError, RuntimeError, EOFError, zlib.error, zipfile.BadZipFile, ValueError) as error:
        raise EntryRefused("bad_archive", f"a member that cannot be unpacked ({error})", "a whole zip", _ADVICE) from error
    if len(data) > MAX_SAMPLE_BYTES:
        found = f"more than {MAX_SAMPLE_BYTES} bytes"
        raise EntryRefused("too_large", found, "a sample that fits into memory", "leave it out, or log less in its events")
    return data
