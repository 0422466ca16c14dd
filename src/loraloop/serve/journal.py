"""A journal: lines of JSON that are on the disk before anybody is told so, in segments that are removed once their content is elsewhere.

One thread writes, another may read and remove what is sealed. A segment is `journal-<number>.jsonl`; a line that was cut off by the
death of its writer was acknowledged to nobody, and is put aside, never read as a whole one and never thrown away.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from loraloop.files import json_line, sync, write_atomic

_NAME = re.compile(r"journal-(\d{10})\.jsonl")


class Journal:
    """The segments in `folder`, which one process has to itself; the one that is written to, and those that are sealed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._handle: int | None = None
        self._size = 0
        self._opened_at = 0.0
        self._lock = threading.Lock()  # of which segment is written to

    def open(self) -> None:
        """Make the folder, and put aside what a writer that died has left half written. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for segment in self.sealed():
            _put_torn_tail_aside(segment)
            self._number = max(self._number, _number_of(segment))

    def append(self, values: Sequence[object]) -> None:
        """Add a line for each; all are on the disk when this returns.

        Raises OSError when they may not be: then what could be taken back is, and none of them counts as written. A segment whose
        fsync failed is never written to again, as the system may have dropped what it was told to keep.
        """
        lines = "".join(json_line(value) + "\n" for value in values).encode("utf-8", "backslashreplace")
        handle, before = self._open_segment(), self._size
        try:
            left = memoryview(lines)
            while left:
                left = left[os.write(handle, left) :]
            os.fsync(handle)
        except OSError:
            self._take_back(handle, before)
            raise
        self._size = before + len(lines)

    @property
    def age_seconds(self) -> float:
        """How long the segment that is written to has had lines in it."""
        return time.monotonic() - self._opened_at if self._handle is not None else 0.0

    @property
    def size_bytes(self) -> int:
        """Of the segment that is written to."""
        return self._size

    def seal(self) -> None:
        """Write to the segment no more; the next line begins another."""
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def sealed(self) -> list[Path]:
        """The segments that are not written to, oldest first."""
        with self._lock:  # a segment that is just begun is not taken for a sealed one
            current = self._path(self._number) if self._handle is not None else None
            return [path for path in self.segments() if path != current]

    def segments(self) -> list[Path]:
        """All of them, oldest first."""
        return sorted(path for path in self._folder.glob("journal-*.jsonl") if _NAME.fullmatch(path.name))

    def remove(self, segment: Path) -> None:
        """What was in it is elsewhere now, for good."""
        segment.unlink(missing_ok=True)
        sync(self._folder)

    def total_bytes(self) -> int:
        """Of all segments."""
        total = 0
        for path in self.segments():
            with suppress(FileNotFoundError):  # removed meanwhile
                total += path.stat().st_size
        return total

    def _open_segment(self) -> int:
        with self._lock:
            if self._handle is None:
                self._number += 1  # also where this fails: what is half made is not met again
                handle = os.open(self._path(self._number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
                try:
                    sync(self._folder)
                except OSError:
                    os.close(handle)
                    raise
                self._handle, self._size, self._opened_at = handle, 0, time.monotonic()
            return self._handle

    def _take_back(self, handle: int, size: int) -> None:
        """Cut off what was written of lines that do not count; the segment takes no more."""
        try:
            os.ftruncate(handle, size)
        except OSError:
            pass  # a torn tail, or whole lines that were promised to nobody: harmless either way
        finally:
            self.seal()

    def _path(self, number: int) -> Path:
        return self._folder / f"journal-{number:010d}.jsonl"


def _number_of(segment: Path) -> int:
    found = _NAME.fullmatch(segment.name)
    return int(found[1]) if found else 0


def _put_torn_tail_aside(segment: Path) -> None:
    content = segment.read_bytes()
    end = content.rfind(b"\n") + 1
    if end == len(content):
        return
    write_atomic(segment.with_suffix(".torn"), content[end:].decode("utf-8", "backslashreplace"))
    with segment.open("r+b") as file:
        file.truncate(end)
        os.fsync(file.fileno())
