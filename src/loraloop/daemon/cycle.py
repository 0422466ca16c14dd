"""One cycle of one alias: stage after stage, until there is something to wait for.

    collect -> (trigger) -> build -> train -> evaluate -> (gate) -> apply -> observe -> roll back, or collect

A stage that fails is counted, tried again after a pause that doubles, and given up after `max_attempts`; a rollback is never given up.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import JsonValue

from loraloop.daemon.stages import Collected, Stages
from loraloop.daemon.state import LoopFailure, LoopNote, LoopState, LoopVerdict, Stage, paused_since
from loraloop.episode import Frozen, now_ms
from loraloop.errors import EmptyData, TrainingStopped
from loraloop.lora.model import LoraModelId
from loraloop.settings import ScenarioSettings
from loraloop.store.ledger import Ledger, NoteChanged

TRACEBACK_CHARS = 8_000
"""How much of a traceback an event keeps, from its end."""


class CycleReport(Frozen):
    """What one cycle did."""

    alias: str
    stage: Stage | None = None
    """Where the loop stands now; None when the store did not say."""
    moves: tuple[str, ...] = ()
    """`from -> to` for each, in order."""
    collected: Collected = Collected()
    """What came in from the scenario's sources."""
    waits_for: str = ""
    """Why nothing follows now."""
    next_look_at: int | None = None
    """When time alone may change that, in Unix milliseconds."""
    failure: str | None = None


@dataclass(frozen=True)
class _Step:
    """What a stage came to: the next state and what its event tells besides; without a state, what is waited for."""

    state: LoopState | None
    told: dict[str, JsonValue]
    waits_for: str = ""
    next_look_at: int | None = None
    collected: Collected | None = None


@dataclass(frozen=True)
class _Cycle:
    """What the stages of a cycle are given."""

    note: LoopNote
    scenario: ScenarioSettings
    stages: Stages
    now: Callable[[], int]

    @property
    def state(self) -> LoopState:
        return self.note.state


def cycle_once(
    ledger: Ledger,
    scenario: ScenarioSettings,
    stages: Stages,
    *,
    now: Callable[[], int] = now_ms,
    is_over: Callable[[], bool] = lambda: False,
) -> CycleReport:
    """Go from where the loop of this alias stands as far as it gets, or until `is_over`; `now` gives Unix milliseconds.

    A stage's failure is in the report and in the ledger, not raised. Raises StoreError when the ledger cannot be read or written, and
    NoteChanged, a kind of it, when another process moves this loop.
    """
    cycle = _Cycle(LoopNote(ledger, scenario.alias), scenario, stages, now)
    moves: list[str] = []
    collected = Collected()

    def report(waits_for: str, next_look_at: int | None = None, failure: str | None = None) -> CycleReport:
        told = {"waits_for": waits_for, "next_look_at": next_look_at, "failure": failure, "collected": collected}
        return CycleReport.model_validate({"alias": scenario.alias, "stage": cycle.state.stage, "moves": tuple(moves), **told})

    while True:
        before = cycle.state
        if (hindered := "it was told to stop" if is_over() else _hindrance(ledger, cycle)) is not None:
            return report(hindered, before.retry_at)
        try:
            step = _STEPS[before.stage](cycle)
        except NoteChanged:
            raise
        except TrainingStopped as error:  # on request, which is no failure
            return report(str(error))
        except Exception as error:  # noqa: BLE001  whatever a stage raises is counted, and the other loops go on
            return report(f"{before.stage} failed", _fail(cycle, error), str(error))
        collected = collected.plus(step.collected) if step.collected else collected
        if step.state is None:
            return report(step.waits_for, step.next_look_at)
        cycle.note.move(step.state, **step.told)
        moves.append(f"{before.stage} -> {step.state.stage}")
        if step.state.stage is Stage.COLLECT:
            return report("this round is over")


def _hindrance(ledger: Ledger, cycle: _Cycle) -> str | None:
    """Why no stage is begun now."""
    state = cycle.state
    if paused_since(ledger, cycle.scenario.alias) is not None:
        return "it is paused"
    # a pause longer than the longest is of a clock that was set back
    if state.retry_at is not None and 0 < state.retry_at - cycle.now() <= cycle.scenario.retry_max_seconds * 1000:
        return f"{state.stage} failed {state.attempts} times and is tried again later"
    return None


def _collect(cycle: _Cycle) -> _Step:
    collected = cycle.stages.collect(cycle.scenario)
    look = cycle.stages.look(cycle.scenario, cycle.state)
    if not look.fire:
        return _Step(None, {}, "; ".join(look.reasons), look.next_look_at, collected)
    fired = {"round": cycle.state.round + 1, "n_episodes": look.n_episodes, "fired_at": cycle.now(), "trigger": look.trigger}
    state = cycle.state.to(Stage.BUILD, **fired, dataset=None, run=None, model=None)
    return _Step(state, {"reasons": list(look.reasons), "n_episodes": look.n_episodes}, collected=collected)


