"""Messages to token ids and loss weights: only the agent's own tokens carry loss, and the stop token that ends its turn does.

`render` gives the rows that a sample becomes for one chat template. Usually that is one row, the template's own rendering of the
whole conversation up to the last turn to learn. It is several when the conversation is longer than `max_length`, or when the
template changes earlier turns once later ones are there. Each is then a window: a head (the system turns, the tools, and the task,
which is what the first user turn says), and behind it turns in a row, cut at turn boundaries, never beginning with a tool result.
Every agent turn is trained once, in the first window that holds it; later windows begin later and would show it less.

A turn is trained behind the very prompt that the template would give the model there; what cannot be rendered so is refused with a
reason. `check_row` proves each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

from loraloop.chat.faults import find_fault
from loraloop.chat.length import MIN_KEPT, LongPolicy, cuttable_role, elide, most_kept
from loraloop.chat.row import Row, check_row
from loraloop.chat.source import Source, Span, count_head, refuse
from loraloop.chat.template import ChatTemplate
from loraloop.errors import RenderError
from loraloop.training_data import Refusal, TrainingData

__all__ = ["Rendered", "Row", "check_row", "render", "render_sides"]

Rendered = tuple[list[Row], list[Refusal]]
"""The rows of one conversation, and what had to be left out of it."""


def render(template: ChatTemplate, sample: TrainingData, max_length: int, long: LongPolicy = "window") -> Rendered:
    """The rows of an sft sample, each of at most `max_length` tokens, and what had to be left out of it.

    A whole sample is refused as `no_agent_turn`, `null_in_tools`, `double_encoded_arguments`, `template_error` (the template's own
    complaint is the detail) or, where `long` says so, `too_long`. A single turn is refused as `turn_too_long` (it does not fit even
    right behind the head), `prompt_differs` (the template renders what precedes the turn otherwise once it is there),
    `observation_in_turn` or `special_token_text` (the agent wrote the text of a special token, which would be read as the token
    itself; as context such text stays, as it does when the model is served).
    """
    (rendered,) = _render_alike(template, (sample,), max_length, long)
    return rendered


def render_sides(template: ChatTemplate, sample: TrainingData, max_length: int, long: LongPolicy = "window") -> list[Rendered]:
    """`render` for each of the sample's sides. What the sides of a pair share is shortened alike, or both are refused."""
    return _render_alike(template, sample.sides, max_length, long)


# --- what is too long -------------------------------------------------------------------------------------------------------


def _render_alike(template: ChatTemplate, sides: Sequence[TrainingData], max_length: int, long: LongPolicy) -> list[Rendered]:
    """Each side's rows, by the policy for what is too long; one side that is makes all of them so."""
    rendered = [_render_whole(template, side, max_length) for side in sides]
    if long == "window" or not any(map(_is_too_long, rendered)):
        return rendered
    if long == "refuse":
        detail = f"a row may have {max_length} tokens, and the policy for what is longer is to refuse it"
        return [([], [refuse(side, "too_long", detail)]) for side in sides]
    return _render_elided(template, sides, max_length) or rendered


def _render_whole(template: ChatTemplate, sample: TrainingData, max_length: int) -> Rendered:
    if not any(message.is_agent and message.weight > 0 for message in sample.messages):
        return [], [refuse(sample, "no_agent_turn", "no turn of the agent's own has a weight above 0")]
    if fault := find_fault(sample):
        return [], [refuse(sample, fault.reason, fault.detail)]
    try:
        return _windows(Source(template, sample), max_length)
    except RenderError as error:
        return [], [refuse(sample, "template_error", str(error))]


def _is_too_long(rendered: Rendered) -> bool:
    rows, refusals = rendered
    return any(row.is_window for row in rows) or any(refusal.reason == "turn_too_long" for refusal in refusals)


def _render_elided(template: ChatTemplate, sides: Sequence[TrainingData], max_length: int) -> list[Rendered] | None:
    """The sides with their long tool outputs cut no further than it takes; None when even that does not make them fit."""
    role = cuttable_role([message for side in sides for message in side.messages[count_head(side.messages) :]])
    indices = [
        [index for index in range(count_head(side.messages), len(side.messages)) if side.messages[index].role == role] for side in sides
    ]

    def shorten(n_kept: int) -> tuple[list[TrainingData], list[int]]:
        made = [elide(side.messages, some, n_kept) for side, some in zip(sides, indices, strict=True)]
        shorter = [side.model_copy(update={"messages": messages}) for side, (messages, _) in zip(sides, made, strict=True)]
        return shorter, [n_elided for _, n_elided in made]

    def fits(n_kept: int) -> bool:
        sources = [Source(template, side) for side in shorten(n_kept)[0]]
        return all(source.n_tokens(source.n_head, source.trained[-1]) <= max_length for source in sources if source.trained)

    lengths = [len(side.messages[index].content or "") for side, some in zip(sides, indices, strict=True) for index in some]
    n_kept = most_kept(lengths, fits) or 0
    while n_kept >= MIN_KEPT:
        shorter, n_elided = shorten(n_kept)
        rendered = [_render_whole(template, side, max_length) for side in shorter]
        if not any(map(_is_too_long, rendered)):
            return [(_tell_elided(rows, count), refusals) for (rows, refusals), count in zip(rendered, n_elided, strict=True)]
        n_kept = n_kept * 9 // 10  # where an earlier turn's prompt is longer than the last one's, or tokens were counted short
    return None


