"""Samples to look at: their text in parts, each with who wrote it and how much it weighs.

The text comes from recordings, and may hold anything; here it is `visible` already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from loraloop.chat.authors import author_of
from loraloop.chat.length import LongPolicy
from loraloop.chat.render import Row, render_sides
from loraloop.chat.template import ChatTemplate
from loraloop.data_report.visible import visible
from loraloop.episode import Frozen, Message
from loraloop.training_data import TrainingData


class Part(Frozen):
    """A stretch of one author and one weight."""

    author: str
    text: str
    weight: float = 0.0
    """Of each token in the loss; 0 is context."""
    is_shared: bool = False
    """Of a pair: both sides begin so."""


class ShownRow(Frozen):
    """One row, or one conversation where there is no base model."""

    side: str = ""
    """For dpo `better` and `worse`, for kto `desirable` and `undesirable`."""
    n_tokens: int | None = None
    n_trained: int | None = None
    note: str = ""
    """What was done to it: a window, cut outputs, one of several because of the template."""
    parts: tuple[Part, ...]


class ShownSample(Frozen):
    """One sample."""

    number: int
    """In the training file, from 1."""
    kind: str
    weight: float
    episodes: tuple[str, ...]
    rows: tuple[ShownRow, ...]


def shorten(text: str, n_characters: int) -> str:
    """`text`, or its beginning and end with the number of characters between them."""
    if len(text) <= n_characters:
        return text
    half = n_characters // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters more …\n{text[-half:]}"


def show_sample(number: int, sample: TrainingData) -> ShownSample:
    """A sample as it was recorded."""
    n_prompt = (sample.n_prompt or len(sample.messages) - 1) if sample.kind == "dpo" else 0
    sides = _sides(sample)
    rows = tuple(ShownRow(side=name, parts=tuple(_message_parts(side, sample.weight, n_prompt))) for name, side in sides)
    return _shown(number, sample, rows)


def show_rendered(template: ChatTemplate, number: int, sample: TrainingData, max_length: int, long: LongPolicy) -> ShownSample | None:
    """A sample as the base model is shown it, row by row; None when it gives no row."""
    rendered = [rows for rows, _ in render_sides(template, sample, max_length, long)]
    if not any(rendered):
        return None
    shared = _n_shared([rows[0].text for rows in rendered if rows]) if len(rendered) > 1 else 0
    rows = tuple(
        ShownRow(
            side=name,
            n_tokens=len(row.ids),
            n_trained=row.n_supervised,
            note=_note(row),
            parts=tuple(_row_parts(template, row, sample.weight, 0 if number_of_row else shared)),
        )
        for (name, _), made in zip(_sides(sample), rendered, strict=True)
        for number_of_row, row in enumerate(made)
    )
    return _shown(number, sample, rows)


def _shown(number: int, sample: TrainingData, rows: tuple[ShownRow, ...]) -> ShownSample:
    episodes = tuple(visible(str(episode_id)) for episode_id in sample.episode_ids)
    return ShownSample(number=number, kind=sample.kind, weight=sample.weight, episodes=episodes, rows=rows)


def _sides(sample: TrainingData) -> list[tuple[str, TrainingData]]:
    names = ("better", "worse") if sample.kind == "dpo" else (_kto_side(sample),)
    return list(zip(names, sample.sides, strict=True))


def _kto_side(sample: TrainingData) -> str:
    return "" if sample.desirable is None else "desirable" if sample.desirable else "undesirable"


def _message_parts(side: TrainingData, weight: float, n_prompt: int) -> Iterator[Part]:
    for index, message in enumerate(side.messages):
        own = message.weight * weight if message.is_agent else 0.0
        yield Part(author=author_of(message), text=visible(_words(message)), weight=own, is_shared=index < n_prompt)


def _words(message: Message) -> str:
    calls = (f"{call.function.name}({call.function.arguments})" for call in message.tool_calls)
    return "\n".join(part for part in (message.content or "", *calls) if part)


def _row_parts(template: ChatTemplate, row: Row, weight: float, n_shared: int) -> Iterator[Part]:
    """The row's text cut where the author or the weight changes, and where what a pair shares ends."""
    starts = [(start, token_weight) for (start, _), token_weight in zip(template.encode(row.text)[1], row.weights, strict=True)]
    changes = [starts[0], *(later for earlier, later in pairwise(starts) if later[1] != earlier[1])]
    cuts = sorted({0, n_shared, len(row.text), *(start for start, _ in changes), *(stretch.start for stretch in row.stretches)})
    weight_now = author_now = 0
    for start, end in pairwise(cuts):
        while weight_now + 1 < len(changes) and changes[weight_now + 1][0] <= start:
            weight_now += 1
        while author_now + 1 < len(row.stretches) and row.stretches[author_now + 1].start <= start:
            author_now += 1
        yield Part(
            author=row.stretches[author_now].author,
            text=visible(row.text[start:end]),
            weight=changes[weight_now][1] * weight,
            is_shared=end <= n_shared,
        )


def _note(row: Row) -> str:
    notes = (
        "a window: it begins later than its conversation" if row.is_window else "",
        f"{row.n_elided:,} characters of others' outputs left out" if row.n_elided else "",
        "a row of its own because the template renders earlier turns otherwise later" if row.prefix_broken else "",
    )
    return "; ".join(note for note in notes if note)


def _n_shared(texts: Sequence[str]) -> int:
    first, last = min(texts), max(texts)
    return next((number for number, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
