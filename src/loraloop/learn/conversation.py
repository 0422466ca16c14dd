"""ConversationLearn: learn what the agent said and did in whole conversations that ended well."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loraloop.episode import CONVERSATION, AnyRecord, Episode, LlmCallRecord, Outcome, Unknown
from loraloop.learn.outcome_rules import refusal_for_outcome, sample_weight
from loraloop.training_data import Method, Refusal, TrainingData


class ConversationLearn:
    """A whole tool-calling conversation is one sample; its agent turns carry loss, everything else is context.

    `min_score` is the least score of a Success that is learned. Timeouts are learned only with `include_timeouts`; failures and
    unknown outcomes never are.
    """

    def __init__(self, min_score: float = 0.0, *, include_timeouts: bool = False) -> None:
        self.min_score = min_score
        self.include_timeouts = include_timeouts

    @property
    def name(self) -> str:
        """`conversation`."""
        return CONVERSATION

    @property
    def objective(self) -> str:
        """One sentence for people."""
        return "Answer and call tools as in the conversations that ended well."

    @property
    def method(self) -> Method:
        """Trained by likelihood."""
        return "sft"

    def build_episodes(self, records: Iterable[AnyRecord]) -> list[Episode]:
        """One episode for each task: the last call's whole history and its response, as the longest telling of the task.

        Calls without a task id stand for themselves. How a task ended is not in its calls, so the outcome is Unknown.
        """
        last: dict[str, list[LlmCallRecord]] = {}
        for number, record in enumerate(records):
            if isinstance(record, LlmCallRecord) and record.error is None:
                last.setdefault(record.task_id or f"call {number}", []).append(record)
        return [self._episode(calls) for calls in last.values()]

    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        """Unknown: calls do not say how a task ended; a label or a verifier does."""
        del context
        return Unknown()

    def convert(self, episode: Episode) -> TrainingData | Refusal:
        """The conversation as a sample, or why not: `no_messages`, `no_agent_turn`, or a reason of the outcome rules."""
        if not episode.messages:
            return Refusal(episode_id=episode.id, reason="no_messages", detail="the episode has records only; WorkerTaskLearn reads those")
        reason = refusal_for_outcome(episode.outcome, self.min_score, include_timeouts=self.include_timeouts)
        if reason:
            return Refusal(episode_id=episode.id, reason=reason, detail=str(episode.outcome))
        own = [index for index, message in enumerate(episode.messages) if message.is_agent and message.weight > 0]
        if not own:
            return Refusal(episode_id=episode.id, reason="no_agent_turn", detail="no turn was written by the agent itself")
        if (weight := sample_weight(episode)) == 0:
            return Refusal(episode_id=episode.id, reason="weight_zero", detail="the recorder gave the episode the weight 0")
        score = getattr(episode.outcome, "score", None)
        return TrainingData(
            messages=episode.messages[: own[-1] + 1],  # what follows the last own turn cannot carry loss
            tools=episode.tools,
            weight=weight,
            episode_id=episode.id,
            split_key=split_key(episode),
            outcome_score=score,
            model=episode.metadata.tags.get("model"),
        )

    def _episode(self, calls: list[LlmCallRecord]) -> Episode:
        longest = max(reversed(calls), key=lambda call: len(call.messages))  # of a call that was tried again, the last try
        return Episode(
            learn_model=self.name,
            task_id=longest.task_id,
            group_id=longest.group_id,
            messages=(*longest.messages, longest.response),
            tools=longest.tools,
            records=tuple(calls),
            outcome=self.evaluate(calls),
        )


def split_key(episode: Episode) -> str:
    """What decides the held-out side: the task, else the first words of the user, else the episode itself."""
    if episode.task_id is not None or episode.group_id is not None:
        return f"{episode.metadata.scenario or ''}/{episode.task_id if episode.task_id is not None else episode.group_id}"
    first = next((message.content for message in episode.messages if message.role == "user" and message.content), None)
    return first or str(episode.id)
