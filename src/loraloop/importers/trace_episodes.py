"""From traces to episodes: each thread of a trace is one, linked to the others by the trace and the spans.

The main thread, that of the topmost agent, has the trace's task and outcome. The others (sub-agents, side calls) belong to the same task,
so that they fall on the same side of a split, are compared with attempts of the same agent only, and have the outcome that was said of
themselves, else Unknown. Where calls do not continue one another, the episode holds each as a record, and each is learned by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

from pydantic import JsonValue

from loraloop.chat.openai_messages import Taken, take_messages, take_tools
from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.episode import Episode, EpisodeMetadata, LlmCallRecord, Message
from loraloop.files import content_hash
from loraloop.importers.call_threads import GAP, Thread, ThreadCall, is_told, make_threads, wording
from loraloop.importers.chat_dialects import NOTES, REBUILT, RawMessage
from loraloop.importers.entry import Entry, convert_entries, require_clean, to_tags
from loraloop.importers.span_tree import Score, Span, SpanTree, Trace
from loraloop.importers.trace_scores import outcome_of
from loraloop.training_data import Refusal


def convert_traces(path: Path, format_name: str, traces: Iterable[Trace], capture_advice: str) -> Iterator[Episode | Refusal]:
    """The episodes of each trace, the main one first, under their content ids; or a Refusal for a trace, or for one of its threads.

    `capture_advice` says how to have content recorded, for a trace without any.
    """
    for trace in traces:
        yield from convert_entries(path, _to_entries(trace, format_name, capture_advice), lambda episode: cast("Episode", episode))


def _to_entries(trace: Trace, format_name: str, capture_advice: str) -> Iterator[Entry]:
    try:
        if trace.problem is not None:
            raise trace.problem
        tree = SpanTree(trace.spans)
        threads = _main_first(tree, make_threads(tree))
        if not threads:
            raise _nothing_told(tree, capture_advice)
        require_clean([trace.id, trace.task_id, trace.tags])
    except EntryRefused as error:
        yield Entry(trace.place, problem=error)
        return
    builder = _Builder(trace, tree, threads, format_name)
    for thread in threads:
        who = thread.calls[0].agent
        place = trace.place if thread is threads[0] else f"{trace.place}, {'agent ' + show(who) if who else 'another thread'}"
        try:
            yield Entry(place, builder.build(thread))
        except EntryRefused as error:
            yield Entry(place, problem=error)


class _Builder:
    """Builds the episodes of one trace."""

    def __init__(self, trace: Trace, tree: SpanTree, threads: list[Thread], format_name: str) -> None:
        self.trace = trace
        self.tree = tree
        self.main = threads[0]
        self.threads = threads
        self.format_name = format_name
        self.task_id = trace.task_id or _prompt_task(self.main)
        self.tops: dict[int, Span] = {}
        """The span that stands for each thread; no span stands for two."""
        self.top_ids: set[str] = set()
        for thread in threads:
            self.tops[id(thread)] = self._find_top(thread)
            self.top_ids.add(self.tops[id(thread)].id)
        untold = [span for span in tree if span.kind == "model" and not is_told(span.call)]
        self.n_failed = sum(span.error is not None for span in untold)
        self.n_silent = len(untold) - self.n_failed

    def build(self, thread: Thread) -> Episode:
        told = _without_notes(thread.telling())
        require_clean([told, [call.call.tools for call in thread.calls]])
        taken = take_messages(_require_no_gap(told), "messages")
        records = _to_records(thread, self.task_id) if thread.is_rewritten else ()
        outcome, decided_by, score_tags = outcome_of(self._scores(thread))
        is_main = thread is self.main
        agent = thread.calls[0].agent
        tags = self._tags(thread, taken)
        require_clean([tags, list(score_tags.items())])
        starts, ends = _times([call.span for call in thread.calls] + ([thread.owner] if thread.owner else []))
        return Episode(
            task_id=self.task_id,
            group_id=self.task_id if is_main else f"{self.task_id}/{agent or _prompt_task(thread)}",
            messages=tuple(taken.messages),
            tools=_tools(_offered(thread)),
            records=records,
            outcome=outcome,
            metadata=EpisodeMetadata(
                scenario=self.format_name,
                started_at=starts if self.trace.has_real_times else None,
                ended_at=ends if self.trace.has_real_times else None,
                tags=to_tags(self.format_name, taken.ignored, **(tags | score_tags), outcome_from=decided_by),
            ),
        )

    def _tags(self, thread: Thread, taken: Taken) -> dict[str, object]:
        longest = thread.longest
        is_main = thread is self.main
        top = self.tops[id(thread)]
        errors = [span.error for span in (top, *self.tree.line_up(top)) if span.error is not None]
        n_context = sum(message.role == "assistant" and message.weight == 0 for message in taken.messages)
        others = [self.tops[id(other)].id for other in self.threads[1:]] if is_main else []
        own: dict[str, object] = {
            "agent": thread.calls[0].agent,
            "calls_without_content": self.n_silent or None if is_main else None,
            "context_turns": n_context or None,
            "decoded_arguments": taken.decoded_arguments,
            "failed_calls": self.n_failed or None if is_main else None,
            "finish_reason": longest.call.finish,
            "history": "rewritten" if thread.is_rewritten else None,
            "linked_spans": others or None,
            "missing_parents": self.tree.n_missing or None,
            "model": longest.call.model,
            "parent_span_id": None if is_main else self._parent(thread),
            "run_error": errors[0] if errors and is_main else None,
            "span_id": top.id,
            "text": "rebuilt" if any(message.get(REBUILT) for message in longest.call.messages) else None,
            "tools_vary": True if len({content_hash([*call.call.tools]) for call in thread.calls}) > 1 else None,
            "trace_id": self.trace.id,
        }
        return {**self.trace.tags, **own}

    def _find_top(self, thread: Thread) -> Span:
        """Its agent's span, unless that stands for a thread already; without one, of the main thread the topmost, of others the call's."""
        first = thread.calls[0].span
        if thread.owner is not None and thread.owner.id not in self.top_ids:
            return thread.owner
        return [first, *self.tree.line_up(first)][-1] if thread is self.main else first

    def _parent(self, thread: Thread) -> str:
        """The span of the thread within which `thread` ran; the main one's when none encloses it."""
        top = self.tops[id(thread)]
        around = (above.id for above in self.tree.line_up(top) if above.id in self.top_ids and above.id != top.id)
        return next(around, self.tops[id(self.main)].id)

    def _scores(self, thread: Thread) -> list[Score]:
        """What was said of the thread: of its last answer, of its agent's run, and of a main thread also of all that encloses it."""
        last, top = thread.calls[-1].span, self.tops[id(thread)]
        spans = [last]
        if thread is self.main or top is thread.owner:
            for above in self.tree.line_up(last):
                spans.append(above)
                if above is top and thread is not self.main:
                    break
        said = [score for span in spans for score in span.scores]
        return said + self.trace.scores if thread is self.main else said


