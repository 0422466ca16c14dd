"""Results that are kept for objects that come again, such as the tool schemas that every line of a file has.

The very same object, not an equal one: telling that two are equal costs as much as the work that is spared. So what is given must not be
changed by anyone afterwards, as nothing is that an importer has made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")

MAX_REMEMBERED = 32


class Remembered(Generic[Given, Made]):
    """`make`, called once for each object as long as that is among the last `MAX_REMEMBERED`; what it raises is not kept.

    Nor is what `is_kept` (of what was given, what was made) says no to: what is kept stays in memory, however large.
    """

    def __init__(self, make: Callable[[Given], Made], is_kept: Callable[[Given, Made], bool]) -> None:
        self._make = make
        self._is_kept = is_kept
        self._kept: dict[int, tuple[Given, Made]] = {}  # by identity, which is nobody else's while the object is kept here

    def __call__(self, given: Given) -> Made:
        """What `make` gives for `given`."""
        kept = self._kept.get(id(given))
        if kept is not None and kept[0] is given:
            return kept[1]
        made = self._make(given)
        if not self._is_kept(given, made):
            return made
        if len(self._kept) >= MAX_REMEMBERED:
            self._kept = {}
        self._kept[id(given)] = (given, made)
        return made
