"""Who wrote each stretch of a rendered conversation: for reports, never for the mask.

The conversation is rendered a second time with a mark in place of the words of everybody but the agent. What both renderings have in
common is the template's or the agent's; what stands where a mark stands is the words of that turn. So a turn that quotes another, or
that spells the template's own markers, is still taken for what it is. Where a template treats the mark otherwise than the words, what
follows is put down to the template: a report may show too little of a role there, never another's words as the agent's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import product

from loraloop.chat.row import Author, Stretch
from loraloop.episode import Message

_MARK = re.compile("⁅masked words ([0-9]+)⁆")


def mark(index: int) -> str:
    """The words that stand for those of turn `index`."""
    return f"⁅masked words {index}⁆"


def author_of(message: Message) -> Author:
    """Who wrote a message."""
    if message.role != "assistant" or message.is_agent:
        return message.role
    return "demonstration" if message.is_demo else "other"


def find_stretches(
    text: str, masked: str, messages: Sequence[Message | None], own: Sequence[tuple[int, int]], context: Sequence[int]
) -> tuple[Stretch, ...]:
    """All of `text` in order, by author.

    `masked` is the rendering with marks, `messages` are the turns that marks number (None for one that we added), `own` the
    characters that the agent wrote and that carry loss, `context` the turns in the text that carry none.
    """
    found: list[Stretch] = [Stretch(start, end, "assistant") for start, end in own]
    for start, end, index in align(text, masked, messages):
        message = messages[index]
        found.append(Stretch(start, end, author_of(message) if message else "template"))
    return tuple(_fill(_with_own_context(text, sorted(found), [messages[index] for index in context]), len(text)))


def align(text: str, masked: str, messages: Sequence[Message | None]) -> Iterator[tuple[int, int, int]]:
    """(start, end, turn) of the words behind each mark, in order; ends early where the renderings cannot be matched."""
    parts = _MARK.split(masked)  # literal, number, literal, number, …, literal
    if not text.startswith(parts[0]):
        return
    cursor = len(parts[0])
    for number, literal in zip(parts[1::2], parts[2::2], strict=True):
        message = messages[int(number)] if int(number) < len(messages) else None
        end = next((cursor + len(form) for form in _forms(message) if text.startswith(form + literal, cursor)), None)
        if end is None:  # of a form that we do not know: up to where the literal is found again
            end = text.find(literal, cursor) if literal else -1
        if end < 0:
            return
        if end > cursor:
            yield cursor, end, int(number)
        cursor = end + len(literal)


def _forms(message: Message | None) -> list[str]:
    """How a template may show a message's words."""
    words = (message.content or "") if message else ""
    quoted = (json.dumps(form, ensure_ascii=ascii_only) for form in (words, words.strip()) for ascii_only in (False, True))
    return [words, words.strip(), *(form[1:-1] for form in quoted)]


def _with_own_context(text: str, found: list[Stretch], messages: Sequence[Message | None]) -> list[Stretch]:
    """`found` and, between, what else the agent wrote: turns that are context here because another row or nobody trains them."""
    gaps = [(stretch.start, stretch.end) for stretch in _fill(found, len(text)) if stretch.author == "template"]
    words = [forms for message in messages if message and message.is_agent for forms in _own_parts(message)]
    more: list[Stretch] = []
    cursor, gap = 0, 0
    for forms in words:
        for number, form in product(range(gap, len(gaps)), forms):
            start = text.find(form, max(cursor, gaps[number][0]), gaps[number][1])
            if start >= 0:
                more.append(Stretch(start, start + len(form), "assistant"))
                cursor, gap = start + len(form), number
                break
    return sorted([*found, *more])


def _own_parts(message: Message) -> Iterator[list[str]]:
    """Texts of a turn by which it can be found, each in the forms that a template may give it: what is said, each call's name, its
    arguments.
    """
    if len((message.content or "").strip()) > 1:
        yield [(message.content or "").strip()]
    for call in message.tool_calls:
        yield [call.function.name]
        if len(call.function.arguments) > 2:
            yield [call.function.arguments, *_dumped(call.function.arguments)]


def _dumped(arguments: str) -> Iterator[str]:
    with suppress(ValueError):
        parsed = json.loads(arguments)
        for ascii_only in (False, True):
            yield json.dumps(parsed, ensure_ascii=ascii_only)


def _fill(found: Sequence[Stretch], length: int) -> Iterator[Stretch]:
    """`found` without overlaps, the gaps as the template's."""
    cursor = 0
    for start, end, author in found:
        if start < cursor:
            continue
        if start > cursor:
            yield Stretch(cursor, start, "template")
        yield Stretch(start, end, author)
        cursor = end
    if cursor < length:
        yield Stretch(cursor, length, "template")
