"""A transcript: an episode as messages and tools, whatever its outcome; and how it becomes a sample once the outcome is judged.

What is learned (a `TranscriptLearn` says it by `transcripts`) is apart from how (its `method`): weighted, pairs and kto take the
transcripts of any learn model that has them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from loraloop.episode import AnyRecord, Episode, LlmCallRecord, Message, Outcome, longest_call
from loraloop.learn.outcome_rules import Meaning, OutcomeSettings, judge, recorded_weight, score_of
from loraloop.learn.record_stream import RecordStream
from loraloop.training_data import Method, Refusal, TrainingData


@dataclass(frozen=True)
class Transcript:
    """The messages and tools of one episode, or of one call of it."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    failed_turns: frozenset[int] = frozenset()
    """Positions of own turns whose action failed: no example to follow, yet part of what made a bad run bad."""

    def to_train(self, *, is_good: bool) -> tuple[Message, ...] | None:
        """The messages up to the last own turn that carries loss; what follows cannot. None when there is no such turn.

        Where the turns are to become likelier (`is_good`), those that failed are only context.
        """
        messages = self.messages
        if is_good and self.failed_turns:
            numbered = enumerate(messages)
            messages = tuple(turn.model_copy(update={"weight": 0.0}) if at in self.failed_turns else turn for at, turn in numbered)
        own = [at for at, turn in enumerate(messages) if carries_loss(turn)]
        return messages[: own[-1] + 1] if own else None


class TranscriptLearn(ABC):
    """What learn models share that make samples of single episodes: one of each, or one of each call where history was rewritten."""

    outcomes: OutcomeSettings
    stream: RecordStream
    """How records become its episodes."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name."""

    @property
    @abstractmethod
    def objective(self) -> str:
        """One sentence: what a model trained on it does better."""

    @property
    def method(self) -> Method:
        """Trained by likelihood, unless it says otherwise."""
        return "sft"

    @abstractmethod
    def transcripts(self, episode: Episode) -> tuple[Transcript, ...] | Refusal:
        """The episode as messages, whatever its outcome: once, or once a call where its history was rewritten."""

    def build_episodes(self, records: Iterable[AnyRecord], open_episodes: Sequence[Episode] = ()) -> list[Episode]:
        """Those of `open_episodes` that are its own, continued, then new ones in the order they first appear."""
        return self.stream.build(records, open_episodes)

    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        """How the episode made of these records ended."""
        return self.stream.evaluate(context)

    def convert(self, episode: Episode) -> TrainingData | Refusal:
        """The sample of `episode`, or why there is none; `history_rewritten` when it takes several (`convert_group` gives them)."""
        converted = self._convert(episode)
        if len(converted) == 1:
            return converted[0]
        detail = f"its calls do not continue one another, so it gives {len(converted)} samples, one a call; convert_group gives them"
        return refuse(episode, "history_rewritten", detail)

    def group_key(self, episode: Episode) -> str:
        """Each episode is converted by itself."""
        return str(episode.id)

    def convert_group(self, episodes: Sequence[Episode]) -> list[TrainingData | Refusal]:
        """The samples of each, one or one a call; or its refusal: `episode_open`, one of its outcome, or one of what is in it.

        A single sample is what `convert` gives, so a learn model made from another by a `convert` of its own is asked.
        """
        samples: list[TrainingData | Refusal] = []
        for episode in episodes:
            alone = self.convert(episode)
            is_several = isinstance(alone, Refusal) and alone.reason == "history_rewritten"
            samples += self._convert(episode) if is_several else [alone]
        return samples

    def read(self, episode: Episode) -> tuple[Meaning, tuple[Transcript, ...]] | Refusal:
        """What `episode` is to the method, and its transcripts; or why it is left out."""
        if episode.is_open:
            return refuse(episode, "episode_open", "it is still going on; nothing is learned before its end")
        meaning = judge(self.method, episode, self.outcomes)
        if isinstance(meaning, Refusal):
            return meaning
        if recorded_weight(episode) == 0:
            return refuse(episode, "weight_zero", "the recorder gave the episode the weight 0")
        transcripts = self.transcripts(episode)
        if isinstance(transcripts, Refusal):
            return transcripts
        with_own = tuple(found for found in transcripts if found.to_train(is_good=meaning.is_good))
        return (meaning, with_own) if with_own else refuse(episode, "no_agent_turn", "no turn to learn was written by the agent itself")

    def _convert(self, episode: Episode) -> list[TrainingData | Refusal]:
        found = self.read(episode)
        if isinstance(found, Refusal):
            return [found]
        meaning, transcripts = found
        return [_to_sample(self.method, episode, meaning, transcript) for transcript in transcripts]


