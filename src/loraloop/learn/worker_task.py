"""WorkerTaskLearn: learn the sequence of actions by which a worker brought a task to its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loraloop.episode import ActionRecord, AnyRecord, Episode, EpisodeMetadata, Failure, Message, Outcome, Success, Unknown
from loraloop.errors import SettingsError
from loraloop.learn.outcome_rules import refusal_for_outcome, sample_weight
from loraloop.training_data import Method, Refusal, TrainingData

DONE = "done"
SYSTEM = (
    "You are an agent that solves a task step by step. Answer with the next action and its target; answer `done` when the task is solved."
)


class WorkerTaskLearn:
    """An episode is the actions of one task, up to `done`; a sample asks for each action after the results of those before.

    `min_actions` is the least number of actions, `done` included, that is worth learning.
    """

    def __init__(self, min_actions: int = 2, min_score: float = 0.0, system: str = SYSTEM) -> None:
        if min_actions < 1:
            raise SettingsError(f"min_actions={min_actions}: expected a whole number >= 1")
        self.min_actions = min_actions
        self.min_score = min_score
        self.system = system

    @property
    def name(self) -> str:
        """`worker_task`."""
        return "worker_task"

    @property
    def objective(self) -> str:
        """One sentence for people."""
        return "Choose the next action of a task as in the runs that ended well."

    @property
    def method(self) -> Method:
        """Trained by likelihood."""
        return "sft"

    def build_episodes(self, records: Iterable[AnyRecord]) -> list[Episode]:
        """One episode for each task whose actions reach `done`, in the order the tasks first appear.

        Actions without a task id belong to no task and are left out; a task without `done` is still open, and gives no episode yet.
        """
        tasks: dict[str, list[ActionRecord]] = {}
        for record in records:
            if isinstance(record, ActionRecord) and record.task_id is not None:
                actions = tasks.setdefault(record.task_id, [])
                if not (actions and actions[-1].action == DONE):
                    actions.append(record)
        return [self._episode(task_id, actions) for task_id, actions in tasks.items() if actions[-1].action == DONE]

    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        """Success when `done` succeeded, its score the share of actions that did; Failure with the error when it failed; else Unknown."""
        actions = [record for record in context if isinstance(record, ActionRecord)]
        if not actions or actions[-1].action != DONE:
            return Unknown()
        if not actions[-1].success:
            return Failure(actions[-1].error or "the task ended without success")
        return Success(sum(action.success for action in actions) / len(actions))

    def convert(self, episode: Episode) -> TrainingData | Refusal:
        """The actions as a conversation, or why not: `no_actions`, `too_few_actions`, or a reason of the outcome rules."""
        actions = [record for record in episode.records if isinstance(record, ActionRecord)]
        if not actions:
            detail = "the episode has messages only; ConversationLearn reads those"
            return Refusal(episode_id=episode.id, reason="no_actions", detail=detail)
        reason = refusal_for_outcome(episode.outcome, self.min_score, include_timeouts=False)
        if reason:
            return Refusal(episode_id=episode.id, reason=reason, detail=str(episode.outcome))
        if len(actions) < self.min_actions:
            detail = f"{len(actions)} actions, expected {self.min_actions} or more"
            return Refusal(episode_id=episode.id, reason="too_few_actions", detail=detail)
        task = episode.task_id or actions[0].task_id or str(episode.id)
        messages = [Message(role="system", content=self.system), Message(role="user", content=f"Task: {task}")]
        for action in actions:
            words = f"{action.action} {action.target}" if action.target else action.action
            # a step that failed is what happened, so it stays as context; it is not what to learn
            messages.append(Message(role="assistant", content=words, weight=1.0 if action.success else 0.0))
            messages.append(Message(role="user", content=_result(action)))
        if (weight := sample_weight(episode)) == 0:
            return Refusal(episode_id=episode.id, reason="weight_zero", detail="the recorder gave the episode the weight 0")
        score = getattr(episode.outcome, "score", None)
        return TrainingData(
            messages=tuple(messages[:-1]),
            weight=weight,
            episode_id=episode.id,
            split_key=f"{episode.metadata.scenario or ''}/{task}",
            outcome_score=score,
        )

    def _episode(self, task_id: str, actions: list[ActionRecord]) -> Episode:
        return Episode(
            learn_model=self.name,
            task_id=task_id,
            group_id=actions[0].group_id,
            records=tuple(actions),
            outcome=self.evaluate(actions),
            metadata=EpisodeMetadata(started_at=actions[0].timestamp_ms, ended_at=actions[-1].timestamp_ms + actions[-1].duration_ms),
        )


def _result(action: ActionRecord) -> str:
    """What the worker saw after an action."""
    if action.success:
        return action.output or "ok"
    return f"failed: {action.error or action.output or 'no reason given'}"