def _tell_elided(rows: list[Row], n_elided: int) -> list[Row]:
    return [replace(rows[0], n_elided=n_elided), *rows[1:]] if rows else rows


# --- windows ----------------------------------------------------------------------------------------------------------------


def _windows(source: Source, max_length: int) -> tuple[list[Row], list[Refusal]]:
    """Rows that train each agent turn once: as many turns in a row as fit and as the template allows."""
    refusals = [source.refuse(index, fault.reason, fault.detail) for index, fault in source.unfit.items()]
    uncut = _uncut(source, max_length)
    rows = [uncut] if uncut else []
    waiting = [] if uncut else source.trained
    while waiting:
        row, is_foreign = _next_row(source, waiting, max_length)
        if row:
            rows.append(row)
        elif is_foreign:
            detail = "once it is there, the template renders what precedes it otherwise than in the model's prompt"
            refusals.append(source.refuse(waiting[0], "prompt_differs", detail))
        else:
            detail = (
                f"right behind the system turn, tools and task it needs {source.least_tokens(waiting[0])} tokens, allowed are {max_length}"
            )
            refusals.append(source.refuse(waiting[0], "turn_too_long", detail))
        waiting = waiting[row.n_turns if row else 1 :]
    if source.prefix_broken:
        rows = [replace(row, prefix_broken=True) for row in rows]
    return rows, refusals


def _next_row(source: Source, waiting: Sequence[int], max_length: int) -> tuple[Row | None, bool]:
    """(the row that trains the first of `waiting` and those behind it, whether there is none because its prompt differs)."""
    room = max_length
    while window := _best_window(source, waiting, room):
        if not window[1]:
            return None, True
        if row := _row(source, *window, max_length):
            return row, False
        room -= max(1, room // 16)  # counted too short: a prompt may show what the rendering by which it was counted does not
    return None, False


def _uncut(source: Source, max_length: int) -> Row | None:
    """The whole conversation as one row, if it fits and every turn stays unchanged in it."""
    if not source.trained:
        return None
    encoded = source.encode(0, source.trained[-1])
    if len(encoded.ids) > max_length:
        return None
    spans = list(source.iter_spans(0, source.trained))
    return _row(source, 0, spans, max_length) if len(spans) == len(source.trained) else None


def _row(source: Source, start: int, spans: Sequence[Span], max_length: int) -> Row | None:
    """The window as a row, with fewer turns where it was counted too short; None when nothing fits."""
    for count in range(len(spans), 0, -1):
        encoded = source.encode(start, spans[count - 1].turn, spans[count - 1].spliced)
        if len(encoded.ids) <= max_length:
            return source.row(start, spans[:count], encoded)
    return None


def _best_window(source: Source, waiting: Sequence[int], max_length: int) -> tuple[int, list[Span]] | None:
    """(start, what is trained) of a window for the first of `waiting` and those behind it; None when that turn fits nowhere.

    It trains as many turns as fit when half of the free room goes to what precedes them, and begins as early as these allow.
    """
    least = source.least_tokens(waiting[0])
    half = _earliest_start(source, waiting[0], (least + max_length) // 2)
    if least > max_length or half is None:
        return None
    spans = _fill(source, half, waiting, max_length)
    earliest = _earliest_start(source, spans[-1].turn, max_length) if spans else half
    if earliest is None or earliest == half:
        return half, spans
    return earliest, _fill(source, earliest, waiting[: len(spans)], max_length)


def _earliest_start(source: Source, index: int, room: int) -> int | None:
    """The earliest turn from which the window through turn `index` has at most `room` tokens."""
    starts = source.starts(index)
    count = _largest(lambda number: source.n_tokens(starts[-number], index) <= room, len(starts))
    return starts[-count] if count else None


def _fill(source: Source, start: int, waiting: Sequence[int], max_length: int) -> list[Span]:
    """Where the agent's words stand in a window from `start` that trains as many of `waiting` as fit and stay unchanged."""
    spans: list[Span] = []
    unchanged = source.iter_spans(start, waiting)

    def holds(count: int) -> bool:
        if source.n_tokens(start, waiting[count - 1]) > max_length:
            return False
        spans.extend(islice(unchanged, max(count - len(spans), 0)))
        return len(spans) >= count

    return spans[: _largest(holds, len(waiting))]


def _largest(holds: Callable[[int], bool], n: int) -> int:
    """The largest number up to `n` that holds, where every smaller one does too; 0 when none does. Doubles, then halves."""
    low, high = 0, min(1, n)
    while low < high and holds(high):
        low, high = high, min(2 * high, n)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