def _main_first(tree: SpanTree, threads: list[Thread]) -> list[Thread]:
    """The topmost agent's thread first, of several one with tools, of those the one with most calls; the others as they began."""

    def depth(thread: Thread) -> int:
        return sum(above.kind in {"agent", "tool"} for above in tree.line_up(thread.calls[0].span))

    if not threads:
        return []
    main = min(threads, key=lambda thread: (depth(thread), not _offered(thread), -len(thread.calls)))
    return [main, *(thread for thread in threads if thread is not main)]


def _nothing_told(tree: SpanTree, capture_advice: str) -> EntryRefused:
    models = [span for span in tree if span.kind == "model"]
    if not models:
        n_spans = sum(1 for _ in tree)
        advice = "leave it out: no model took part in it that this format names"
        return EntryRefused("no_agent_turn", f"no call of a model (spans: {n_spans})", "at least one call of a model", advice)
    if all(span.error is not None for span in models):
        found = f"no call of a model that went well (calls: {len(models)}; the last failed with {show(models[-1].error)})"
        return EntryRefused("run_error", found, "an answer", "leave it out: there is nothing to learn")
    found = f"no content recorded (calls of a model: {len(models)}; the first is span {show(models[0].id)})"
    return EntryRefused("no_content", found, "what the model was given and what it answered", capture_advice)


def _prompt_task(thread: Thread) -> str:
    """A name for the task from what the agent was given before it spoke first, so that attempts at one task share it."""
    first = thread.calls[0]
    given: list[str] = []
    for message, word in zip(first.call.messages, first.words, strict=True):
        if message.get("role") == "assistant":
            break
        given.append(word)
    return f"prompt-{content_hash(given or [wording(first.response)], 16)}"


def _to_records(thread: Thread, task_id: str) -> tuple[LlmCallRecord, ...]:
    return tuple(_to_record(call, task_id) for call in thread.calls)


def _to_record(call: ThreadCall, task_id: str) -> LlmCallRecord:
    told = _without_notes([*call.call.messages, call.response])
    require_clean(told)
    messages: list[Message] = take_messages(_require_no_gap(told), "messages").messages
    start, end = call.span.start_ms, call.span.end_ms
    return LlmCallRecord(
        timestamp_ms=start or 0,
        task_id=task_id,
        messages=tuple(messages[:-1]),
        response=messages[-1],
        tools=_tools(call.call.tools),
        model=call.call.model or "",
        latency_ms=max(0, end - start) if start is not None and end is not None else 0,
    )


def _offered(thread: Thread) -> list[dict[str, object]]:
    """The tools of the longest call; where none were recorded with it, those of the last call that has some."""
    return thread.longest.call.tools or next((call.call.tools for call in reversed(thread.calls) if call.call.tools), [])


def _tools(offered: list[dict[str, object]]) -> tuple[dict[str, JsonValue], ...]:
    return cast("tuple[dict[str, JsonValue], ...]", take_tools(offered))


def _without_notes(messages: list[RawMessage]) -> list[RawMessage]:
    return [{key: part for key, part in message.items() if key not in NOTES} for message in messages]


def _require_no_gap(messages: list[RawMessage]) -> list[RawMessage]:
    at = next((number for number, message in enumerate(messages, 1) if message.get(GAP)), None)
    if at is None:
        return messages
    found = f"no message {at} among {len(messages)}"
    advice = "raise the limits on attributes and their length (OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT), and record the run anew"
    raise EntryRefused("truncated_content", found, "every message of the history", advice)


def _times(spans: list[Span]) -> tuple[int | None, int | None]:
    starts = [span.start_ms for span in spans if span.start_ms is not None]
    ends = [span.end_ms for span in spans if span.end_ms is not None]
    return min(starts, default=None), max(ends, default=None)
