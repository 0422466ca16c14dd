"""Sortable unique ids: `<prefix>-<unix ms, 13 digits>-<8 hex digits>`.

Two ids made on one machine never coincide, over threads and processes, and ids of one process sort by the order they were made.
Their text is safe as a file name.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import zlib
from typing import ClassVar, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

_COUNTER_BITS = 10
_PID_BITS = 22
_lock = threading.Lock()
_last = [0, 0]  # the newest millisecond given out, and how many ids it has


class SortableId(str):
    """A text id with a prefix of its kind; subclasses set `prefix`. Equal and ordered as text, so by time."""

    __slots__ = ()
    prefix: ClassVar[str] = "id"

    @classmethod
    def new(cls) -> Self:
        """An id that nothing else on this machine has or will have."""
        ms, token = _next_token()
        return cls(f"{cls.prefix}-{ms:013d}-{token:08x}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """`text` as an id; raises ValueError when it has another form."""
        if not re.fullmatch(rf"{cls.prefix}-[0-9]{{13}}-[0-9a-f]{{8,32}}", text):
            raise ValueError(f"{text!r} is not a {cls.__name__}; expected {cls.prefix}-<unix ms>-<hex digits>")
        return cls(text)

    @property
    def timestamp_ms(self) -> int:
        """When it was made, in Unix milliseconds; 0 for ids made from content."""
        return int(self.split("-")[1])

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(cls.parse, core_schema.str_schema())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    __str__ = str.__str__


def _next_token() -> tuple[int, int]:
    """(ms, 32 bits): pid, mixed with the machine's name, above a counter within the millisecond, so that text order is order of making."""
    with _lock:
        ms = max(time.time_ns() // 1_000_000, _last[0])
        if ms > _last[0]:
            _last[:] = [ms, 0]
        elif _last[1] == 1 << _COUNTER_BITS:  # this millisecond is full: the next one is ours
            _last[:] = [ms + 1, 0]
        ms, counter = _last
        _last[1] += 1
    process = (os.getpid() ^ zlib.crc32(socket.gethostname().encode())) & ((1 << _PID_BITS) - 1)
    return ms, (process << _COUNTER_BITS) | counter
