"""DependencyGraphLearn: learn to put actions into the order in which they depend on one another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from loraloop.episode import AnyRecord, DependencyGraphRecord, Episode, Failure, LlmCallRecord, Message, Outcome, Success, Unknown
from loraloop.learn.outcome_rules import OutcomeSettings
from loraloop.learn.record_stream import RecordStream
from loraloop.learn.transcript import Transcript, TranscriptLearn, conversation_of
from loraloop.training_data import Refusal


class DependencyGraphLearn(TranscriptLearn):
    """An episode is one answer that orders actions; a sample is the question and that answer.

    An answer is right when it puts each available action in exactly one place, nothing else, and names the actions in the order
    that was read from it. An episode of messages, without such a record, is its conversation.
    """

    def __init__(self, min_score: float = 0.0, *, include_timeouts: bool = False, score_range: tuple[float, float] = (0.0, 1.0)) -> None:
        self.outcomes = OutcomeSettings(min_score=min_score, score_range=score_range, include_timeouts=include_timeouts)
        self.stream = _Graphs()

    @property
    def name(self) -> str:
        """`dependency_graph`."""
        return "dependency_graph"

    @property
    def objective(self) -> str:
        """One sentence for people."""
        return "Order actions by what they need from one another."

    def transcripts(self, episode: Episode) -> tuple[Transcript, ...] | Refusal:
        """The question and the answer; of several answers the last."""
        graphs = [record for record in episode.records if isinstance(record, DependencyGraphRecord)]
        return (Transcript(_told(graphs[-1])),) if graphs else conversation_of(episode)


class _Graphs(RecordStream):
    name = "dependency_graph"

    def key(self, record: AnyRecord) -> str | None:
        """All alike, as each episode ends with its only record."""
        return "" if isinstance(record, DependencyGraphRecord) else None

    def ends_with(self, record: AnyRecord) -> bool:
        """Every record does."""
        del record
        return True

    def messages(self, records: Sequence[AnyRecord]) -> tuple[tuple[Message, ...], LlmCallRecord | None]:
        """The question and the answer."""
        return next((_told(record) for record in records if isinstance(record, DependencyGraphRecord)), ()), None

    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        """Success when the last answer is right, else Failure with the first thing wrong; Unknown without an answer."""
        graphs = [record for record in context if isinstance(record, DependencyGraphRecord)]
        if not graphs:
            return Unknown()
        wrong = _find_wrong(graphs[-1])
        return Failure(wrong) if wrong else Success()


def _told(graph: DependencyGraphRecord) -> tuple[Message, ...]:
    return Message(role="user", content=graph.prompt), Message(role="assistant", content=graph.response)


def _find_wrong(graph: DependencyGraphRecord) -> str | None:
    """The first thing that is wrong with an answer, or None."""
    if graph.error:
        return graph.error
    placed = [*graph.discover_order, *graph.not_discover_order]
    if not placed:
        return "no action was put in order"
    twice = sorted(name for name, count in Counter(placed).items() if count > 1)
    if twice:
        return f"in two places: {', '.join(twice)}"
    missing = sorted(set(graph.available_actions) - set(placed))
    unknown = sorted(set(placed) - set(graph.available_actions)) if graph.available_actions else []
    if missing or unknown:
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names)
    for order in (graph.discover_order, graph.not_discover_order):
        if not _names_in_order(order, graph.response):
            return f"the answer does not name {', '.join(order)} in this order"
    return None


def _names_in_order(names: Sequence[str], text: str) -> bool:
    """Whether `names` stand in `text` one after another, as whole words; an answer may name them before that, too."""
    at = 0
    for name in names:
        found = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)").search(text, at)
        if found is None:
            return False
        at = found.end()
    return True
