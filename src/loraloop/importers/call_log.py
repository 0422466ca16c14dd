"""Logs of single calls to a model: every call repeats the history, and an agent's run is many calls.

Each call is an episode of its own, with the very prompt that the model was given. A turn in the history that an earlier call of the
file answered is told by that call, so it is context here, with weight 0, and no turn is learned twice. A turn that no earlier call
answered is kept as the agent's, as nothing else tells it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loraloop.episode import Message
from loraloop.files import content_hash


@dataclass
class ToldTurns:
    """The turns that the calls read so far have told, as hashes over all that was said up to them; a few bytes each."""

    hashes: set[str] = field(default_factory=set)

    def mark(self, messages: Sequence[Message]) -> list[Message]:
        """`messages`, those turns of the agent that were told before with weight 0; from now on all of them count as told."""
        marked, before, new = [], "", []
        for message in messages:
            before = content_hash([before, {**message.to_openai(), "content": message.content or ""}])
            is_told = message.is_agent and before in self.hashes
            marked.append(message.model_copy(update={"weight": 0.0}) if is_told else message)
            new += [before] if message.is_agent else []
        self.hashes.update(new)
        return marked


def to_task_id(messages: Sequence[Message]) -> str | None:
    """A name for what the conversation opens with, so that calls of one stay together; None when the agent spoke first."""
    first_turn = next((at for at, message in enumerate(messages) if message.role == "assistant"), 0)
    return content_hash([message.to_openai() for message in messages[:first_turn]], 12) if first_turn else None