def conversation_of(episode: Episode) -> tuple[Transcript, ...] | Refusal:
    """The messages as they are; or one transcript a call, the answer alone to be learned, when the calls do not continue one another."""
    calls = [record for record in episode.records if isinstance(record, LlmCallRecord) and record.error is None]
    if is_rewritten(calls):
        return tuple(_call_alone(call) for call in calls)
    if not episode.messages:
        return refuse(episode, "no_messages", "the episode has no messages; WorkerTaskLearn reads the records of actions")
    return (Transcript(episode.messages, episode.tools),)


def is_rewritten(calls: Sequence[LlmCallRecord]) -> bool:
    """Whether no single telling holds all of `calls`: some history is not the beginning of the longest, or an answer is not in it.

    An answer that was asked for again may be missing: the last try counts. `content` None and "" are one here: clients mix them.
    """
    longest = longest_call(calls)
    if longest is None:
        return False
    whole = [_wording(message) for message in (*longest.messages, longest.response)]
    answered = set()
    lengths = set()
    for call in calls:
        n_before = len(call.messages)
        is_same = call.messages == longest.messages[:n_before]  # nearly always, and quicker to tell
        if not is_same and [_wording(message) for message in call.messages] != whole[:n_before]:
            return True
        lengths.add(n_before)
        if whole[n_before] == _wording(call.response):
            answered.add(n_before)
    return answered != lengths


def carries_loss(message: Message) -> bool:
    """Whether the agent wrote it, to be learned."""
    return message.is_agent and message.weight > 0


def split_key(episode: Episode) -> str:
    """What decides the held-out side: the task, else the group, else the first words of the user, else the episode itself."""
    of_records = next((record.task_id for record in episode.records if record.task_id is not None), None)
    for name in (episode.task_id, episode.group_id, of_records):
        if name is not None:
            return f"{episode.metadata.scenario or ''}/{name}"
    first = next((message.content for message in episode.messages if message.role == "user" and message.content), None)
    return first or str(episode.id)


def refuse(episode: Episode, reason: str, detail: str) -> Refusal:
    """`episode` is left out."""
    return Refusal(episode_id=episode.id, reason=reason, detail=detail)


def _to_sample(method: Method, episode: Episode, meaning: Meaning, transcript: Transcript) -> TrainingData:
    return TrainingData(
        kind=method,
        messages=transcript.to_train(is_good=meaning.is_good) or (),
        tools=transcript.tools,
        weight=recorded_weight(episode) * meaning.weight,
        desirable=meaning.is_good if method == "kto" else None,
        episode_id=episode.id,
        split_key=split_key(episode),
        outcome_score=score_of(episode.outcome),
        model=episode.metadata.tags.get("model"),
    )


def _call_alone(call: LlmCallRecord) -> Transcript:
    """One call: its history is context, as each answer in it was learned with its own call."""
    context = tuple(message.model_copy(update={"weight": 0.0}) for message in call.messages)
    return Transcript((*context, call.response), call.tools)


def _wording(message: Message) -> dict[str, Any]:
    return {**message.to_openai(), "content": message.content or ""}
