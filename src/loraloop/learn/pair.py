"""Two transcripts of one task laid side by side: what they share is the prompt, what follows is preferred and rejected."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from loraloop.episode import Message
from loraloop.learn.transcript import Transcript, carries_loss


@dataclass(frozen=True)
class Aligned:
    """A pair's turns."""

    messages: tuple[Message, ...]
    """The prompt, and the better one's turns behind it."""
    rejected_messages: tuple[Message, ...]
    """The worse one's turns behind the prompt."""
    n_prompt: int
    """How many of `messages` are the prompt."""


@dataclass(frozen=True)
class NoPair:
    """The two cannot be compared."""

    reason: str
    detail: str


def align(better: Transcript, worse: Transcript, *, one_turn: bool) -> Aligned | NoPair:
    """The two from where they part: to their ends, or with `one_turn` only the agent's turn there. Or why they are no pair.

    A prompt of no message cannot be trained, so the two must begin alike, and with the same tools. Own turns that are equal
    throughout say nothing about which is better, whatever the tools answered. Ids of calls may differ, as they are drawn anew in
    every run: the results of calls in the prompt get the ids that the prompt has.
    """
    chosen, rejected = better.to_train(is_good=True) or (), worse.to_train(is_good=False) or ()
    n_prompt = count_shared(chosen, rejected)
    hindrance = _find_hindrance(chosen, rejected, n_prompt)
    if better.tools != worse.tools:
        return NoPair("tools_differ", "the two attempts had different tools")
    if hindrance:
        return hindrance
    rest = _with_ids_of(chosen[:n_prompt], rejected[:n_prompt], rejected[n_prompt:])
    if not one_turn:
        return Aligned(chosen, rest, n_prompt)
    if not (carries_loss(chosen[n_prompt]) and carries_loss(rest[0])):
        return NoPair("no_divergence", "the two attempts part at a turn that is not the agent's to learn")
    return Aligned(chosen[: n_prompt + 1], rest[:1], n_prompt)


def _find_hindrance(chosen: tuple[Message, ...], rejected: tuple[Message, ...], n_prompt: int) -> NoPair | None:
    """What is wrong with the turns of a pair."""
    if [_wording(turn) for turn in chosen if carries_loss(turn)] == [_wording(turn) for turn in rejected if carries_loss(turn)]:
        return NoPair("pair_identical", "the agent did the same in both attempts")
    if n_prompt == 0:
        return NoPair("no_shared_prompt", "the two attempts differ from their first message on")
    if n_prompt == min(len(chosen), len(rejected)):
        return NoPair("pair_one_sided", "one attempt is the beginning of the other, so there is nothing to compare the rest with")
    return None


def count_shared(one: tuple[Message, ...], other: tuple[Message, ...]) -> int:
    """With how many messages both begin."""
    return sum(1 for _ in takewhile(lambda two: _wording(two[0]) == _wording(two[1]), zip(one, other, strict=False)))


def _wording(message: Message) -> tuple[object, ...]:
    """What is compared: neither loss weights nor the ids of calls."""
    calls = tuple((call.function.name, call.function.arguments) for call in message.tool_calls)
    return message.role, message.content, message.name, calls, message.is_demo, message.author


def _with_ids_of(prompt: tuple[Message, ...], own_prompt: tuple[Message, ...], rest: tuple[Message, ...]) -> tuple[Message, ...]:
    """`rest` with the results of calls made in the prompt named as in `prompt`: those before its first assistant turn."""
    ids = {
        theirs.id: ours.id
        for turn, own_turn in zip(prompt, own_prompt, strict=True)
        for ours, theirs in zip(turn.tool_calls, own_turn.tool_calls, strict=True)
    }
    n_results = sum(1 for _ in takewhile(lambda turn: turn.role != "assistant", rest))
    renamed = (
        turn.model_copy(update={"tool_call_id": ids[turn.tool_call_id]}) if turn.tool_call_id in ids else turn for turn in rest[:n_results]
    )
    return (*renamed, *rest[n_results:])