def _build(cycle: _Cycle) -> _Step:
    """A dataset that was trained before is not trained again; a training of it that was given up is gone on with."""
    try:
        dataset = cycle.stages.build(cycle.scenario)
    except EmptyData as error:
        return _Step(cycle.state.to(Stage.COLLECT), {"why": str(error)})
    begun = cycle.note.find_run(dataset)
    if begun is not None and begun[1]:
        return _Step(cycle.state.to(Stage.COLLECT, dataset=dataset), {"why": f"{begun[0]} was trained on this very dataset"})
    return _Step(cycle.state.to(Stage.TRAIN, dataset=dataset, run=begun[0] if begun else LoraModelId.new()), {})


def _train(cycle: _Cycle) -> _Step:
    dataset, run = _known(cycle.state.dataset), _known(cycle.state.run)
    if cycle.stages.is_spent(run):
        return _Step(
            cycle.state.model_copy(update={"run": str(LoraModelId.new()), "retry_at": None}),
            {"why": f"{run} ended before its first step"},
        )
    return _Step(cycle.state.to(Stage.EVALUATE, model=cycle.stages.train(cycle.scenario, dataset, run)), {})


def _evaluate(cycle: _Cycle) -> _Step:
    model = _known(cycle.state.model)
    judged = cycle.stages.evaluate(cycle.scenario, model, cycle.state.live)
    verdict = LoopVerdict(model=model, at=cycle.now(), **judged.model_dump())
    following = Stage.APPLY if judged.decision == "promote" else Stage.COLLECT
    return _Step(cycle.state.to(following, verdict=verdict), judged.model_dump(mode="json", exclude_none=True))


def _apply(cycle: _Cycle) -> _Step:
    """Only what the state holds a verdict `promote` for gets here."""
    state, model = cycle.state, _known(cycle.state.model)
    if state.verdict is None or state.verdict.model != model or state.verdict.decision != "promote":
        raise RuntimeError(f"{model} has no verdict that promotes it")
    cycle.stages.apply(cycle.scenario, model)
    return _Step(state.to(Stage.OBSERVE, live=model, previous=state.live, applied_at=cycle.now()), {"before": state.live})


def _observe(cycle: _Cycle) -> _Step:
    """What is new is taken in meanwhile, as it is what is observed."""
    collected = cycle.stages.collect(cycle.scenario)
    seen = cycle.stages.observe(cycle.scenario, cycle.state)
    if seen.is_worse:
        return _Step(cycle.state.to(Stage.ROLL_BACK), {"why": seen.reason}, collected=collected)
    ends_at = (cycle.state.applied_at or 0) + round(cycle.scenario.observe_seconds * 1000)
    if seen.is_decided or cycle.now() >= ends_at:
        return _Step(cycle.state.to(Stage.COLLECT), {"why": seen.reason}, collected=collected)
    return _Step(None, {}, f"it is observed: {seen.reason}", ends_at, collected)


def _roll_back(cycle: _Cycle) -> _Step:
    state = cycle.state
    why = f"live scores fell after {state.live} was applied"
    cycle.stages.roll_back(cycle.scenario, state.previous, why)
    return _Step(state.to(Stage.COLLECT, live=state.previous, previous=None, applied_at=None), {"why": why, "rolled_back": state.live})


_STEPS: dict[Stage, Callable[[_Cycle], _Step]] = {
    Stage.COLLECT: _collect,
    Stage.BUILD: _build,
    Stage.TRAIN: _train,
    Stage.EVALUATE: _evaluate,
    Stage.APPLY: _apply,
    Stage.OBSERVE: _observe,
    Stage.ROLL_BACK: _roll_back,
}


def _fail(cycle: _Cycle, error: Exception) -> int | None:
    """Count the failure and say when the stage is tried again, in Unix milliseconds; None when the round was given up."""
    state, scenario, now = cycle.state, cycle.scenario, cycle.now()
    attempts = state.attempts + 1
    seconds: float = min(scenario.retry_seconds * 2.0 ** min(attempts - 1, 30), scenario.retry_max_seconds)
    retry_at = now + round(seconds * 1000)
    failure = LoopFailure(stage=state.stage, message=str(error) or type(error).__name__, at=now)
    is_given_up = attempts >= scenario.max_attempts and state.stage not in (Stage.COLLECT, Stage.OBSERVE, Stage.ROLL_BACK)
    following = Stage.COLLECT if is_given_up else state.stage
    kept = {"stage": following, "attempts": 0 if is_given_up else attempts, "retry_at": retry_at, "failure": failure}
    lines = "".join(traceback.format_exception(error))[-TRACEBACK_CHARS:]
    told: dict[str, JsonValue] = {"error": type(error).__name__, "message": failure.message, "traceback": lines, "attempts": attempts}
    cycle.note.fail(state.model_copy(update=kept), **told, given_up=is_given_up, retry_at=retry_at)
    return retry_at


def _known(name: str | None) -> str:
    """What an earlier stage has written down."""
    if name is None:
        raise RuntimeError("the loop's note lacks what the stage before has written down; see its events")
    return name
