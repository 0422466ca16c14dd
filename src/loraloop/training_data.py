"""TrainingData is one sample to train on; a Refusal says why an episode gave none.

A sample is a whole conversation in the OpenAI shape: to be learned (sft), to be learned so much or so little (weighted), to be
made likelier or less likely (kto), or the better one of two that begin alike (dpo). It can be traced to the episodes it came from.
Which tokens carry loss follows from who wrote each turn; `chat.render` turns that into token weights. This module also owns the
line of a training file, the one form in which samples reach a training process.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, JsonValue, ValidationError, model_validator
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


Method = Literal["sft", "weighted", "dpo", "kto"]
"""How samples are trained: by likelihood, by weighted likelihood, by preference within a pair, by desirable and undesirable."""
METHODS: tuple[Method, ...] = get_args(Method)


class Refusal(Frozen):
    """An episode or sample that is left out, and why: `reason` is a short code that reports count by."""

    episode_id: EpisodeId | None = None
    reason: str
    detail: str = ""


class TrainingData(Frozen):
    """One sample. Raises ValueError when its fields do not fit its kind."""

    kind: Method = "sft"
    messages: tuple[Message, ...] = Field(min_length=1)
    """The whole conversation; for dpo the better one."""
    rejected_messages: tuple[Message, ...] = ()
    """dpo: the turns of the worse conversation behind the prompt."""
    n_prompt: Annotated[int, Field(ge=0)] = 0
    """dpo: how many of `messages` are the prompt, with which both conversations begin. 0: all but the last turn."""
    desirable: bool | None = None
    """kto: whether the agent's turns are to become likelier or less likely."""
    tools: tuple[dict[str, JsonValue], ...] = ()
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Multiplies the sample's loss, for sft and weighted that of every agent token; 0 leaves it out of a training, as a refusal.
    Only a weighted sample may be negative: its agent tokens become less likely."""
    episode_id: EpisodeId | None = None
    rejected_episode_id: EpisodeId | None = None
    """dpo: where the worse conversation came from."""
    split_key: str | None = None
    """Samples with equal keys are never divided between training and held-out."""
    outcome_score: float | None = None
    model: str | None = None
    """The model that produced the episode, where known."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if (self.kind == "dpo") != bool(self.rejected_messages):
            raise ValueError("a sample of kind dpo has rejected turns, and no other kind has")
        if self.n_prompt and (self.kind != "dpo" or self.n_prompt >= len(self.messages)):
            raise ValueError(f"n_prompt {self.n_prompt}: only of kind dpo, and less than the {len(self.messages)} messages")
        if (self.kind == "kto") != (self.desirable is not None):
            raise ValueError("a sample of kind kto says whether it is desirable, and no other kind does")
        if self.weight < 0 and self.kind != "weighted":
            raise ValueError(f"weight {self.weight:g}: only a sample of kind weighted may have one below 0")
        return self

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
    def episode_ids(self) -> tuple[EpisodeId, ...]:
        """The episodes that it was made from, each once."""
        return tuple(dict.fromkeys(found for found in (self.episode_id, self.rejected_episode_id) if found is not None))

    @property
    def sides(self) -> tuple[Self, ...]:
        """The conversations to compute, each as an sft sample of weight 1: one, for dpo the better and then the worse.

        Of a pair only what stands behind the prompt is trained: the prompt is on both sides, and cancels out.
        """
        whole = {"kind": "sft", "weight": 1.0, "rejected_messages": (), "n_prompt": 0, "desirable": None, "rejected_episode_id": None}
        if self.kind != "dpo":
            return (self.model_copy(update=whole),)
        n_prompt = self.n_prompt or len(self.messages) - 1
        prompt = tuple(message.model_copy(update={"weight": 0.0}) for message in self.messages[:n_prompt])
        better = self.model_copy(update={**whole, "messages": (*prompt, *self.messages[n_prompt:])})
        rejected_id = self.rejected_episode_id or self.episode_id
        worse = self.model_copy(update={**whole, "messages": (*prompt, *self.rejected_messages), "episode_id": rejected_id})
        return better, worse

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
        if self.n_prompt:
            line["n_prompt"] = self.n_prompt
        if self.desirable is not None:
            line["desirable"] = self.desirable
        if self.weight != 1.0:
            line["weight"] = self.weight
        for name, episode_id in (("episode_id", self.episode_id), ("rejected_episode_id", self.rejected_episode_id)):
            if episode_id is not None:
                line[name] = str(episode_id)
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
            "n_prompt": line.get("n_prompt") or 0,
            "desirable": line.get("desirable"),
            "weight": 1.0 if line.get("weight") is None else line["weight"],
            "episode_id": line.get("episode_id"),
            "rejected_episode_id": line.get("rejected_episode_id"),
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
    first, *rest = map(str, error["loc"] or ("",))
    place = ".".join([{"messages": "conversations", "rejected_messages": "rejected"}.get(first, first), *rest])
    if not place:
        return error["msg"].removeprefix("Value error, ")
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
