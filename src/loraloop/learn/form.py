"""Forms: what of an episode is learned, for the learn models that only say how: weighted, preference and kto."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from loraloop.episode import AnyRecord, Episode, LlmCallRecord, Outcome
from loraloop.errors import SettingsError
from loraloop.learn.actions import actions_of
from loraloop.learn.conversation import ConversationLearn
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

    Of records, calls become conversations and actions become tasks; where one run has both, name one form instead.
    """

    name = "content"

    def __init__(self) -> None:
        self._conversation = ConversationLearn()
        self._actions = WorkerTaskLearn()

    def build_episodes(self, records: Iterable[AnyRecord], open_episodes: Sequence[Episode] = ()) -> list[Episode]:
        """The conversations, then the tasks."""
        all_records = list(records)
        return [episode for form in (self._conversation, self._actions) for episode in form.build_episodes(all_records, open_episodes)]

    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        """As the form that fits."""
        has_calls = any(isinstance(record, LlmCallRecord) for record in context)
        return (self._conversation if has_calls else self._actions).evaluate(context)

    def transcripts(self, episode: Episode) -> tuple[Transcript, ...] | Refusal:
        """As the form that fits."""
        by_actions = not episode.messages and actions_of(episode)
        return (self._actions if by_actions else self._conversation).transcripts(episode)


class FormedLearn(TranscriptLearn):
    """What weighted, preference and kto share: they learn from the transcripts of another learn model."""

    own_name: str
    """The name without a form."""

    def __init__(self, of: str | Form | None, outcomes: OutcomeSettings) -> None:
        self.form = _find_form(of)
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


def _find_form(of: str | Form | None) -> Form:
    """The form itself, the learn model of that name as it is by default, or the one that fits each episode."""
    form = find("learn_models", of)() if isinstance(of, str) else of or ByContent()
    if not isinstance(form, Form) or getattr(form, "method", "sft") != "sft":
        raise SettingsError(f"of={of!r}: expected a learn model of method sft that has transcripts(), such as conversation or worker_task")
    return form
