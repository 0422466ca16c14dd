"""Files as importers can read them: plain, at a path. What is packed with gzip or zstd, or comes from standard input, is put aside first.

Packing is told from the first bytes, whatever the name. The plain text goes to a temporary folder, under the same folders and with the
name of the original without `.gz` or `.zst`, and with links to what harnesses write beside a run, as importers tell tasks and outcomes
from these; every message names the original. What is longer unpacked than `MAX_BYTES`, or than `MAX_RATIO` times what it was packed
(from `FREE_BYTES` on), is refused as `too_large`: so a few bytes cannot fill a disk.
"""

from __future__ import annotations

import gzip
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from loraloop.errors import ImportFailed
from loraloop.importers.sources import PACKED, STDIN, check_regular
from loraloop.training_data import Refusal

MAX_BYTES = 16 * 1024**3
"""How long a packed file may be unpacked, and how much is taken from standard input."""
MAX_RATIO = 300
"""How many times longer; recorded runs stay below 100."""
FREE_BYTES = 64 * 1024**2
"""Up to this length the ratio does not count: a few repeated lines pack to nothing."""

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_PIECE = 1 << 20
_ZSTD_PIECE = 1 << 11
"""A block of 4 bytes may unpack to 128 KiB, so this much input gives 64 MiB at most."""
_BESIDE = ("results.json", "simulations")
_ABOVE = ("results.json", "result.json", "verifier")
_STDIN_NAME = "standard input"


@dataclass(frozen=True)
class Plain:
    """A file that importers can read: `path`, and the `name` that messages give it, in the place of a temporary path."""

    path: Path
    name: str
    folder: Path | None = None
    first_line: int = 1
    """The number that the first line has in the original."""
    problem: Refusal | None = None
    """Why the end of a packed file is missing."""

    def rename(self, text: str) -> str:
        """`text` with the original's name and line numbers wherever it names the temporary file."""
        if self.folder is None:
            return text
        if self.first_line > 1:
            begin = re.escape(f"{self.path}, line ")
            text = re.sub(begin + r"(\d+)", lambda found: f"{self.name}, line {int(found[1]) + self.first_line - 1}", text, count=1)
        return text.replace(str(self.path), self.name).replace(str(self.folder), "")


@contextmanager
def open_plain(path: Path) -> Iterator[Plain]:
    """The file at `path`, or what it unpacks to until the block ends. Raises ImportFailed (`too_large`, `not_a_file`)."""
    if (problem := check_regular(path)) and path != STDIN:
        raise problem
    if path != STDIN and _read_magic(path) is None:
        yield Plain(path, str(path))
        return
    with tempfile.TemporaryDirectory(prefix="loraloop-") as made:
        folder = Path(made)
        if path == STDIN:
            raw = folder / "stdin.jsonl"
            _copy_stdin(raw)
            if _read_magic(raw) is None:
                yield Plain(raw, _STDIN_NAME, folder)
                return
            yield _unpack(raw, folder / "unpacked" / "stdin.jsonl", _STDIN_NAME, folder)
            return
        target = mirror(path, folder)
        yield _unpack(path, target, str(path), folder)


def mirror(path: Path, folder: Path) -> Path:
    """Where below `folder` the plain text of `path` goes: under the same folders, beside links to what tells of a run."""
    original = path.absolute()
    name = original.stem if original.suffix.lower() in PACKED else original.name
    target = folder.joinpath(*original.parent.parts[1:], name)
    target.parent.mkdir(parents=True)
    for where, names in ((original.parent, _BESIDE), (original.parent.parent, _ABOVE)):
        for side in names:
            link = folder.joinpath(*where.parts[1:], side)
            if link != target and (where / side).exists() and not link.exists():
                link.symlink_to(where / side)
    return target


def _read_magic(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise ImportFailed(f"{path}: cannot be opened ({error.strerror}); give a file that can be read") from error
    return next((magic for magic in (_GZIP, _ZSTD) if head.startswith(magic)), None)


def _unpack(packed: Path, target: Path, name: str, folder: Path) -> Plain:
    target.parent.mkdir(parents=True, exist_ok=True)
    pieces = _iter_gzip(packed) if _read_magic(packed) == _GZIP else _iter_zstd(packed)
    limit = min(MAX_BYTES, max(FREE_BYTES, MAX_RATIO * packed.stat().st_size))
    problem = None
    with target.open("xb") as file:  # never through a link
        try:
            for piece in pieces:
                file.write(piece)
                if file.tell() > limit:
                    raise _too_large(name, limit)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            found = f"a packed file that breaks off or is damaged after {file.tell()} bytes unpacked ({error})"
            detail = f"{name}: found {found}; expected a whole one; do this: pack it again; what came before is read"
            problem = Refusal(reason="bad_archive", detail=detail)
        except OSError as error:
            raise _no_room(name, error) from error
    return Plain(target, name, folder, problem=problem)


def _iter_gzip(path: Path) -> Iterator[bytes]:
    with gzip.open(path) as file:
        while piece := file.read1(_PIECE):
            yield piece


def _iter_zstd(path: Path) -> Iterator[bytes]:
    """What the frames of the file unpack to, in bounded pieces. Raises EOFError when the last breaks off."""
    context = zstandard.ZstdDecompressor()
    frame, is_begun = context.decompressobj(), False
    with path.open("rb") as file:
        while piece := file.read(_ZSTD_PIECE):
            while piece:
                yield frame.decompress(piece)
                is_begun = True
                if not frame.eof:
                    break
                piece, frame, is_begun = frame.unused_data, context.decompressobj(), False
    if is_begun:
        raise EOFError("the last frame has no end")


def _copy_stdin(target: Path) -> None:
    source: BinaryIO = sys.stdin.buffer
    with target.open("wb") as file:
        while piece := source.read(_PIECE):
            try:
                file.write(piece)
            except OSError as error:
                raise _no_room(_STDIN_NAME, error) from error
            if file.tell() > MAX_BYTES:
                raise _too_large(_STDIN_NAME, MAX_BYTES)


def _too_large(name: str, limit: int) -> ImportFailed:
    advice = "do not trust it; if it is yours, unpack it and give the plain file"
    return ImportFailed(f"{name}: found more than {limit} bytes in it; expected {limit} at most; do this: {advice}", "too_large")


def _no_room(name: str, error: OSError) -> ImportFailed:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return ImportFailed(f"{name}: cannot be unpacked ({error.strerror}; {free} bytes are free); set TMPDIR to a folder with more room")
