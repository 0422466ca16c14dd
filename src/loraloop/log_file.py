"""The log of a process that may talk without end: on the disk as it comes, never more than twice a size."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class Log:
    """A file of at most `max_bytes`, and the one before it. When it cannot be written to any more, `failure` says why, and it is silent.

    Raises OSError when it cannot be opened.
    """

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        self.path = path
        self.failure: OSError | None = None
        self._max_bytes = max_bytes
        is_torn = _is_torn(path)
        self._file = path.open("ab")
        if is_torn:  # what a killed process wrote last
            self._file.write(b"\n")

    def write(self, piece: bytes) -> None:
        """Append `piece`, and put it where other processes see it."""
        if self.failure is not None:
            return
        try:
            if self._max_bytes is not None and self._file.tell() + len(piece) > self._max_bytes and self._file.tell():
                self._file.close()
                os.replace(self.path, self.path.with_name(self.path.name + ".1"))
                self._file = self.path.open("ab")
            self._file.write(piece)
            self._file.flush()
        except (OSError, ValueError) as error:
            self.failure = error if isinstance(error, OSError) else OSError(str(error))

    def close(self) -> None:
        """No more comes."""
        with contextlib.suppress(OSError):
            self._file.close()


def _is_torn(path: Path) -> bool:
    """Whether a file of lines ends within one."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
