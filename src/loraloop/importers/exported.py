"""What an exported file says in the key `loraloop` beside what its format has a place for: outcome, task, tags, marks of turns.

With it a file that was exported is taken in as the very episodes that it was made of. Other programs pass over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, JsonValue, ValidationError

from loraloop.chat.refused_entry import EntryRefused
from loraloop.episode import CONVERSATION, AnyOutcome, Episode, EpisodeMetadata, Frozen, Message

KEY = "loraloop"


class Exported(Frozen):
    """All of an episode but its messages, its tools and its id, which follows from its content."""

    version: Literal[1] = 1
    learn_model: str = CONVERSATION
    task_id: str | None = None
    group_id: str | None = None
    outcome: AnyOutcome
    strategy: str | None = None
    scenario: str | None = None
    started_at: int | None = None
    ended_at: int | None = None
    tags: dict[str, str] = Field(default_factory=dict)
    messages: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    """By the number of a message, from 0: those fields that the format has no place for, or says otherwise."""

    @classmethod
    def of(cls, episode: Episode, marks: dict[str, dict[str, JsonValue]]) -> Self:
        """What is to be said of `episode`, and of single messages."""
        kept = episode.metadata.model_dump(exclude={"created_at"})
        said = {"learn_model": episode.learn_model, "task_id": episode.task_id, "group_id": episode.group_id, "outcome": episode.outcome}
        return cls.model_validate({**kept, **said, "messages": marks})

    @classmethod
    def parse(cls, value: object) -> Self:
        """Refused as `bad_shape` when `value` is no such block."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            found = f"{KEY}.{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise EntryRefused("bad_shape", found, "what `loraloop export` wrote", f"remove the key `{KEY}`, or export again") from error

    def to_json(self) -> dict[str, JsonValue]:
        """Without what is as it would be by itself."""
        said: dict[str, JsonValue] = self.model_dump(mode="json", exclude_defaults=True)
        return {"version": 1, **said, "outcome": self.model_dump(mode="json", include={"outcome"})["outcome"]}

    def restore(self, messages: Sequence[Message], tools: Sequence[dict[str, JsonValue]]) -> Episode:
        """The episode, of messages and tools as the format has them. Refused as `bad_shape` when a mark fits none."""
        try:
            marked = [
                Message.model_validate({**message.model_dump(), **self.messages.get(str(number), {})})
                for number, message in enumerate(messages)
            ]
        except ValidationError as error:
            raise EntryRefused("bad_shape", f"{KEY}.messages: {error.errors()[0]['msg']}", "fields of a message", "export again") from error
        metadata = EpisodeMetadata(
            strategy=self.strategy, scenario=self.scenario, started_at=self.started_at, ended_at=self.ended_at, tags=self.tags
        )
        return Episode(
            learn_model=self.learn_model,
            task_id=self.task_id,
            group_id=self.group_id,
            messages=tuple(marked),
            tools=tuple(tools),
            outcome=self.outcome,
            metadata=metadata,
        )
