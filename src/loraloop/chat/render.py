"""Messages to token ids and loss weights: only the agent's own tokens carry loss, and the stop token that ends its turn does.

`render` gives the rows that a sample becomes for one chat template. Usually that is one row, the template's own rendering of the
whole conversation. It is several when the conversation is longer than `max_length` (windows, cut at turn boundaries, the system
turn and tools kept; every agent turn is trained once, in the window that gives it most context), or when the template changes
earlier turns once later ones are there (one row an agent turn). What cannot be rendered exactly is refused with a reason.

Guarantees, checked on every row by `check_row`: no token of another author has weight; every trained turn ends in a trained special
token; every recorded tool call of a trained turn stands in its text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from loraloop.chat.template import ChatTemplate, Turn
from loraloop.episode import Message
from loraloop.errors import RenderError
from loraloop.training_data import Refusal, TrainingData

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One sequence to train on, with what a report needs to know about it."""

    ids: list[int]  # (tokens,)
    weights: list[float]  # (tokens,) loss weight of each token as a target
    text: str
    episode_id: str | None = None
    trained_by_role: dict[str, int] = field(default_factory=dict)
    """How many trained tokens lie in the text of a turn of each role; all must be the assistant's."""
    n_turns: int = 0
    """Agent turns trained in this row."""
    n_stops: int = 0
    """How many of them end in a trained special token."""
    n_calls_recorded: int = 0
    n_calls_rendered: int = 0

    @property
    def n_supervised(self) -> int:
        """Tokens that carry loss."""
        return sum(weight > 0 for weight in self.weights)


def render(template: ChatTemplate, sample: TrainingData, max_length: int) -> tuple[list[Row], list[Refusal]]:
    """The rows of an sft sample, and what had to be left out of it.

    A refusal is for a whole sample (`template_error`, `no_agent_turn`) or for one agent turn that does not fit even alone with the
    system turn (`turn_too_long`).
    """
    if not any(message.is_agent and message.weight > 0 for message in sample.messages):
        return [], [_refuse(sample, "no_agent_turn", "no turn of the agent's own has a weight above 0")]
    try:
        source = _Source(template, sample)
        return _windows(source, max_length)
    except RenderError as error:
        return [], [_refuse(sample, "template_error", str(error))]


def check_row(row: Row) -> list[str]:
    """What is wrong with a row; empty when nothing is. Reason codes: see the module's guarantees."""
    findings = []
    if row.n_supervised == 0:
        findings.append("no_agent_tokens")
    findings += [f"trained_{role}_token" for role in ROLES if role != "assistant" and row.trained_by_role.get(role, 0)]
    if row.n_stops < row.n_turns:
        findings.append("stop_token_untrained")
    if row.n_calls_rendered < row.n_calls_recorded:
        findings.append("tool_calls_lost")
    return findings


@dataclass(frozen=True)
class _Span:
    """The characters that the agent wrote in one turn, up to and with its stop token."""

    turn: int
    start: int
    end: int


class _Source:
    """A sample prepared for a template: its turns, and any piece of it rendered on demand."""

    def __init__(self, template: ChatTemplate, sample: TrainingData) -> None:
        self.template = template
        self.sample = sample
        self.turns, self.tools = template.prepare(sample.messages, sample.tools)
        added = len(self.turns) - len(sample.messages)
        self.messages: list[Message | None] = [None] * added + list(sample.messages)
        self.n_head = added + (1 if sample.messages[0].role == "system" else 0)
        """How many turns at the front belong to every window."""
        self.trained = [
            index for index, message in enumerate(self.messages) if message is not None and message.is_agent and message.weight > 0
        ]

    def row(self, first: int, trained: Sequence[int]) -> Row:
        """The head, then the turns from `first` to the last of `trained`, of which `trained` carry loss."""
        keep = [*range(self.n_head), *range(max(first, self.n_head), trained[-1] + 1)]
        turns = [self.turns[index] for index in keep]
        text = self.template.text(turns, self.tools)
        spans = [_find_span(self.template, turns, self.tools, text, keep.index(index)) for index in trained]
        ids, offsets = self.template.encode(text)
        weights = [0.0] * len(ids)
        for span in spans:
            message = self.messages[keep[span.turn]]
            weight = (message.weight if message else 0.0) * self.sample.weight
            for token in _tokens_within(offsets, span.start, span.end):
                weights[token] = weight
        stops = sum(any(weights[token] for token in _tokens_ending(offsets, span.end)) for span in spans)
        recorded, rendered = _count_calls(self, keep, text, spans)
        return Row(
            ids=ids,
            weights=weights,
            text=text,
            episode_id=str(self.sample.episode_id) if self.sample.episode_id else None,
            trained_by_role=_trained_by_role(text, turns, [self.messages[i] for i in keep], spans, offsets, weights),
            n_turns=len(spans),
            n_stops=stops,
            n_calls_recorded=recorded,
            n_calls_rendered=rendered,
        )


def _windows(source: _Source, max_length: int) -> tuple[list[Row], list[Refusal]]:
    """Rows that train each agent turn once: as many turns in a row as fit and as the template allows."""
    rows: list[Row] = []
    refusals: list[Refusal] = []
    waiting = list(source.trained)
    while waiting:
        row, taken = _next_window(source, waiting, max_length, first_window=not rows and not refusals)
        if row is not None:
            rows.append(row)
        else:
            reason = f"turn {waiting[0] - len(source.messages) + len(source.sample.messages)} does not fit into {max_length} tokens"
            refusals.append(_refuse(source.sample, "turn_too_long", reason))
        waiting = waiting[taken:]
    return rows, refusals


