"""TrainingData is one sample to train on; a Refusal says why an episode gave none.

A sample is a whole conversation in the OpenAI shape (sft) or a prompt with a better and a worse answer (dpo), and can be traced to
the episode it came from. Which tokens carry loss follows from who wrote each turn; `chat.render` turns that into token weights.
This module also owns the line of a training file, the one form in which samples reach a training process.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, ValidationError
from pydantic_core import ErrorDetails

from loraloop.episode import EpisodeId, Frozen, Message


class ConversationRole(StrEnum):
    """Who speaks in a turn."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class ConversationTurn(Frozen):
    """One turn; `content` is the text, `message` the whole of it with tool calls and flags."""

    role: ConversationRole
    content: str
    message: Message


class Conversation(Frozen):
    """The turns of one sample, in order."""

    conversations: tuple[ConversationTurn, ...]

    @property
    def turns(self) -> tuple[ConversationTurn, ...]:
        """The same turns under the name used elsewhere."""
        return self.conversations

    def __len__(self) -> int:
        return len(self.conversations)


class Refusal(Frozen):
    """An episode or sample that is left out, and why: `reason` is a short code that reports count by."""

    episode_id: EpisodeId | None = None
    reason: str
    detail: str = ""


class TrainingData(Frozen):
    """One sample. For sft, `messages` is the whole conversation; for dpo it ends with the chosen answer and `rejected` holds the other."""

    kind: Literal["sft", "dpo"] = "sft"
    messages: tuple[Message, ...] = Field(min_length=1)
    rejected_messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, JsonValue], ...] = ()
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Multiplies the loss of every agent token in the sample; 0 leaves it out of a training, as a refusal."""
    episode_id: EpisodeId | None = None
    split_key: str | None = None
    """Samples with equal keys are never divided between training and held-out."""
    outcome_score: float | None = None
    model: str | None = None
    """The model that produced the episode, where known."""

    @classmethod
    def sft(cls, system: str | None, prompt: str, response: str) -> Self:
        """A question and the answer to learn."""
        return cls(messages=(*_prompt(system, prompt), Message(role="assistant", content=response)))

    @classmethod
    def sft_simple(cls, prompt: str, response: str) -> Self:
        """`sft` without a system prompt."""
        return cls.sft(None, prompt, response)

    @classmethod
    def dpo(cls, prompt: str, chosen: str, rejected: str, system: str | None = None) -> Self:
        """A question with the answer to prefer and the one to avoid."""
        return cls(
            kind="dpo",
            messages=(*_prompt(system, prompt), Message(role="assistant", content=chosen)),
            rejected_messages=(Message(role="assistant", content=rejected),),
        )

    @classmethod
    def dpo_with_system(cls, system: str, prompt: str, chosen: str, rejected: str) -> Self:
        """`dpo` with a system prompt."""
        return cls.dpo(prompt, chosen, rejected, system=system)

    def with_episode_id(self, episode_id: str) -> Self:
        """A copy that is traceable to its episode."""
        return self.model_copy(update={"episode_id": EpisodeId.parse(episode_id)})

    def with_outcome_score(self, score: float) -> Self:
        """A copy that carries the episode's score."""
        return self.model_copy(update={"outcome_score": float(score)})

    def with_model(self, model: str) -> Self:
        """A copy that names the model that produced the episode."""
        return self.model_copy(update={"model": model})

    @property
    def is_sft(self) -> bool:
        """True for a sample of kind sft."""
        return self.kind == "sft"

    @property
    def system(self) -> str | None:
        """The system prompt, or None."""
        return self.messages[0].content if self.messages[0].role == "system" else None

    @property
    def prompt(self) -> str:
        """The text of the last user turn before the last answer, or ""."""
        users = [message.content or "" for message in self.messages if message.role == "user"]
        return users[-1] if users else ""

    @property
    def chosen(self) -> str:
        """The text of the last agent turn, or ""."""
        own = [message.content or "" for message in self.messages if message.role == "assistant"]
        return own[-1] if own else ""

    @property
    def rejected(self) -> str | None:
        """The text of the answer to avoid, None for sft."""
        return self.rejected_messages[-1].content if self.rejected_messages else None

    def to_conversation(self) -> Conversation:
        """The sample as turns; the chosen side for dpo."""
        return Conversation(
            conversations=tuple(
                ConversationTurn(role=ConversationRole(message.role), content=message.content or "", message=message)
                for message in self.messages
            )
        )

    def to_line(self) -> dict[str, Any]:
        """One object of a training file: `conversations`, and those of our own keys that say anything."""
        line: dict[str, Any] = {"conversations": [_turn_to_line(message) for message in self.messages], "kind": self.kind}
        if self.rejected_messages:
            line["rejected"] = [_turn_to_line(message) for message in self.rejected_messages]
        if self.tools:
            line["tools"] = list(self.tools)
        if self.weight != 1.0:
            line["weight"] = self.weight
        if self.episode_id is not None:
            line["episode_id"] = str(self.episode_id)
        return line

    @classmethod
    def from_line(cls, line: Any) -> Self:
        """The sample of one line; a line with only `conversations` will do. Raises ValueError saying what is wrong, and where."""
        if not isinstance(line, dict) or not isinstance(line.get("conversations"), list):
            raise ValueError("expected an object with `conversations`, a list of turns")
        fields = {
            "kind": line.get("kind") or "sft",
            "messages": line["conversations"],
            "rejected_messages": line.get("rejected") or (),
            "tools": line.get("tools") or (),
            "weight": 1.0 if line.get("weight") is None else line["weight"],
            "episode_id": line.get("episode_id"),
        }
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise ValueError("; ".join(map(_describe_wrong, error.errors()[:3]))) from error


def is_held_out(split_key: str, fraction: float) -> bool:
    """Whether samples with this key are kept from training: by a hash of the key alone, so the answer never changes."""
    digest = hashlib.blake2b(split_key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def split_by_task(samples: list[TrainingData], fraction: float, min_tasks: int) -> tuple[list[TrainingData], list[TrainingData]]:
    """(training, held-out), divided by `split_key`; nothing is held out below `min_tasks` distinct keys or when nothing would be left."""
    keys = [sample.split_key or str(sample.episode_id) for sample in samples]
    if len(set(keys)) < min_tasks:
        return samples, []
    held = [is_held_out(key, fraction) for key in keys]
    if all(held):
        return samples, []
    kept = [sample for sample, out in zip(samples, held, strict=True) if not out]
    return kept, [sample for sample, out in zip(samples, held, strict=True) if out]


def _describe_wrong(error: ErrorDetails) -> str:
    """One thing that pydantic found wrong, by the names that a line has for it: `conversations.0.role: …, found 'developer'`."""
    first, *rest = map(str, error["loc"])
    place = ".".join([{"messages": "conversations", "rejected_messages": "rejected"}.get(first, first), *rest])
    return f"{place}: {error['msg']}, found {str(error['input'])[:80]!r}"


def _prompt(system: str | None, prompt: str) -> tuple[Message, ...]:
    head = (Message(role="system", content=system),) if system is not None else ()
    return (*head, Message(role="user", content=prompt))


def _turn_to_line(message: Message) -> dict[str, Any]:
    """The OpenAI form plus our flags where they differ from their defaults."""
    turn = message.to_openai()
    if message.is_demo:
        turn["is_demo"] = True
    if message.author is not None:
        turn["author"] = message.author
    if message.weight != 1.0:
        turn["weight"] = message.weight
    return turn
