"""An Episode is one attempt at one task: what was said and done, how it ended, and where it came from.

It carries messages (a conversation in the OpenAI shape, tool calls verbatim), records (raw events), or both. All types are frozen
and validated; times are Unix milliseconds, UTC. Nothing here knows about training, files or databases.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, JsonValue, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic.dataclasses import dataclass

from loraloop.ids import SortableId

CONVERSATION = "conversation"
"""The learn model that imported conversations belong to unless told otherwise."""


def now_ms() -> int:
    """The present in Unix milliseconds."""
    return time.time_ns() // 1_000_000


class EpisodeId(SortableId):
    """`ep-<unix ms>-<hex>` when made here; ids made from content have 0 for the time, so that importing twice gives the same id.

    `parse` also takes ids that other systems gave: any text of letters, digits and `._:@+-` that is safe as a file name.
    """

    prefix: ClassVar[str] = "ep"

    @classmethod
    def parse(cls, text: str) -> Self:
        """`text` as an id; raises ValueError when it is empty, too long, or not safe as a file name."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}", text):
            raise ValueError(f"{text!r} is no episode id; expected 1 to 128 letters, digits or ._:@+- that begin with a letter or digit")
        return cls(text)

    @classmethod
    def from_content(cls, digest: str) -> Self:
        """The id of an imported episode, from the first 32 hex digits of a hash over what was imported."""
        return cls.parse(f"{cls.prefix}-{0:013d}-{digest[:32]}")

    @property
    def timestamp_ms(self) -> int:
        """When it was made, in Unix milliseconds; 0 for ids made from content or elsewhere."""
        return int(self.split("-")[1]) if re.fullmatch(r"ep-[0-9]{13}-[0-9a-f]+", self) else 0


# --- outcomes ---------------------------------------------------------------------------------------------------------------


class Outcome:
    """How an episode ended: exactly one of Success, Failure, Timeout, Unknown."""

    kind: str

    @property
    def is_success(self) -> bool:
        """True for Success only."""
        return isinstance(self, Success)

    @property
    def is_failure(self) -> bool:
        """True for Failure only; a timeout is not a failure."""
        return isinstance(self, Failure)

    @property
    def is_timeout(self) -> bool:
        """True for Timeout only."""
        return isinstance(self, Timeout)

    @property
    def is_unknown(self) -> bool:
        """True for Unknown only."""
        return isinstance(self, Unknown)


_FROZEN = ConfigDict(extra="forbid")
_Score = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, config=_FROZEN)
class Success(Outcome):
    """The task was solved; `score` is on the recorder's own scale, 1.0 where it had none."""

    score: _Score = 1.0
    kind: Literal["success"] = Field(default="success", kw_only=True)


@dataclass(frozen=True, config=_FROZEN)
class Failure(Outcome):
    """The task was not solved, for `reason`."""

    reason: str = ""
    kind: Literal["failure"] = Field(default="failure", kw_only=True)


@dataclass(frozen=True, config=_FROZEN)
class Timeout(Outcome):
    """Time or steps ran out before the end; `partial_score` says how far it had come, where that is known."""

    partial_score: _Score | None = None
    kind: Literal["timeout"] = Field(default="timeout", kw_only=True)


@dataclass(frozen=True, config=_FROZEN)
class Unknown(Outcome):
    """Nobody said how it ended."""

    kind: Literal["unknown"] = Field(default="unknown", kw_only=True)


AnyOutcome = Annotated[Success | Failure | Timeout | Unknown, Field(discriminator="kind")]
"""The union as a field type: read from JSON by its `kind`."""


# --- messages ---------------------------------------------------------------------------------------------------------------


