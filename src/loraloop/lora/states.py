"""The states of a model as one table, `TRANSITIONS`, and the history of the states that a model has had.

A history only grows: one line a change in the model's folder. A model without a history is a candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import ConfigDict, Field, ValidationError

from loraloop.episode import Frozen, now_ms
from loraloop.errors import LoraTrainerError
from loraloop.files import append_jsonl, read_jsonl

HISTORY_FILE = "history.jsonl"


class ModelState(StrEnum):
    """What is thought of a model."""

    CANDIDATE = "candidate"
    PROMOTED = "promoted"
    HELD = "held"
    REJECTED = "rejected"
    RETIRED = "retired"


MEANINGS = {
    ModelState.CANDIDATE: "trained, and not judged yet",
    ModelState.PROMOTED: "better on held-out tasks: may be served; cannot be deleted",
    ModelState.HELD: "judged, and nothing is proven either way",
    ModelState.REJECTED: "no better, or worse",
    ModelState.RETIRED: "put away; serves no more",
}


@dataclass(frozen=True)
class Transition:
    """One line of the table: from `before` a model may become `state`."""

    before: ModelState
    state: ModelState
    when: str
    """For the documents."""
    only_again: bool = False
    """Only for a model that has been in `state` before."""


TRANSITIONS = (
    Transition(ModelState.CANDIDATE, ModelState.PROMOTED, "it is proven better"),
    Transition(ModelState.CANDIDATE, ModelState.HELD, "what was measured decides nothing"),
    Transition(ModelState.CANDIDATE, ModelState.REJECTED, "it is no better, or worse"),
    Transition(ModelState.HELD, ModelState.PROMOTED, "further measurements prove it better"),
    Transition(ModelState.HELD, ModelState.REJECTED, "further measurements speak against it"),
    Transition(ModelState.HELD, ModelState.RETIRED, "nobody will judge it any more"),
    Transition(ModelState.PROMOTED, ModelState.RETIRED, "another has taken its place"),
    Transition(ModelState.REJECTED, ModelState.PROMOTED, "a person puts the verdict aside, for a reason that is kept"),
    Transition(ModelState.REJECTED, ModelState.RETIRED, "it is put away"),
    Transition(ModelState.RETIRED, ModelState.PROMOTED, "a rollback; only of a model that has been promoted before", only_again=True),
)


class StateChange(Frozen):
    """One line of a history."""

    model_config = ConfigDict(populate_by_name=True)

    state: ModelState
    """What the model became."""
    before: ModelState = Field(alias="from")
    """What it was until then; `from` in the file."""
    at: int
    """When, in Unix milliseconds."""
    reason: str


def read_history(folder: Path) -> tuple[StateChange, ...]:
    """The changes of the model in `folder`, oldest first; a line that was never finished is none.

    Raises LoraTrainerError when the file is damaged otherwise.
    """
    path = folder / HISTORY_FILE
    try:
        return tuple(StateChange.model_validate(line) for line in read_jsonl(path, skip_torn=True))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        reason = f"{path}: {error}" if isinstance(error, ValidationError) else str(error)
        raise LoraTrainerError(f"the history of {folder.name} cannot be read: {reason}; put the file right or back") from error


def state_of(history: Sequence[StateChange]) -> ModelState:
    """The state at the end of `history`."""
    return history[-1].state if history else ModelState.CANDIDATE


def list_next(history: Sequence[StateChange]) -> list[ModelState]:
    """What a model with this history may become, by the table and in its order."""
    been = {change.state for change in history}
    return [step.state for step in TRANSITIONS if step.before == state_of(history) and (not step.only_again or step.state in been)]


def append_change(folder: Path, wanted: str, reason: str) -> StateChange:
    """Write down that the model in `folder` becomes `wanted`; the caller is alone with the folder.

    Raises LoraTrainerError for a name that is no state, a change that the table lacks, and a blank reason.
    """
    if wanted not in list(ModelState):
        raise LoraTrainerError(f"{wanted!r} is no state of a model; expected {_either(list(ModelState))}")
    history = read_history(folder)
    before, allowed = state_of(history), list_next(history)
    if wanted not in allowed:
        again = any(step.only_again and (step.before, step.state) == (before, wanted) for step in TRANSITIONS)
        never = f", as it has never been {wanted}" if again else ""
        onward = f"it may become {_either(allowed)}" if allowed else "it stays that"
        raise LoraTrainerError(f"{folder.name} is {before} and cannot become {wanted}{never}; {onward}")
    if not reason.strip():
        raise LoraTrainerError(f"{folder.name} becomes {wanted} for no reason; say why, it is kept in the model's history")
    kept = reason.encode("utf-8", "backslashreplace").decode()
    change = StateChange(state=ModelState(wanted), before=before, at=now_ms(), reason=kept)
    append_jsonl(folder / HISTORY_FILE, change.model_dump(mode="json", by_alias=True))
    return change


def to_markdown() -> str:
    """The states and the table as the documents show them."""
    states = [f"| `{state}` | {MEANINGS[state]} |" for state in ModelState]
    steps = [f"| `{step.before}` | `{step.state}` | {step.when} |" for step in TRANSITIONS]
    return "\n".join(["| state | is |", "|---|---|", *states, "", "| from | to | when |", "|---|---|---|", *steps])


def _either(states: Sequence[ModelState]) -> str:
    return ", ".join(states[:-1]) + (" or " if len(states) > 1 else "") + states[-1]
