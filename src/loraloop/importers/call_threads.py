"""Threads: which calls of a trace are one agent's one conversation, and what it says as a whole.

Every call repeats the history, so the last one tells it all, and an answer stands in the history of the call after it. A call goes on a
thread when its history begins with what the thread says so far, made by an agent of the same name; else when the same run of an agent
made it under the same system prompt (a retry; a history that was compacted or cut). Any other call begins a thread of its own: a
sub-agent, the second run of one, a title that another prompt asked for.

Turns of the assistant that no call of the thread answered are context: examples in the prompt, turns of earlier traces, other agents'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from loraloop.files import content_hash
from loraloop.importers.chat_dialects import SILENT, RawMessage, find_json
from loraloop.importers.model_io import ModelCall
from loraloop.importers.span_tree import Span, SpanTree

GAP = "gap"
"""The key of a message that the recorder left out of the middle of a history; a call's own answer may be known to stand there."""


@dataclass
class ThreadCall:
    """A call in its place: `words` stand for its messages, `answer` for its response, equal where the words are."""

    span: Span
    call: ModelCall
    response: RawMessage
    owner: Span | None
    words: list[str]
    answer: str

    @property
    def agent(self) -> str | None:
        """The name of the agent that made it, where it is known."""
        of_owner = self.owner.agent if self.owner else None
        return of_owner or self.span.agent or (self.owner.name if self.owner else None)


@dataclass
class Thread:
    """The calls of one conversation, in order."""

    calls: list[ThreadCall] = field(default_factory=list)

    @property
    def owner(self) -> Span | None:
        """The span of the agent that began it."""
        return self.calls[0].owner

    @property
    def longest(self) -> ThreadCall:
        """The call with the longest history; of one that was tried again, the last try."""
        return max(reversed(self.calls), key=lambda call: len(call.words))

    @property
    def is_rewritten(self) -> bool:
        """Whether no single telling holds all calls: some history or answer is not in the longest one."""
        longest = self.longest
        whole = [*longest.words, longest.answer]
        answered = {len(call.words) for call in self.calls if _same(whole[len(call.words)], call.answer)}
        begins = all(_begins(whole, call.words) for call in self.calls)
        return not begins or answered != {len(call.words) for call in self.calls}

    def telling(self) -> list[RawMessage]:
        """The longest history with its answer: turns that calls answered as they answered, other turns of the assistant at weight 0."""
        longest = self.longest
        whole = [*longest.words, longest.answer]
        own = {len(call.words): call for call in self.calls if _begins(whole, call.words) and _same(whole[len(call.words)], call.answer)}
        told = []
        for at, message in enumerate([*longest.call.messages, longest.response]):
            call = own.get(at)
            if call is not None:
                told.append({**call.response, "weight": 0} if call.call.is_copied else call.response)
            else:
                told.append({**message, "weight": 0} if message.get("role") == "assistant" else message)
        return told


def make_threads(tree: SpanTree) -> list[Thread]:
    """The threads of a trace, in the order in which they began. Raises the problem of a call that cannot be read."""
    told = [span for span in tree if span.kind == "model" and is_told(span.call)]
    _require_readable(tree, told)
    threads: list[Thread] = []
    by_prompt: dict[tuple[str | None, tuple[str, ...]], list[Thread]] = {}
    calls = [span for span in told if not _is_inside_call(tree, span)]
    for span in sorted(calls, key=lambda span: (span.start_ms or 0, span.order)):
        placed = _place(span, tree.owner(span), threads)
        alike = by_prompt.setdefault((placed.agent, _system(placed)), [])
        thread = _continued(placed, alike) or _same_place(placed, alike)
        if thread is None:
            thread = Thread()
            threads.append(thread)
            alike.append(thread)
        thread.calls.append(placed)
    return threads


def is_told(call: ModelCall | None) -> bool:
    """Whether both sides of the call were recorded, words and all."""
    if call is None or call.response is None or not (call.messages or call.is_delta):
        return False
    return not any(message.get(SILENT) for message in [*call.messages, call.response])


def wording(message: RawMessage) -> str:
    """Equal for messages that say the same: no content is empty content, arguments by what they mean, ids and thoughts do not count."""
    if message.get(GAP):
        return GAP
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    said = [(function.get("name"), find_json(function.get("arguments"))) for function in functions if isinstance(function, dict)]
    role = {"developer": "system", "function": "tool"}.get(str(message.get("role")), message.get("role"))
    try:
        return content_hash([role, message.get("content") or "", said])
    except (ValueError, RecursionError):
        return repr(message)


def _same(one: str, other: str) -> bool:
    return one == other or GAP in {one, other}


def _begins(words: Sequence[str], start: Sequence[str]) -> bool:
    return len(words) >= len(start) and all(_same(one, other) for one, other in zip(words, start, strict=False))


def _require_readable(tree: SpanTree, told: list[Span]) -> None:
    """Raise the problem of a call that cannot be read, unless a readable one lies within it."""
    around: set[str] = set()
    for span in told:
        for above in tree.line_up(span):
            if above.id in around:
                break
            around.add(above.id)
    broken = next((span.problem for span in tree if span.problem is not None and span.id not in around), None)
    if broken is not None:
        raise broken


def _place(span: Span, owner: Span | None, threads: list[Thread]) -> ThreadCall:
    """The call of `span` with its whole history: one that holds only what came since continues the latest thread of its owner."""
    call = span.call or ModelCall()
    words = [wording(message) for message in call.messages]
    if call.is_delta or _answers_only(call):
        thread = next((thread for thread in reversed(threads) if thread.calls[-1].owner is owner), None)
        if thread is not None:
            last = thread.calls[-1]
            words = [*last.words, last.answer, *words]
            call = replace(call, messages=[*last.call.messages, last.response, *call.messages], is_delta=False)
    response = call.response or {}
    return ThreadCall(span, call, response, owner, words, wording(response))


def _continued(placed: ThreadCall, threads: list[Thread]) -> Thread | None:
    for thread in reversed(threads):
        last = thread.calls[-1]
        n_told = len(last.words)
        goes_on = len(placed.words) > n_told and _same(placed.words[n_told], last.answer)
        if goes_on and _begins(placed.words, last.words):
            return thread
    return None


def _same_place(placed: ThreadCall, threads: list[Thread]) -> Thread | None:
    return next((thread for thread in reversed(threads) if thread.calls[-1].owner is placed.owner), None)


def _system(placed: ThreadCall) -> tuple[str, ...]:
    """The first system prompt, where there is one."""
    first = (at for at, raw in enumerate(placed.call.messages) if raw.get("role") in {"system", "developer"})
    return tuple(placed.words[at] for at in islice(first, 1))


def _answers_only(call: ModelCall) -> bool:
    """A history that begins with the result of a tool: what came before stayed with the provider."""
    return bool(call.messages) and call.messages[0].get("role") in {"tool", "function"}


def _is_inside_call(tree: SpanTree, span: Span) -> bool:
    """Two instrumentations recorded one call, one within the other: the outer one counts."""
    for above in tree.line_up(span):
        if above.kind in {"agent", "tool"}:
            return False
        if above.kind == "model" and is_told(above.call):
            return True
    return False
