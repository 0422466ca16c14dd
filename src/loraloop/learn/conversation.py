"""ConversationLearn: learn what the agent said and did in whole conversations that ended well."""

from __future__ import annotations

from collections.abc import Sequence

from loraloop.episode import (
    CONVERSATION,
    ActionRecord,
    AnyRecord,
    Episode,
    Failure,
    LlmCallRecord,
    Message,
    Outcome,
    Success,
    Unknown,
    longest_call,
)
from loraloop.learn.outcome_rules import OutcomeSettings
from loraloop.learn.record_stream import RecordStream, is_done
from loraloop.learn.transcript import Transcript, TranscriptLearn, conversation_of
from loraloop.training_data import Refusal


class ConversationLearn(TranscriptLearn):
    """A whole tool-calling conversation is one sample; its agent turns carry loss, everything else is context.

    Where the calls of an episode do not continue one another message for message, as after a context was compacted, each call is a
    sample with its own answer. `min_score` is the least score that is learned, on the scale `score_range`; timeouts are learned
    only with `include_timeouts`, failures and unknown outcomes never.
    """

    def __init__(self, min_score: float = 0.0, *, include_timeouts: bool = False, score_range: tuple[float, float] = (0.0, 1.0)) -> None:
        self.outcomes = OutcomeSettings(min_score=min_score, score_range=score_range, include_timeouts=include_timeouts)
        self.stream = TaskCalls()

    @property
    def name(self) -> str:
        """`conversation`."""
        return CONVERSATION

    @property
    def objective(self) -> str:
        """One sentence for people."""
        return "Answer and call tools as in the conversations that ended well."

    def transcripts(self, episode: Episode) -> tuple[Transcript, ...] | Refusal:
        """The messages as they are, or one transcript a call; `no_messages` when there are neither."""
        return conversation_of(episode)


class TaskCalls(RecordStream):
    """One episode for each task: its calls, told by the one with the longest history.

    An action `done` of the task ends it and says how it ended; without one it stays open until somebody closes it, as calls do not
    say which is the last. A call without a task stands for itself. Calls that failed have no answer and are left out.
    """

    name = CONVERSATION

    def key(self, record: AnyRecord) -> str | None:
        """The task; "" for a call without one."""
        if isinstance(record, LlmCallRecord) and record.error is None:
            return "" if record.task_id is None else f"task {record.task_id}"
        return f"task {record.task_id}" if is_done(record) and record.task_id is not None else None

    def begins(self, record: AnyRecord) -> bool:
        """A call does; `done` does not."""
        return isinstance(record, LlmCallRecord)

    def ends_with(self, record: AnyRecord) -> bool:
        """`done`, and a call without a task."""
        return is_done(record) or record.task_id is None

    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        """What `done` says, where there is one; else Unknown, until a label or a verifier says it."""
        done = [record for record in context if isinstance(record, ActionRecord) and is_done(record)]
        if not done:
            return Unknown()
        return Success() if done[-1].success else Failure(done[-1].error or "the task ended without success")

    def messages(self, records: Sequence[AnyRecord]) -> tuple[tuple[Message, ...], LlmCallRecord | None]:
        """The longest history and its answer."""
        longest = longest_call([record for record in records if isinstance(record, LlmCallRecord)])
        return ((*longest.messages, longest.response), longest) if longest else ((), None)
