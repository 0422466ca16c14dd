"""WorkerTaskLearn: learn the sequence of actions by which a worker brought a task to its end."""

from __future__ import annotations

from collections.abc import Sequence

from loraloop.episode import ActionRecord, AnyRecord, Episode, Outcome
from loraloop.learn.actions import actions_of, check_min_actions, conversation_with, evaluate_actions, too_few, write_actions
from loraloop.learn.outcome_rules import OutcomeSettings
from loraloop.learn.record_stream import RecordStream
from loraloop.learn.transcript import Transcript, TranscriptLearn
from loraloop.training_data import Refusal

SYSTEM = (
    "You are an agent that solves a task step by step. Answer with the next action and its target; answer `done` when the task is solved."
)


class WorkerTaskLearn(TranscriptLearn):
    """An episode is the actions of one task, up to `done`; a sample asks for each action after the results of those before.

    `min_actions` is the least number of actions, `done` included, that is worth learning. An episode of messages, without records
    of actions, is its conversation; there the tool calls are the actions.
    """

    def __init__(
        self,
        min_actions: int = 2,
        min_score: float = 0.0,
        system: str = SYSTEM,
        *,
        include_timeouts: bool = False,
        score_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.min_actions = check_min_actions(min_actions)
        self.outcomes = OutcomeSettings(min_score=min_score, score_range=score_range, include_timeouts=include_timeouts)
        self.system = system
        self.stream = _TaskActions()

    @property
    def name(self) -> str:
        """`worker_task`."""
        return "worker_task"

    @property
    def objective(self) -> str:
        """One sentence for people."""
        return "Choose the next action of a task as in the runs that ended well."

    def transcripts(self, episode: Episode) -> tuple[Transcript, ...] | Refusal:
        """The actions as a conversation, or why not: `no_actions`, `too_few_actions`."""
        actions = actions_of(episode)
        if not actions:
            return conversation_with(episode, self.min_actions)
        if len(actions) < self.min_actions:
            return too_few(episode, len(actions), self.min_actions)
        task = episode.task_id if episode.task_id is not None else actions[0].task_id
        return (write_actions(self.system, f"Task: {task or 'not named'}", actions),)


class _TaskActions(RecordStream):
    """One episode for each run of a task; what comes after its `done` is another run. Actions without a task belong to none."""

    name = "worker_task"

    def key(self, record: AnyRecord) -> str | None:
        """The task of an action."""
        return record.task_id if isinstance(record, ActionRecord) else None

    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        """What `done` says, and how many actions succeeded."""
        return evaluate_actions(context)
