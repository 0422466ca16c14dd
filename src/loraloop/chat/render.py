"""Messages to token ids and loss weights: only the agent's own tokens carry loss, and the stop token that ends its turn does.

`render` gives the rows that a sample becomes for one chat template. Usually that is one row, the template's own rendering of the
whole conversation up to the last turn to learn. It is several when the conversation is longer than `max_length`, or when the
template changes earlier turns once later ones are there. Each is then a window: a head (the system turns, the tools, and the task,
which is what the first user turn says), and behind it turns in a row, cut at turn boundaries, never beginning with a tool result.
Every agent turn is trained once, in the first window that holds it; later windows begin later and would show it less.

A turn is trained behind the very prompt that the template would give the model there; what cannot be rendered so is refused with a
reason. `check_row` proves each row: no token of another author has weight, every trained turn ends in a trained special token,
every recorded tool call of a trained turn stands in its text.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import groupby, islice

from loraloop.chat.template import ChatTemplate, Turn
from loraloop.episode import Message
from loraloop.errors import RenderError
from loraloop.training_data import Refusal, TrainingData

ROLES = ("system", "user", "assistant", "tool")
N_TELLING = 24
"""Characters at the beginning or end of a turn by which its words are known again."""


@dataclass(frozen=True)
class Row:
    """One sequence to train on, with what a report needs to know about it."""

    ids: list[int]  # (tokens,)
    weights: list[float]  # (tokens,) loss weight of each token as a target
    text: str
    episode_id: str | None = None
    sample_number: int = 0
    """Of the sample in its training file, from 1; 0 when it is in none."""
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

    @property
    def origin(self) -> str:
        """Where it came from, for messages: the episode, else the number of the sample."""
        return self.episode_id or f"sample {self.sample_number}"


def render(template: ChatTemplate, sample: TrainingData, max_length: int) -> tuple[list[Row], list[Refusal]]:
    """The rows of an sft sample, each of at most `max_length` tokens, and what had to be left out of it.

    A whole sample is refused as `no_agent_turn` or `template_error` (the template's own complaint is the detail), a single turn as
    `turn_too_long` (it does not fit even right behind the head), `prompt_differs` (the template renders what precedes the
    turn otherwise once it is there) or `special_token_text` (the agent wrote the text of a special token, which would be read as
    the token itself; as context such text stays, as it does when the model is served).
    """
    if not any(message.is_agent and message.weight > 0 for message in sample.messages):
        return [], [_refuse(sample, "no_agent_turn", "no turn of the agent's own has a weight above 0")]
    try:
        return _windows(_Source(template, sample), max_length)
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


# --- windows ----------------------------------------------------------------------------------------------------------------


def _windows(source: _Source, max_length: int) -> tuple[list[Row], list[Refusal]]:
    """Rows that train each agent turn once: as many turns in a row as fit and as the template allows."""
    refusals = [source.refuse(index, "special_token_text", f"it holds {text}") for index, text in source.special.items()]
    uncut = _uncut(source, max_length)
    rows = [uncut] if uncut else []
    waiting = [] if uncut else source.trained
    while waiting:
        window = _best_window(source, waiting, max_length)
        row = _row(source, *window, max_length) if window else None
        if row:
            rows.append(row)
        elif window and not window[1]:
            detail = "once it is there, the template renders what precedes it otherwise than in the model's prompt"
            refusals.append(source.refuse(waiting[0], "prompt_differs", detail))
        else:
            detail = (
                f"right behind the system turn, tools and task it needs {source.least_tokens(waiting[0])} tokens, allowed are {max_length}"
            )
            refusals.append(source.refuse(waiting[0], "turn_too_long", detail))
        waiting = waiting[row.n_turns if row else 1 :]
    return rows, refusals


def _uncut(source: _Source, max_length: int) -> Row | None:
    """The whole conversation as one row, if it fits and every turn stays unchanged in it."""
    if not source.trained:
        return None
    encoded = source.encode(0, source.trained[-1])
    if len(encoded.ids) > max_length:
        return None
    spans = list(source.iter_spans(0, source.trained))
    return source.row(0, spans, encoded) if len(spans) == len(source.trained) else None


def _row(source: _Source, start: int, spans: Sequence[_Span], max_length: int) -> Row | None:
    """The window as a row, with fewer turns where it was counted too short; None when nothing fits."""
    for count in range(len(spans), 0, -1):
        encoded = source.encode(start, spans[count - 1].turn)
        if len(encoded.ids) <= max_length:
            return source.row(start, spans[:count], encoded)
    return None


def _best_window(source: _Source, waiting: Sequence[int], max_length: int) -> tuple[int, list[_Span]] | None:
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


def _earliest_start(source: _Source, index: int, room: int) -> int | None:
    """The earliest turn from which the window through turn `index` has at most `room` tokens."""
    starts = source.starts(index)
    count = _largest(lambda number: source.n_tokens(starts[-number], index) <= room, len(starts))
    return starts[-count] if count else None


def _fill(source: _Source, start: int, waiting: Sequence[int], max_length: int) -> list[_Span]:
    """Where the agent's words stand in a window from `start` that trains as many of `waiting` as fit and stay unchanged."""
    spans: list[_Span] = []
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


# --- one sample in one template ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Span:
    """The characters that the agent wrote in one turn of a window, up to and with its stop token."""

    turn: int
    start: int
    end: int


@dataclass(frozen=True)
class _Encoded:
    text: str
    ids: list[int]  # (tokens,)
    offsets: list[tuple[int, int]]  # (tokens,) each token's (start, end) in characters, in order

    def text_of(self, token: int) -> str:
        """The characters of one token."""
        return self.text[slice(*self.offsets[token])]

    def tokens_within(self, span: _Span) -> list[int]:
        """Tokens that lie wholly in `span`; one that straddles its border belongs to what came before."""
        first, end = bisect_left(self.offsets, (span.start,)), bisect_left(self.offsets, (span.end,))
        return [token for token in range(first, end) if self.offsets[token][0] < self.offsets[token][1] <= span.end]


class _Source:
    """A sample prepared for a template: its turns, and any window of it rendered on demand."""

    def __init__(self, template: ChatTemplate, sample: TrainingData) -> None:
        self.template = template
        self.sample = sample
        self.turns, self.tools = template.prepare(sample.messages, sample.tools)
        self.n_added = len(self.turns) - len(sample.messages)
        self.messages: list[Message | None] = [None] * self.n_added + list(sample.messages)
        self.n_head = self.n_added + _count_head(sample.messages)
        own = [index for index, message in enumerate(self.messages) if message and message.is_agent and message.weight > 0]
        found = ((index, template.special_text_in(self.turns[index])) for index in own)
        self.special = {index: text for index, text in found if text is not None}
        self.trained = [index for index in own if index not in self.special]
        first = next(turn["role"] for turn in self.turns if turn["role"] != "system")
        if first == "assistant" and not template.abilities.agent_opens(with_tools=bool(self.tools)):
            raise RenderError("the chat template cannot begin a conversation with an agent turn")
        self._piece_length = cache(lambda piece: len(template.encode(piece)[0]))
        self.n_tokens = cache(self._count_tokens)

    def starts(self, index: int) -> list[int]:
        """The turns at which a window through turn `index` may begin: never a tool result, whose call would be missing."""
        roles = {"system", "user", "assistant"} if self.template.abilities.users_in_a_row else {"assistant"}
        behind = ((start, self.messages[start]) for start in range(self.n_head + 1, index + 1))
        return [self.n_head, *(start for start, message in behind if message and message.role in roles)]

    def least_tokens(self, index: int) -> int:
        """The length of the shortest window through turn `index`."""
        return self.n_tokens(self.starts(index)[-1], index)

    def iter_spans(self, start: int, turns: Sequence[int]) -> Iterator[_Span]:
        """Where the agent's words of `turns` stand in a window from `start`, up to one behind which those before would change."""
        before = ""
        for index in turns:
            words = self.template.find_words(self._cut(self.turns, start, index + 1), self.tools)
            if words is None or not words.text.startswith(before) or words.start < len(before):
                return
            yield _Span(index, words.start, words.end)
            before = words.text[: words.end]  # each is a prefix of the next, and so all are of the last

    def encode(self, start: int, last: int) -> _Encoded:
        """The window from `start` through turn `last` as tokens."""
        text = self.template.text(self._cut(self.turns, start, last + 1), self.tools)
        return _Encoded(text, *self.template.encode(text))

    def row(self, start: int, spans: Sequence[_Span], encoded: _Encoded) -> Row:
        """The window from `start` through the last of `spans`, of which `spans` carry loss."""
        weights = [0.0] * len(encoded.ids)
        n_stops = 0
        for span in spans:
            message = self.messages[span.turn]
            tokens = encoded.tokens_within(span)
            for token in tokens:
                weights[token] = (message.weight if message else 0.0) * self.sample.weight
            n_stops += any(weights[token] > 0 for token in tokens[-1:] if encoded.text_of(token) in self.template.stop_texts)
        recorded, rendered = self._count_calls(encoded.text, spans)
        return Row(
            ids=encoded.ids,
            weights=weights,
            text=encoded.text,
            episode_id=str(self.sample.episode_id) if self.sample.episode_id else None,
            trained_by_role=self._trained_by_role(start, spans[-1].turn, encoded, weights),
            n_turns=len(spans),
            n_stops=n_stops,
            n_calls_recorded=recorded,
            n_calls_rendered=rendered,
        )

    def refuse(self, index: int, reason: str, detail: str) -> Refusal:
        """The refusal of one turn."""
        return _refuse(self.sample, reason, f"turn {index - self.n_added}: {detail}")

    def _count_tokens(self, start: int, last: int) -> int:
        """How many tokens `encode` would give, from those of the pieces that windows have in common."""
        text = self.template.text(self._cut(self.turns, start, last + 1), self.tools)
        return sum(map(self._piece_length, self.template.pieces(text)))

    def _cut(self, turns: Sequence[Turn], start: int, stop: int) -> list[Turn]:
        """The head and the turns from `start` up to, not with, `stop`."""
        return [*turns[: min(self.n_head, stop)], *turns[max(start, self.n_head) : stop]]

    def _trained_by_role(self, start: int, last: int, encoded: _Encoded, weights: Sequence[float]) -> dict[str, int]:
        """Trained tokens by the role of who wrote them.

        A proof that does not lean on the spans: the window is rendered again with the words of all others replaced, and whatever
        is trained must be there still. What is not, and holds words of another, is that other's.
        """
        counts = dict.fromkeys(ROLES, 0)
        masked = self.template.text(self._cut(self._masked_turns, start, last + 1), self.tools)
        cursor = 0
        for is_trained, run in groupby(zip(encoded.offsets, weights, strict=True), key=lambda pair: pair[1] > 0):
            if not is_trained:
                continue
            tokens = [offsets for offsets, _ in run]
            piece = encoded.text[tokens[0][0] : tokens[-1][1]]
            found = masked.find(piece, cursor)
            cursor = found + len(piece) if found >= 0 else cursor
            counts["assistant" if found >= 0 else self._author(piece)] += len(tokens)
        return counts

    def _author(self, piece: str) -> str:
        """The role of another whose words `piece` holds, whole or in part; a demonstration is context, like a user turn."""
        for turn, message in zip(self.turns, self.messages, strict=True):
            words = str(turn["content"]).strip()
            if not (message and message.is_agent) and words and any(part in piece for part in (words[:N_TELLING], words[-N_TELLING:])):
                return "user" if turn["role"] == "assistant" else str(message.role if message else "system")
        return "assistant"

    @cached_property
    def _masked_turns(self) -> list[Turn]:
        """The turns with the words of everybody but the agent replaced."""
        messages = [_mask(message, f"masked words {index}") for index, message in enumerate(self.sample.messages)]
        turns, _ = self.template.prepare(messages, self.sample.tools)
        return [{**turn, "content": "masked tools"} for turn in turns[: self.n_added]] + turns[self.n_added :]

    def _count_calls(self, text: str, spans: Sequence[_Span]) -> tuple[int, int]:
        """(tool calls recorded in the trained turns, those whose name stands in their turn's trained text)."""
        recorded = rendered = 0
        for span in spans:
            message = self.messages[span.turn]
            cursor = span.start
            for call in message.tool_calls if message else ():
                recorded += 1
                found = text.find(call.function.name, cursor, span.end)
                if found >= 0:
                    rendered += 1
                    cursor = found + len(call.function.name)
        return recorded, rendered


def _count_head(messages: Sequence[Message]) -> int:
    """How many messages belong to every window: system turns, and the first user turn if at most the agent's greeting precedes it."""
    n_system = next(index for index, message in enumerate(messages) if message.role != "system")
    roles = [message.role for message in messages[n_system : n_system + 2] if not message.is_demo]
    return n_system + (1 if roles[:1] == ["user"] else 2 if roles == ["assistant", "user"] else 0)


def _mask(message: Message, words: str) -> Message:
    """Another's message with `words` for its own; the agent's as it is."""
    if message.is_agent:
        return message
    function = {"arguments": json.dumps({"masked": words})}
    calls = tuple(call.model_copy(update={"function": call.function.model_copy(update=function)}) for call in message.tool_calls)
    content = words if (message.content or "").strip() else message.content
    return message.model_copy(update={"content": content, "tool_calls": calls})


def _refuse(sample: TrainingData, reason: str, detail: str) -> Refusal:
    return Refusal(episode_id=sample.episode_id, reason=reason, detail=detail)
