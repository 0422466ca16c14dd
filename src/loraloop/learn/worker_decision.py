"""WorkerDecisionSequenceLearn: learn how a worker chose one action after another among those it had."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from loraloop.episode import ActionRecord, AnyRecord, Episode, Outcome
from loraloop.errors import SettingsError
from loraloop.learn.actions import actions_of, check_min_actions, conversation_with, evaluate_actions, too_few, write_actions
from loraloop.learn.outcome_rules import OutcomeSettings
from loraloop.learn.record_stream import RecordStream, is_done
from loraloop.learn.transcript import Transcript, TranscriptLearn
from loraloop.training_data import Refusal, TrainingData

SYSTEM = "You are a worker. After each result, answer with your next action and its target; answer `done` when nothing is left to do."
SYSTEM_EVENTS = ("heartbeat", "spawn", "tick")


class WorkerDecisionSequenceLearn(TranscriptLearn):
    """An episode is what one worker did in a row; a sample asks for each decision after the results of those before.

    A sequence ends with the worker's `done`, or when its next action is for another task. `available_actions` are told to the
    worker; when none are given, they are those that the episodes of the same scenario use. Actions named in `system_events` are
    not the worker's decisions: they are kept in the episode and neither count nor are learned. `min_actions` is the least number
    of decisions, `done` included. An episode of messages is its conversation; there the tool calls are the decisions.
    """

    def __init__(
        self,
        min_actions: int = 3,
        min_score: float = 0.0,
        system: str = SYSTEM,
        *,
        available_actions: Sequence[str] = (),
        system_events: Sequence[str] = SYSTEM_EVENTS,
        include_timeouts: bool = False,
        score_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.min_actions = check_min_actions(min_actions)
        self.outcomes = OutcomeSettings(min_score=min_score, score_range=score_range, include_timeouts=include_timeouts)
        self.system = system
        self.available_actions = _check_names("available_actions", available_actions)
        self.system_events = _check_names("system_events", system_events)
        self.stream = _WorkerActions(frozenset(self.system_events))

    @property
    def name(self) -> str:
        """`worker_decision`."""
        return "worker_decision"

    @property
    def objective(self) -> str:
        """One sentence for people."""
        return "Decide as a worker did in the sequences that ended well."

    def group_key(self, episode: Episode) -> str:
        """The scenario: what is available to a worker is known from all of its episodes."""
        return episode.metadata.scenario or ""

    def convert_group(self, episodes: Sequence[Episode]) -> list[TrainingData | Refusal]:
        """The sample or refusal of each; the available actions are those of the whole group unless they were given."""
        known = self.available_actions or tuple(sorted({action.action for each in episodes for action in self._decisions(each)}))
        told = copy.copy(self)
        told.available_actions = known
        return super(WorkerDecisionSequenceLearn, told).convert_group(episodes)

    def transcripts(self, episode: Episode) -> tuple[Transcript, ...] | Refusal:
        """The decisions as a conversation, or why not: `no_actions`, `too_few_actions`."""
        decisions = self._decisions(episode)
        if not actions_of(episode):
            return conversation_with(episode, self.min_actions)
        if len(decisions) < self.min_actions:
            return too_few(episode, len(decisions), self.min_actions)
        known = self.available_actions or tuple(sorted({action.action for action in decisions}))
        task = episode.task_id if episode.task_id is not None else decisions[0].task_id
        question = f"Available actions: {', '.join(known)}" + (f"\nTask: {task}" if task else "")
        return (write_actions(self.system, question, decisions),)

    def _decisions(self, episode: Episode) -> list[ActionRecord]:
        return [action for action in actions_of(episode) if action.action not in self.system_events]


class _WorkerActions(RecordStream):
    """One episode for each sequence of one worker. Actions without a worker belong to none."""

    name = "worker_decision"

    def __init__(self, system_events: frozenset[str]) -> None:
        self._system_events = system_events

    def key(self, record: AnyRecord) -> str | None:
        """The worker of an action."""
        return record.worker_id if isinstance(record, ActionRecord) else None

    def begins(self, record: AnyRecord) -> bool:
        """A decision does; an event of the system does not."""
        return isinstance(record, ActionRecord) and record.action not in self._system_events

    def ends_before(self, so_far: Sequence[AnyRecord], record: AnyRecord) -> bool:
        """When the worker turns to another task."""
        task = next((earlier.task_id for earlier in so_far if earlier.task_id is not None), None)
        return task is not None and record.task_id is not None and record.task_id != task

    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        """What `done` says, and how many decisions succeeded; Unknown for a sequence that another task cut off."""
        decisions = [record for record in context if isinstance(record, ActionRecord) and record.action not in self._system_events]
        return evaluate_actions(decisions)

    def ends_with(self, record: AnyRecord) -> bool:
        """`done`."""
        return is_done(record)


def _check_names(setting: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise SettingsError(f"{setting}={names!r}: expected a list of names")
    return tuple(names)
