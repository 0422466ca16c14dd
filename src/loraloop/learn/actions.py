"""Actions as a conversation: each action is asked for after the result of the one before."""

from __future__ import annotations

from collections.abc import Sequence

from loraloop.episode import ActionRecord, AnyRecord, Episode, Failure, Message, Outcome, Success, Unknown
from loraloop.errors import SettingsError
from loraloop.learn.record_stream import is_done
from loraloop.learn.transcript import Transcript, carries_loss, conversation_of, refuse
from loraloop.training_data import Refusal


def actions_of(episode: Episode) -> list[ActionRecord]:
    """Its actions, in order."""
    return [record for record in episode.records if isinstance(record, ActionRecord)]


def evaluate_actions(context: Sequence[AnyRecord]) -> Outcome:
    """Success when `done` succeeded, its score the share of actions that did; Failure with the error when it failed; else Unknown."""
    actions = [record for record in context if isinstance(record, ActionRecord)]
    if not actions or not is_done(actions[-1]):
        return Unknown()
    if not actions[-1].success:
        return Failure(actions[-1].error or "the task ended without success")
    return Success(sum(action.success for action in actions) / len(actions))


def write_actions(system: str, question: str, actions: Sequence[ActionRecord]) -> Transcript:
    """`system`, `question`, and each action as an own turn with its result as the next user turn; the last result is left out."""
    messages = [Message(role="system", content=system), Message(role="user", content=question)]
    failed = set()
    for action in actions:
        if not action.success:
            failed.add(len(messages))
        messages.append(Message(role="assistant", content=f"{action.action} {action.target}" if action.target else action.action))
        messages.append(Message(role="user", content=_result(action)))
    return Transcript(tuple(messages[:-1]), failed_turns=frozenset(failed))


def conversation_with(episode: Episode, min_actions: int) -> tuple[Transcript, ...] | Refusal:
    """The conversation of an episode without records of actions, when it has `min_actions` own tool calls, or as many own turns."""
    if not episode.messages:
        return refuse(episode, "no_actions", "the episode has neither actions nor messages")
    own = [message for message in episode.messages if carries_loss(message)]
    n_actions = sum(len(message.tool_calls) for message in own) or len(own)
    if own and n_actions < min_actions:
        return too_few(episode, n_actions, min_actions)
    return conversation_of(episode)


def too_few(episode: Episode, n_actions: int, min_actions: int) -> Refusal:
    """The episode is too short to be worth learning."""
    return refuse(episode, "too_few_actions", f"{n_actions} actions, expected {min_actions} or more")


def check_min_actions(min_actions: int) -> int:
    """`min_actions`, or SettingsError."""
    if min_actions < 1:
        raise SettingsError(f"min_actions={min_actions}: expected a whole number >= 1")
    return min_actions


def _result(action: ActionRecord) -> str:
    """What the worker saw after an action."""
    if action.success:
        return action.output or "ok"
    return f"failed: {action.error or action.output or 'no reason given'}"
