"""What a fleet tells of itself: the answer to an order, and how it stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import Field

from loraloop.episode import Frozen
from loraloop.serve.aliases import Served
from loraloop.serve.applier import Version
from loraloop.serve.canary import ArmStatus, CanaryBounds, Trial
from loraloop.serve.loaded import Loaded, LoadedStatus
from loraloop.serve.proof import Proof
from loraloop.serve.states import ANSWERING


@dataclass(frozen=True)
class FleetSettings:
    """How patient a fleet is."""

    drain_seconds: float = 120.0
    """So long a version that is replaced may go on with what it has begun; then it is stopped all the same."""
    look_seconds: float = 1.0
    """How often every version is asked whether it answers."""
    missed_looks: int = 2
    """So many times in a row it must not answer to be taken for dead."""
    first_wait_seconds: float = 1.0
    """Before a version that died is started again; doubled with each time that it does not come up."""
    last_wait_seconds: float = 60.0
    """The longest of these waits."""
    canary: CanaryBounds = field(default_factory=CanaryBounds)


class ApplyReport(Frozen):
    """What became of an order."""

    alias: str
    kind: str
    """`apply`, `rollback`, `canary`, `promote`, `canary_rolled_back`, or `none` when it was so already."""
    version: str
    """What answers to the alias now; of a canary, the version on trial."""
    model_id: str | None
    before: str | None
    """What answered before."""
    share: float | None = None
    """Of the conversations, for a canary."""
    proof: Proof | None = None
    """None when nothing had to be shown anew."""
    seconds: float = 0.0
    """From the order to the move."""


class AliasStatus(Frozen):
    """An alias and who answers."""

    version: str | None
    model_id: str | None
    answers: bool
    problem: str | None = None
    """Why nobody answers."""
    canary: str | None = None
    share: float | None = None
    champion_arm: ArmStatus | None = None
    canary_arm: ArmStatus | None = None
    wanted: str | None = None
    """Applied while no service ran, and not taken up."""
    previous: tuple[str, ...] = ()
    """What it can be rolled back to, the last first."""
    since: int
    """When it last changed, in Unix milliseconds."""


class FleetStatus(Frozen):
    """How everything stands."""

    applier: str
    base: str
    aliases: dict[str, AliasStatus]
    versions: tuple[LoadedStatus, ...]
    problems: tuple[str, ...] = Field(default=())
    """What went wrong and was not put right yet, in words."""


def describe_alias(served: Served, live: Loaded | None, trial: Trial | None) -> AliasStatus:
    """How an alias stands: what it stands for, what answers for it, and what its trial has shown."""
    answers = live is not None and live.state in ANSWERING
    return AliasStatus(
        version=served.version.name if served.version else None,
        model_id=served.version.model_id if served.version else None,
        answers=answers,
        problem=None if answers else f"{name_of(served)} {describe(live)}",
        canary=served.canary.version.name if served.canary else None,
        share=served.canary.share if served.canary else None,
        champion_arm=trial.champion.status() if trial else None,
        canary_arm=trial.canary.status() if trial else None,
        wanted=served.wanted.name if served.wanted else None,
        previous=tuple(name_both(each) for each in served.previous),
        since=served.at,
    )


def describe(loaded: Loaded | None) -> str:
    """`is failed (it died)`."""
    if loaded is None:
        return "is not loaded"
    return f"is {loaded.state}" + (f" ({loaded.reason})" if loaded.reason else "")


def name_of(served: Served) -> str:
    """The name of the version that answers, or `nothing`."""
    return served.version.name if served.version else "nothing"


def name_both(version: Version) -> str:
    """The version's name, and its model's id where it has one."""
    return f"{version.name} ({version.model_id})" if version.model_id else version.name