def _next_window(source: _Source, waiting: list[int], max_length: int, *, first_window: bool) -> tuple[Row | None, int]:
    """(row, how many of `waiting` it trains); (None, 1) when the first of them fits nowhere.

    The first window starts at the start. A later one leaves about half of its length to what came before its first trained turn.
    """
    starts = [start for start in range(source.n_head, waiting[0] + 1) if _may_start(source, start)]
    for start in [source.n_head] if first_window else starts:
        if first_window or _fits(source, start, waiting[:1], max_length // 2) or start == waiting[0]:
            best = _longest(source, start, waiting, max_length)
            if best is not None:
                return best
    for start in starts:  # no window leaves half its length free: take the most context that still fits
        best = _longest(source, start, waiting, max_length)
        if best is not None:
            return best
    return None, 1


def _longest(source: _Source, start: int, waiting: list[int], max_length: int) -> tuple[Row, int] | None:
    """The row from `start` with the most of `waiting` that fits and renders with its earlier turns unchanged."""
    low, high, best = 1, len(waiting), None
    while low <= high:  # length grows with the number of turns, so halve
        middle = (low + high) // 2 if best or low < high else low
        try:
            row: Row | None = source.row(start, waiting[:middle])
        except _PrefixBroken:
            row = None
        if row is not None and len(row.ids) <= max_length:
            best, low = (row, middle), middle + 1
        else:
            high = middle - 1
    return best


def _fits(source: _Source, start: int, trained: list[int], max_length: int) -> bool:
    return _longest(source, start, trained, max_length) is not None


def _may_start(source: _Source, index: int) -> bool:
    """A window never begins with a tool result, whose call would be missing."""
    message = source.messages[index]
    return message is not None and message.role != "tool"


class _PrefixBroken(RenderError):
    """The template renders an earlier turn otherwise once later ones follow."""


def _find_span(template: ChatTemplate, turns: Sequence[Turn], tools: Sequence[object], text: str, index: int) -> _Span:
    """Where the agent's words of turn `index` stand in `text`, the rendering of all `turns`."""
    through = template.text(turns[: index + 1], tools)
    same = len(os.path.commonprefix([text, through]))
    if through[same:].strip():
        raise _PrefixBroken(f"turn {index} is rendered otherwise when later turns follow")
    start = _span_start(template, turns, tools, text, index)
    written = text[start:same]
    end = max((written.rfind(stop) + len(stop) for stop in template.stop_texts if stop in written), default=0)
    if end == 0 or written[end:].strip():
        raise RenderError(f"turn {index} does not end in a special token, so the model would never learn to stop")
    return _Span(index, start, start + end)


def _span_start(template: ChatTemplate, turns: Sequence[Turn], tools: Sequence[object], text: str, index: int) -> int:
    """Behind the generation prompt; where the template shows none there, behind what precedes a marker put in its place."""
    if index > 0:
        head = template.text(turns[:index], tools, generation_prompt=True)
        if text.startswith(head):
            return len(head)
    marker = "\u2063loraloop\u2063"
    marked = template.text([*turns[:index], {"role": "assistant", "content": marker}], tools)
    head = marked.partition(marker)[0]
    if marker not in marked or not text.startswith(head):
        raise _PrefixBroken(f"what precedes turn {index} is rendered otherwise when the turn is there")
    return len(head)


def _tokens_within(offsets: Sequence[tuple[int, int]], start: int, end: int) -> Iterator[int]:
    """Tokens that lie wholly in [start, end); one that straddles the border belongs to what came before."""
    return (token for token, (left, right) in enumerate(offsets) if left >= start and right <= end and right > left)


def _tokens_ending(offsets: Sequence[tuple[int, int]], end: int) -> Iterator[int]:
    return (token for token, (left, right) in enumerate(offsets) if right == end and right > left)


def _trained_by_role(
    text: str,
    turns: Sequence[Turn],
    messages: Sequence[Message | None],
    spans: Sequence[_Span],
    offsets: Sequence[tuple[int, int]],
    weights: Sequence[float],
) -> dict[str, int]:
    """Trained tokens by the role in whose text they lie, found by looking for each turn's own words, not by the spans."""
    ends = {span.turn: span.end for span in spans}
    counts = dict.fromkeys(ROLES, 0)
    n_foreign, cursor = 0, 0
    for index, turn in enumerate(turns):
        words = str(turn["content"]).strip()
        found = text.find(words, cursor) if words else -1
        message = messages[index]
        if found >= 0 and not (message is not None and message.is_agent):
            role = message.role if message is not None else "system"
            trained = sum(
                weight > 0 and left < found + len(words) and right > found
                for (left, right), weight in zip(offsets, weights, strict=True)
            )
            counts["user" if role == "assistant" else role] += trained  # a demonstration is context, like a user turn
            n_foreign += trained
        cursor = max(cursor, ends.get(index, 0), found + len(words) if found >= 0 else 0)
    counts["assistant"] = sum(weight > 0 for weight in weights) - n_foreign
    return counts


def _count_calls(source: _Source, keep: Sequence[int], text: str, spans: Sequence[_Span]) -> tuple[int, int]:
    """(tool calls recorded in the trained turns, those whose name stands in their turn's trained text)."""
    recorded = rendered = 0
    for span in spans:
        message = source.messages[keep[span.turn]]
        cursor = span.start
        for call in message.tool_calls if message is not None else ():
            recorded += 1
            found = text.find(call.function.name, cursor, span.end)
            if found >= 0:
                rendered += 1
                cursor = found + len(call.function.name)
    return recorded, rendered


def _refuse(sample: TrainingData, reason: str, detail: str) -> Refusal:
    return Refusal(episode_id=sample.episode_id, reason=reason, detail=detail)
