"""What happens to a sample that is longer than a row may be: cut into windows, shortened where others speak, or refused.

`elide` cuts the middle out of long tool outputs, the longest first, down to one common length, no further than it takes; the agent's
own words, the system turns and the task stay whole. In a conversation without tool results the user turns behind the task are the
environment's answers, and are cut instead. What was cut is said in its place, with the number of characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from loraloop.episode import Message

LongPolicy = Literal["window", "elide", "refuse"]
"""window: several rows, each agent turn trained in one of them. elide: long tool outputs cut in the middle until the sample fits, else
windows. refuse: left out, counted as `too_long`."""
LONG_POLICIES: tuple[LongPolicy, ...] = get_args(LongPolicy)
MIN_KEPT = 200
"""Characters of a tool output that are kept at least."""


def cuttable_role(messages: Sequence[Message]) -> Literal["tool", "user"]:
    """Whose turns, of those behind the head, may be cut."""
    return "tool" if any(message.role == "tool" for message in messages) else "user"


def elide(messages: Sequence[Message], indices: Sequence[int], n_kept: int) -> tuple[tuple[Message, ...], int]:
    """(messages, characters left out): those of `indices` that are longer than `n_kept` characters keep so many, half at each end."""
    made = list(messages)
    left_out = 0
    for index in indices:
        words = made[index].content or ""
        n_cut = len(words) - n_kept
        note = f"\n[… {n_cut:,} characters left out …]\n"
        if n_cut <= len(note):  # else it would become no shorter
            continue
        head = (n_kept + 1) // 2
        made[index] = made[index].model_copy(update={"content": words[:head] + note + words[len(words) - (n_kept - head) :]})
        left_out += n_cut
    return tuple(made), left_out


def most_kept(lengths: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest number of characters to keep of each text with which the sample fits; None when even MIN_KEPT are too many."""
    low, high = MIN_KEPT, max(lengths, default=0)
    if high <= low or not fits(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
