"""Why something from outside cannot be taken over as a conversation: what was found, what was expected, what to do."""

from __future__ import annotations

import math

from loraloop.files import canonical_json

MAX_SHOWN_CHARS = 120
"""How much of a value a message shows."""


class EntryRefused(ValueError):
    """An entry is left out for `reason`; an importer turns it into a Refusal, so it never reaches a caller of ours."""

    def __init__(self, reason: str, found: str, expected: str, do_this: str) -> None:
        self.reason = reason
        self.found = found
        self.expected = expected
        self.do_this = do_this
        super().__init__(reason, found, expected, do_this)

    def __str__(self) -> str:
        return f"found {self.found}; expected {self.expected}; do this: {self.do_this}"


def find_finite(value: object) -> float | None:
    """`value` as a float when it is a finite JSON number, else None; true and false are no numbers here."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def show(value: object) -> str:
    """`value` for a message: as JSON where it can be, cut to `MAX_SHOWN_CHARS`, safe to print on any terminal."""
    try:
        text = canonical_json(value)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return shorten(text)


def shorten(text: str) -> str:
    """`text` on one line, cut to `MAX_SHOWN_CHARS`, with everything that does not print written as an escape."""
    cut = text[:MAX_SHOWN_CHARS]
    printable = "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in cut)
    return printable + ("…" if len(text) > MAX_SHOWN_CHARS else "")