class Frozen(BaseModel):
    """The base of data that crosses a line: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class FunctionCall(Frozen):
    """The function a tool call names and its arguments, as the JSON text that the agent wrote."""

    name: str
    arguments: str


class ToolCall(Frozen):
    """One call. Ids may repeat within an episode: pair calls with results by order."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Frozen):
    """One turn in the OpenAI shape, kept as recorded; `content` None and "" are kept apart."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    is_demo: bool = False
    """Copied into the context as an example; never trained on."""
    author: str | None = None
    """Who produced it when the role does not say, such as `simulated_user`; only the agent's own turns are trained on."""
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Loss weight of this turn; 0 keeps it as context."""
    reasoning: str | None = None
    """What the agent thought before this turn, where that was recorded apart from its words; kept, shown to no model."""

    @property
    def is_agent(self) -> bool:
        """True when the agent itself produced this turn, so that its tokens may carry loss."""
        return self.role == "assistant" and not self.is_demo and self.author in (None, "agent")

    def to_openai(self) -> dict[str, Any]:
        """As a Chat Completions message: no keys of ours, no empty keys, `content` always there."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


# --- records ----------------------------------------------------------------------------------------------------------------


class Record(Frozen):
    """One raw event of an agent at work; never changed after it was taken in."""

    timestamp_ms: int = Field(default_factory=now_ms)
    task_id: str | None = None
    group_id: str | None = None
    worker_id: str | None = None


class ActionRecord(Record):
    """One action of a worker and what came of it."""

    kind: Literal["action"] = "action"
    action: str
    target: str | None = None
    success: bool = True
    output: str | None = None
    error: str | None = None
    duration_ms: int = Field(default=0, ge=0)
    tick: int | None = None


class ServedCall(Frozen):
    """What the router knows of a call that it passed on, beside what was said."""

    id: str
    """The receipt that the client was given."""
    choice: int = 0
    """Which one of the answers to one request."""
    alias: str = ""
    """What the client called; the record's `model` is the version that answered."""
    api: str = "chat/completions"
    finish_reason: str | None = None
    token_ids: tuple[int, ...] = ()
    """Of the answer, where the server told them."""
    log_probs: tuple[float, ...] = ()
    """Natural logarithms, of the answer's tokens in order, where the server told them."""
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    """What the request held beside messages, tools and model, such as the temperature."""


