"""How a training is told to end: SIGTERM and SIGINT, which it obeys at once, except while it writes or steps.

The first signal raises StopAsked wherever the main thread is, the gradient of a step among it, or as soon as a protected part is over;
what the step had computed is thrown away, and the state behind the last whole step is what a checkpoint keeps. Ctrl-C after that (SIGINT)
ends the process on the spot, which loses no more than kill -9 does; SIGTERM again changes nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class StopAsked(BaseException):
    """This process was told to end. Not an Exception, so that nobody's general handler swallows it."""


class Stop:
    """Whether this process was told to end, and when it may notice."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.is_told = False
        """Whether an event has told that it stops."""
        self._protected = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear SIGTERM and SIGINT during the block; only in the main thread."""
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raises StopAsked when it was told to end."""
        if self.signal is not None and not self._protected:
            raise StopAsked

    def ask(self) -> None:
        """Tell it from another thread, as SIGTERM would."""
        os.kill(os.getpid(), signal.SIGTERM)

    @contextmanager
    def protected(self, *, is_last: bool = False) -> Iterator[None]:
        """A part that is done whole; behind it StopAsked is raised when it was asked for meanwhile, unless nothing follows."""
        self._protected += 1
        try:
            yield
        finally:
            self._protected -= 1
        if not is_last:
            self.check()

    def _hear(self, number: int, _frame: object) -> None:
        if self.signal is not None:
            if number == signal.SIGINT:
                os._exit(128 + number)
            return
        self.signal = number
        self.check()
