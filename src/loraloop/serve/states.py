"""The life of a version that is served, as one table: `TRANSITIONS`. A step that the table lacks is never taken."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from loraloop.errors import ServingError


class VersionState(StrEnum):
    """Where a version is between its start and its end."""

    STARTING = "starting"
    HEALTHY = "healthy"
    PROVEN = "proven"
    CANARY = "canary"
    LIVE = "live"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


MEANINGS = {
    VersionState.STARTING: "its server starts, or loads it",
    VersionState.HEALTHY: "it answers; whether it is what it says is not shown yet",
    VersionState.PROVEN: "it is shown that the adapter is applied; nobody is sent to it yet",
    VersionState.CANARY: "a share of an alias's conversations is sent to it",
    VersionState.LIVE: "it answers to an alias",
    VersionState.DRAINING: "nobody is sent to it any more; what it has begun it ends",
    VersionState.STOPPED: "it is gone, as it was meant to be",
    VersionState.FAILED: "it did not come up, was not proven, or died; the reason is kept",
}

ANSWERING = frozenset({VersionState.LIVE, VersionState.CANARY})
"""What requests are sent to."""


@dataclass(frozen=True)
class Transition:
    """One line of the table: from `before` a version may become `state`."""

    before: VersionState
    state: VersionState
    when: str
    """For the documents."""


_S = VersionState
TRANSITIONS = (
    Transition(_S.STARTING, _S.HEALTHY, "its server answers"),
    Transition(_S.STARTING, _S.FAILED, "it does not come up"),
    Transition(_S.HEALTHY, _S.PROVEN, "its log-probabilities are those of the adapter"),
    Transition(_S.HEALTHY, _S.FAILED, "they are not, or it died"),
    Transition(_S.PROVEN, _S.LIVE, "the alias was moved to it, and the disk has that"),
    Transition(_S.PROVEN, _S.CANARY, "a share was given to it, and the disk has that"),
    Transition(_S.PROVEN, _S.STOPPED, "the service ends"),
    Transition(_S.PROVEN, _S.FAILED, "it died, or the disk did not take the move"),
    Transition(_S.CANARY, _S.LIVE, "it is promoted"),
    Transition(_S.CANARY, _S.DRAINING, "it is rolled back, or another is applied"),
    Transition(_S.CANARY, _S.FAILED, "it died"),
    Transition(_S.LIVE, _S.DRAINING, "the alias was moved to another, or the service ends"),
    Transition(_S.LIVE, _S.FAILED, "it died"),
    Transition(_S.DRAINING, _S.STOPPED, "its last request has ended, or the time for that is over"),
    Transition(_S.DRAINING, _S.LIVE, "the alias was moved back to it"),
    Transition(_S.DRAINING, _S.CANARY, "it is tried again"),
    Transition(_S.DRAINING, _S.FAILED, "it died"),
    Transition(_S.STOPPED, _S.STARTING, "a rollback to it"),
    Transition(_S.FAILED, _S.STARTING, "it is tried again"),
)
_ALLOWED = {(step.before, step.state) for step in TRANSITIONS}


def check_step(name: str, before: VersionState, state: VersionState) -> None:
    """Raises ServingError when the table does not have this step."""
    if (before, state) not in _ALLOWED:
        allowed = [str(step.state) for step in TRANSITIONS if step.before == before]
        raise ServingError(f"{name} is {before} and cannot become {state}; it may become {' or '.join(allowed)}")


def to_markdown() -> str:
    """The states and the table as the documents show them."""
    states = [f"| `{state}` | {MEANINGS[state]} |" for state in VersionState]
    steps = [f"| `{step.before}` | `{step.state}` | {step.when} |" for step in TRANSITIONS]
    return "\n".join(["| state | is |", "|---|---|", *states, "", "| from | to | when |", "|---|---|---|", *steps])