class LlmCallRecord(Record):
    """One call to a language model, with the whole request and response."""

    kind: Literal["llm_call"] = "llm_call"
    messages: tuple[Message, ...]
    response: Message
    tools: tuple[dict[str, JsonValue], ...] = ()
    model: str = ""
    latency_ms: int = Field(default=0, ge=0)
    error: str | None = None
    """Why nothing is to be learned of it: it failed, broke off, or says what a message has no place for."""
    served: ServedCall | None = None
    """None for calls that did not go through the router."""

    @model_serializer(mode="wrap")
    def _without_unsaid(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `served` where there is none: ids made from content, and hashes of what was forgotten, stay what they were."""
        said: dict[str, Any] = serialize(self)
        if self.served is None:
            said.pop("served", None)
        return said


def longest_call(calls: Sequence[LlmCallRecord]) -> LlmCallRecord | None:
    """The call with the longest history; of one that was tried again, the last try."""
    return max(reversed(calls), key=lambda call: len(call.messages), default=None)


class DependencyGraphRecord(Record):
    """A model was asked in which order actions depend on one another, and what was read from its answer."""

    kind: Literal["dependency_graph"] = "dependency_graph"
    prompt: str
    response: str
    available_actions: tuple[str, ...] = ()
    discover_order: tuple[str, ...] = ()
    """Actions that find something out, in the order to take them."""
    not_discover_order: tuple[str, ...] = ()
    """Actions that use what was found, in the order to take them."""
    model: str = ""
    latency_ms: int = Field(default=0, ge=0)
    error: str | None = None


AnyRecord = Annotated[ActionRecord | LlmCallRecord | DependencyGraphRecord, Field(discriminator="kind")]
"""The union as a field type: read from JSON by its `kind`."""


# --- episodes ---------------------------------------------------------------------------------------------------------------


class EpisodeMetadata(Frozen):
    """Where an episode came from and when it ran; times are Unix milliseconds, UTC."""

    strategy: str | None = Field(default=None, validation_alias=AliasChoices("strategy", "strategy_name"))
    scenario: str | None = Field(default=None, validation_alias=AliasChoices("scenario", "scenario_name"))
    created_at: int = Field(default_factory=now_ms)
    """When it was stored or imported."""
    started_at: int | None = None
    ended_at: int | None = None
    tags: dict[str, str] = Field(default_factory=dict)

    @property
    def duration_ms(self) -> int | None:
        """From start to end, or None when either is not known."""
        if self.started_at is None or self.ended_at is None:
            return None
        return self.ended_at - self.started_at


class Episode(Frozen):
    """One attempt at one task, with its messages and/or records and its outcome."""

    id: EpisodeId = Field(default_factory=EpisodeId.new)
    learn_model: str = Field(default=CONVERSATION, min_length=1)
    """The learn model it is for; a name, never a path."""
    task_id: str | None = None
    """Which task; attempts at one task share it, and it decides the held-out split."""
    group_id: str | None = None
    """Attempts that may be compared with one another."""
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, JsonValue], ...] = ()
    """Tool schemas as the agent was shown them, in the OpenAI shape."""
    records: tuple[AnyRecord, ...] = ()
    outcome: AnyOutcome = Field(default_factory=Unknown)
    is_open: bool = False
    """Still going on: more records may follow, so nothing is learned from it yet."""
    metadata: EpisodeMetadata = Field(default_factory=EpisodeMetadata)

    def to_dto(self) -> EpisodeDto:
        """The episode without its messages and records."""
        return EpisodeDto(
            id=self.id,
            learn_model=self.learn_model,
            task_id=self.task_id,
            group_id=self.group_id,
            outcome=self.outcome,
            metadata=self.metadata,
            n_messages=len(self.messages),
            n_records=len(self.records),
        )


class EpisodeDto(Frozen):
    """What lists show of an episode."""

    id: EpisodeId
    learn_model: str
    task_id: str | None
    group_id: str | None
    outcome: AnyOutcome
    metadata: EpisodeMetadata
    n_messages: int
    n_records: int


LICENSE_TAG = "license"
"""The tag that says under which terms an episode is. Terms are no content: the same episode under other terms is the same."""


class Label(Frozen):
    """How an episode ended, or its terms, as somebody said at some time; the newest one counts, and those before it stay readable."""

    episode_id: EpisodeId
    outcome: AnyOutcome
    at: int = Field(default_factory=now_ms)
    """When it was said, in Unix milliseconds."""
    source: str = ""
    """Who said it: `recorded` for what the episode came with, a file, a person, a judge."""
    comment: str = ""
    license: str | None = None
    """The terms that the episode is under from now on. A label that says them leaves the outcome as it is, whatever stands in `outcome`."""


RECORDED = "recorded"
"""The source of the outcome that an episode came with."""


class EpisodeFilter(Frozen):
    """Which episodes; every field that is None lets all through. `since` and `until` are Unix ms, `until` exclusive."""

    learn_model: str | None = None
    scenario: str | None = None
    outcome: Literal["success", "failure", "timeout", "unknown"] | None = None
    task_id: str | None = None
    group_id: str | None = None
    since: int | None = None
    until: int | None = None
    limit: Annotated[int, Field(ge=0)] | None = None
    offset: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="before")
    @classmethod
    def _outcome_by_type(cls, values: Any) -> Any:
        """`outcome=Success` is as good as `outcome="success"`."""
        if isinstance(values, dict) and isinstance(values.get("outcome"), type) and issubclass(values["outcome"], Outcome):
            values = {**values, "outcome": values["outcome"].__name__.lower()}
        return values

    def matches(self, episode: Episode) -> bool:
        """True when `episode` passes every field but limit and offset."""
        created = episode.metadata.created_at
        return (
            self.learn_model in (None, episode.learn_model)
            and self.scenario in (None, episode.metadata.scenario)
            and self.outcome in (None, episode.outcome.kind)
            and self.task_id in (None, episode.task_id)
            and self.group_id in (None, episode.group_id)
            and (self.since is None or created >= self.since)
            and (self.until is None or created < self.until)
        )
