"""Where each loop of a project stands, and why; read, and never changed."""

from __future__ import annotations

from pathlib import Path

from loraloop.daemon.project_stages import find_files
from loraloop.daemon.stages import Stages
from loraloop.daemon.state import LoopFailure, LoopVerdict, Stage, paused_since, read_state
from loraloop.episode import Frozen
from loraloop.errors import LoraLoopError
from loraloop.lora.runs import Run, RunStatus
from loraloop.settings import ScenarioSettings
from loraloop.store.ledger import Ledger


class LoopStatus(Frozen):
    """One alias. Times are Unix milliseconds."""

    alias: str
    stage: Stage
    round: int
    live: str | None
    """The model that the loop applied last; None is the base model."""
    previous: str | None
    applied_at: int | None
    paused_at: int | None
    new_episodes: int | None
    """Since the last dataset; None when the store does not say."""
    fires: bool
    """Whether the trigger would fire now."""
    reasons: tuple[str, ...]
    """Why, or why not."""
    next_look_at: int | None
    dataset: str | None
    run: str | None
    training: RunStatus | None
    """How far the training under way is."""
    verdict: LoopVerdict | None
    attempts: int
    retry_at: int | None
    failure: LoopFailure | None
    missing_sources: tuple[str, ...]
    """Sources in which there is nothing to take in."""


def status_of(ledger: Ledger, scenario: ScenarioSettings, stages: Stages, directory: Path) -> LoopStatus:
    """Where the loop of `scenario` stands. Raises StoreError when its note cannot be read."""
    state = read_state(ledger, scenario.alias)
    try:
        look = stages.look(scenario, state)
        fires, reasons, next_look_at = look.fire, look.reasons, look.next_look_at
        new: int | None = max(0, look.n_episodes - state.n_episodes)
    except LoraLoopError as error:
        fires, reasons, next_look_at, new = False, (str(error),), None, None
    training = None
    if state.stage is Stage.TRAIN and state.run is not None and (directory / "runs" / state.run).exists():
        training = Run(directory / "runs" / state.run).status
    kept = {name: getattr(state, name) for name in ("stage", "round", "live", "previous", "applied_at", "dataset", "run", "verdict")}
    return LoopStatus(
        alias=scenario.alias,
        paused_at=paused_since(ledger, scenario.alias),
        new_episodes=new,
        fires=fires,
        reasons=reasons,
        next_look_at=next_look_at,
        training=training,
        attempts=state.attempts,
        retry_at=state.retry_at,
        failure=state.failure,
        missing_sources=tuple(source for source in scenario.sources if not find_files(directory / source)),
        **kept,
    )
