"""One sample in one template: its turns, and any window of it rendered on demand, with what the agent wrote marked in it."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from typing import TypeVar

from loraloop.chat.authors import align, find_stretches, mark
from loraloop.chat.faults import Fault, find_turn_fault
from loraloop.chat.row import ROLES, Row, Stretch
from loraloop.chat.template import ChatTemplate, Turn
from loraloop.episode import Message
from loraloop.errors import RenderError
from loraloop.training_data import Refusal, TrainingData

Shown = TypeVar("Shown")

N_TELLING = 24
"""Characters at the beginning or end of a turn by which its words are known again."""


@dataclass(frozen=True)
class Span:
    """The characters that the agent wrote in one turn of a window, up to and with its stop token."""

    turn: int
    start: int
    end: int
    spliced: str | None = None
    """The text of the window, where that is the prompt with the turn's words behind it and not the template's rendering of both."""


@dataclass(frozen=True)
class Encoded:
    """A window as text and tokens."""

    text: str
    ids: list[int]  # (tokens,)
    offsets: list[tuple[int, int]]  # (tokens,) each token's (start, end) in characters, in order

    def text_of(self, token: int) -> str:
        """The characters of one token."""
        return self.text[slice(*self.offsets[token])]

    def tokens_within(self, span: Span) -> list[int]:
        """Tokens that lie wholly in `span`; one that straddles its border belongs to what came before."""
        first, end = bisect_left(self.offsets, (span.start,)), bisect_left(self.offsets, (span.end,))
        return [token for token in range(first, end) if self.offsets[token][0] < self.offsets[token][1] <= span.end]


class Source:
    """A sample prepared for a template: its turns, and any window of it rendered on demand."""

    def __init__(self, template: ChatTemplate, sample: TrainingData) -> None:
        self.template = template
        self.sample = sample
        self.turns, self.tools = template.prepare(sample.messages, sample.tools)
        self.n_added = len(self.turns) - len(sample.messages)
        self.messages: list[Message | None] = [None] * self.n_added + list(sample.messages)
        self.n_head = self.n_added + count_head(sample.messages)
        self.prefix_broken = False
        """Set when a rendering has shown that the template changes earlier turns once later ones are there."""
        own = [index for index, message in enumerate(self.messages) if message and message.is_agent and message.weight > 0]
        faults = ((index, self._find_fault(index)) for index in own)
        self.unfit = {index: fault for index, fault in faults if fault is not None}
        """Turns that the agent is not to learn, and why."""
        self.trained = [index for index in own if index not in self.unfit]
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

    def iter_spans(self, start: int, turns: Sequence[int]) -> Iterator[Span]:
        """Where the agent's words of `turns` stand in a window from `start`, up to one behind which those before would change."""
        before = ""
        for index in turns:
            turns_before = self._cut(self.turns, start, index + 1)
            words = self.template.find_words(turns_before, self.tools)
            if words is None and not before and (words := self.template.splice_words(turns_before, self.tools)):
                self.prefix_broken = True
                yield Span(index, words.start, words.end, words.text)
                return
            if words is None or not words.text.startswith(before) or words.start < len(before):
                self.prefix_broken |= bool(before)
                return
            yield Span(index, words.start, words.end)
            before = words.text[: words.end]  # each is a prefix of the next, and so all are of the last

    def encode(self, start: int, last: int, spliced: str | None = None) -> Encoded:
        """The window from `start` through turn `last` as tokens; of `spliced` where the span says so."""
        text = spliced or self.template.text(self._cut(self.turns, start, last + 1), self.tools)
        return Encoded(text, *self.template.encode(text))

    def row(self, start: int, spans: Sequence[Span], encoded: Encoded) -> Row:
        """The window from `start` through the last of `spans`, of which `spans` carry loss."""
        weights = [0.0] * len(encoded.ids)
        n_stops = n_borders = 0
        for span in spans:
            message = self.messages[span.turn]
            tokens = encoded.tokens_within(span)
            for token in tokens:
                weights[token] = (message.weight if message else 0.0) * self.sample.weight
            stop = encoded.text_of(tokens[-1]) if tokens else ""
            if stop in self.template.stop_texts:
                n_stops += weights[tokens[-1]] > 0
                n_borders += sum(encoded.text_of(token) == stop for token in tokens[:-1])
        recorded, rendered = self._count_calls(encoded.text, spans)
        masked = self._masked_text(start, spans[-1])
        carry_loss = {span.turn for span in spans}
        context = [turn for turn in self._cut(range(len(self.turns)), start, spans[-1].turn + 1) if turn not in carry_loss]
        stretches = find_stretches(encoded.text, masked, self.messages, [(span.start, span.end) for span in spans], context)
        return Row(
            ids=encoded.ids,
            weights=weights,
            text=encoded.text,
            episode_id=str(self.sample.episode_id) if self.sample.episode_id else None,
            trained_by_role=self._trained_by_role(masked, encoded, weights),
            n_turns=len(spans),
            n_stops=n_stops,
            n_borders=n_borders,
            n_calls_recorded=recorded,
            n_calls_rendered=rendered,
            n_tools_recorded=len(self._tool_names),
            n_tools_rendered=self._n_tools_rendered,
            n_reworded=sum(not self._stands(encoded.text, span) for span in spans),
            stretches=stretches,
            tokens_by_author=_count_by_author(stretches, encoded.offsets),
            is_window=start > self.n_head,
        )

    def refuse(self, index: int, reason: str, detail: str) -> Refusal:
        """The refusal of one turn."""
        return refuse(self.sample, reason, f"turn {index - self.n_added}: {detail}")

    def _find_fault(self, index: int) -> Fault | None:
        if text := self.template.special_text_in(self.turns[index]):
            return Fault("special_token_text", f"it holds {text}")
        message = self.messages[index]
        return find_turn_fault(message) if message else None

    def _count_tokens(self, start: int, last: int) -> int:
        """How many tokens `encode` would give, from those of the pieces that windows have in common."""
        text = self.template.text(self._cut(self.turns, start, last + 1), self.tools)
        return sum(map(self._piece_length, self.template.pieces(text)))

    def _cut(self, turns: Sequence[Shown], start: int, stop: int) -> list[Shown]:
        """The head and the turns from `start` up to, not with, `stop`."""
        return [*turns[: min(self.n_head, stop)], *turns[max(start, self.n_head) : stop]]

    def _trained_by_role(self, masked: str, encoded: Encoded, weights: Sequence[float]) -> dict[str, int]:
        """Trained tokens by the role of who wrote them.

        A proof that does not lean on the spans: `masked` is the window with the words of all others replaced, and whatever is
        trained must be there still. What is not, and holds words of another, is that other's.
        """
        counts = dict.fromkeys(ROLES, 0)
        others = list(align(encoded.text, masked, self.messages))
        cursor = 0
        for is_trained, run in groupby(zip(encoded.offsets, weights, strict=True), key=lambda pair: pair[1] > 0):
            if not is_trained:
                continue
            tokens = [offsets for offsets, _ in run]
            piece = encoded.text[tokens[0][0] : tokens[-1][1]]
            found = masked.find(piece, cursor)
            cursor = found + len(piece) if found >= 0 else cursor
            strangers = () if found >= 0 else [role for token in tokens for role in self._authors_of(token, others)]
            for role in strangers:
                counts[role] += 1
            rest = "assistant" if found >= 0 or strangers else self._author(piece)
            counts[rest] += len(tokens) - len(strangers)
        return counts

    def _authors_of(self, token: tuple[int, int], others: Sequence[tuple[int, int, int]]) -> list[str]:
        """The role of another in whose words the token begins, or nothing."""
        turns = [index for start, end, index in others if start <= token[0] < end]
        return ["user" if self.turns[index]["role"] == "assistant" else self._role(index) for index in turns[:1]]

    def _role(self, index: int) -> str:
        message = self.messages[index]
        return message.role if message else "system"

    def _author(self, piece: str) -> str:
        """The role of another whose words `piece` holds, whole or in part; a demonstration is context, like a user turn."""
        for turn, message in zip(self.turns, self.messages, strict=True):
            words = str(turn["content"]).strip()
            if not (message and message.is_agent) and words and any(part in piece for part in (words[:N_TELLING], words[-N_TELLING:])):
                return "user" if turn["role"] == "assistant" else str(message.role if message else "system")
        return "assistant"

    def _stands(self, text: str, span: Span) -> bool:
        """Whether what the agent said in a turn is in the window as it was recorded."""
        message = self.messages[span.turn]
        return text.find((message.content or "").rstrip() if message else "", span.start, span.end) >= 0

    def _masked_text(self, start: int, last: Span) -> str:
        """The window through `last` with the words of everybody but the agent replaced."""
        if last.spliced is None:
            return self.template.text(self._cut(self._masked_turns, start, last.turn + 1), self.tools)
        prompt = self.template.text(self._cut(self._masked_turns, start, last.turn), self.tools, generation_prompt=True)
        return prompt + last.spliced[last.start :]

    @cached_property
    def _masked_turns(self) -> list[Turn]:
        """The turns with the words of everybody but the agent replaced."""
        messages = [_mask(message, mark(index)) for index, message in enumerate(self.sample.messages, self.n_added)]
        turns, _ = self.template.prepare(messages, self.sample.tools)
        return [{**turn, "content": mark(index)} for index, turn in enumerate(turns[: self.n_added])] + turns[self.n_added :]

    @cached_property
    def _tool_names(self) -> list[str]:
        functions = (tool.get("function", tool) for tool in self.sample.tools)
        return [str(function["name"]) for function in functions if isinstance(function, dict) and function.get("name")]

    @cached_property
    def _n_tools_rendered(self) -> int:
        """How many tools have their name in the prompt of the first turn that is trained, whatever others say there."""
        if not self._tool_names:
            return 0
        before = [*self.turns[: self.n_added], *self._masked_turns[self.n_added : self.trained[0]]]
        opening: Turn = {"role": "assistant", "content": "."}
        prompt = self.template.text(before or [opening], self.tools, generation_prompt=bool(before))
        return sum(name in prompt or json.dumps(name)[1:-1] in prompt for name in self._tool_names)

    def _count_calls(self, text: str, spans: Sequence[Span]) -> tuple[int, int]:
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


def count_head(messages: Sequence[Message]) -> int:
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


def refuse(sample: TrainingData, reason: str, detail: str) -> Refusal:
    """The refusal of a sample."""
    return Refusal(episode_id=sample.episode_id, reason=reason, detail=detail)


def _count_by_author(stretches: Sequence[Stretch], offsets: Sequence[tuple[int, int]]) -> dict[str, int]:
    """How many tokens begin in a stretch of each author."""
    counts: Counter[str] = Counter()
    cursor = 0
    for start, _ in offsets:
        while cursor < len(stretches) - 1 and start >= stretches[cursor].end:
            cursor += 1
        counts[stretches[cursor].author] += 1
    return dict(counts)
