"""What the loop does outside the store, stage by stage, as one protocol.

Every stage may be asked for again after it was done, half done, or killed: it looks for what is there first, and gives the same answer.
"""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import Field, JsonValue

from loraloop.daemon.state import LoopState
from loraloop.episode import Frozen
from loraloop.settings import ScenarioSettings

Decision = Literal["promote", "hold", "reject"]


class Collected(Frozen):
    """What came in."""

    stored: int = 0
    """Episodes that are new."""
    refused: dict[str, int] = Field(default_factory=dict)
    """Entries that were left out, by reason."""
    details: tuple[str, ...] = ()
    """The first of these refusals in words."""

    def plus(self, more: Collected) -> Collected:
        """Both together."""
        refused = {reason: self.refused.get(reason, 0) + more.refused.get(reason, 0) for reason in sorted({*self.refused, *more.refused})}
        return Collected(stored=self.stored + more.stored, refused=refused, details=(*self.details, *more.details))


class Look(Frozen):
    """What the trigger says."""

    fire: bool
    reasons: tuple[str, ...]
    """Why, or why not, a phrase each."""
    n_episodes: int
    """How many episodes of the scenario there are."""
    next_look_at: int | None = None
    """When time alone may change the answer, in Unix milliseconds."""
    trigger: dict[str, JsonValue] = Field(default_factory=dict)
    """What the trigger must remember of having fired."""


class Judged(Frozen):
    """What was decided about a candidate."""

    decision: Decision
    reason: str
    evaluation: str | None = None
    """The id of the evaluation that it rests on."""


class Observed(Frozen):
    """What is known of a model where it is used."""

    is_worse: bool
    is_decided: bool
    """Whether further observation is of no use."""
    reason: str


class Stages(Protocol):
    """The stages of one project. Each raises what went wrong; the loop counts it and tries again."""

    def collect(self, scenario: ScenarioSettings) -> Collected:
        """Take in what is new in the scenario's sources."""
        ...

    def look(self, scenario: ScenarioSettings, state: LoopState) -> Look:
        """Whether it is time for a new round. Changes nothing."""
        ...

    def build(self, scenario: ScenarioSettings) -> str:
        """The id of a dataset of all that is there; the same episodes give the same. Raises EmptyData."""
        ...

    def is_spent(self, run: str) -> bool:
        """Whether `run` ended before its first step, so that another may be begun in its place; False when nothing is of that name."""
        ...

    def train(self, scenario: ScenarioSettings, dataset: str, run: str) -> str:
        """The id of the model that `run` makes of `dataset`: begun, gone on with, or trained already."""
        ...

    def evaluate(self, scenario: ScenarioSettings, model: str, live: str | None) -> Judged:
        """Measure `model` against `live` (None: the base model), judge it, and record that; once judged, the same again."""
        ...

    def apply(self, scenario: ScenarioSettings, model: str) -> None:
        """Have the alias answered by `model`; nothing when it is."""
        ...

    def observe(self, scenario: ScenarioSettings, state: LoopState) -> Observed:
        """What is known of the live model since it was applied."""
        ...

    def roll_back(self, scenario: ScenarioSettings, to: str | None, reason: str) -> None:
        """Have the alias answered by `to` (None: the base model) again; nothing when it is."""
        ...

    def stop(self) -> None:
        """Ask what is under way in other threads to keep how far it is and end; may be called again until it has."""
        ...
