"""Forms: what of an episode is learned, for the learn models that only say how: weighted, preference and kto."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from loraloop.episode import ActionRecord, AnyRecord, Episode, Outcome
from loraloop.errors import SettingsError
from loraloop.learn.actions import actions_of, evaluate_actions
from loraloop.learn.conversation import ConversationLearn, TaskCalls
from loraloop.learn.outcome_rules import OutcomeSettings
from loraloop.learn.transcript import Transcript, TranscriptLearn
from loraloop.learn.worker_task import WorkerTaskLearn
from loraloop.plugins import find
from loraloop.training_data import Refusal


@runtime_checkable
class Form(Protocol):
    """What a learn model must have besides, so that other methods can learn from the same episodes."""

    @property
    def name(self) -> str:
        """The learn model's name."""
        ...

    def build_episodes(self, records: Iterable[AnyRecord], open_episodes: Sequence[Episode] = ()) -> list[Episode]:
        """As the learn model's."""
        ...

    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        """As the learn model's."""
        ...

    def transcripts(self, episode: Episode) -> tuple[Transcript, ...] | Refusal:
        """The episode as messages, whatever its outcome: once, or once a call where its history was rewritten."""
        ...


class ByContent:
    """The form that fits what an episode holds: its conversation, else its actions as WorkerTaskLearn writes them.

    Of records, the calls and actions of a task are one episode, up to `done`; `name` is the learn model that it is for.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.stream = _TaskRecords(name)
        self._conversation = ConversationLearn()
        self._actions = WorkerTaskLearn()

    def build_episodes(self, records: Iterable[AnyRecord], open_episodes: Sequence[Episode] = ()) -> list[Episode]:
        """One episode for each run of a task."""
        return self.stream.build(records, open_episodes)

    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        """What `done` says, and how many actions succeeded."""
        return self.stream.evaluate(context)

    def transcripts(self, episode: Episode) -> tuple[Transcript, ...] | Refusal:
        """As the form that fits."""
        by_actions = not episode.messages and actions_of(episode)
        return (self._actions if by_actions else self._conversation).transcripts(episode)


class _TaskRecords(TaskCalls):
    """The calls of a task, and its actions too."""

    def __init__(self, name: str) -> None:
        self.name = name

    def key(self, record: AnyRecord) -> str | None:
        """The task of an action or a call; "" for a call without one."""
        is_task = isinstance(record, ActionRecord) and record.task_id is not None
        return f"task {record.task_id}" if is_task else super().key(record)

    def begins(self, record: AnyRecord) -> bool:
        """Any does."""
        del record
        return True

    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        """What `done` says, and how many actions succeeded."""
        return evaluate_actions(context)


class FormedLearn(TranscriptLearn):
    """What weighted, preference and kto share: they learn from the transcripts of another learn model."""

    own_name: str
    """The name without a form."""

    def __init__(self, of: str | Form | None, outcomes: OutcomeSettings) -> None:
        self.form = ByContent(self.own_name) if of is None else _find_form(of)
        self.outcomes = outcomes

    @property
    def name(self) -> str:
        """Its own name; behind that of the form, where one was chosen: `worker_task.kto`."""
        return self.own_name if isinstance(self.form, ByContent) else f"{self.form.name}.{self.own_name}"

    def build_episodes(self, records: Iterable[AnyRecord], open_episodes: Sequence[Episode] = ()) -> list[Episode]:
        """Those of the form, under the form's name."""
        return self.form.build_episodes(records, open_episodes)

    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        """As the form."""
        return self.form.evaluate(context)

    def transcripts(self, episode: Episode) -> tuple[Transcript, ...] | Refusal:
        """As the form."""
        return self.form.transcripts(episode)


def _find_form(of: str | Form) -> Form:
    """The form itself, or the learn model of that name as it is by default."""
    form = find("learn_models", of)() if isinstance(of, str) else of
    if not isinstance(form, Form) or getattr(form, "method", "sft") != "sft":
        raise SettingsError(f"of={of!r}: expected a learn model of method sft that has transcripts(), such as conversation or worker_task")
    return form
