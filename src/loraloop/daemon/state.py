"""Where the loop of one alias stands: a note in the store's ledger, moved by one table of stages.

Each move is one transaction with its event, so that a process killed at any instant leaves the loop in one stage or in the next, never
between. What a stage does outside the store, it can do again: see stages.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from pydantic import Field, JsonValue, ValidationError

from loraloop.episode import Frozen, now_ms
from loraloop.errors import StoreError
from loraloop.store.ledger import Event, Ledger, Note

MOVED, FAILED, PAUSED, RESUMED = "loop.moved", "loop.failed", "loop.paused", "loop.resumed"
"""The kinds of the loop's events; their subject is the alias."""
PAUSE_NOTE = "loop-paused"
EVERY_ALIAS = "*"


class Stage(StrEnum):
    """What the loop does next."""

    COLLECT = "collect"
    BUILD = "build"
    TRAIN = "train"
    EVALUATE = "evaluate"
    APPLY = "apply"
    OBSERVE = "observe"
    ROLL_BACK = "roll_back"


MEANINGS = {
    Stage.COLLECT: "takes in what is new, and waits for the trigger",
    Stage.BUILD: "freezes a dataset",
    Stage.TRAIN: "trains on it, in a process of its own",
    Stage.EVALUATE: "measures the candidate against what is live, and judges it",
    Stage.APPLY: "has the alias answered by the promoted model",
    Stage.OBSERVE: "looks at the scores that the model gets where it is used",
    Stage.ROLL_BACK: "gives the alias back to the model before",
}
TRANSITIONS: dict[Stage, tuple[Stage, ...]] = {
    Stage.COLLECT: (Stage.BUILD,),
    Stage.BUILD: (Stage.TRAIN, Stage.COLLECT),
    Stage.TRAIN: (Stage.EVALUATE, Stage.TRAIN, Stage.COLLECT),
    Stage.EVALUATE: (Stage.APPLY, Stage.COLLECT),
    Stage.APPLY: (Stage.OBSERVE, Stage.COLLECT),
    Stage.OBSERVE: (Stage.ROLL_BACK, Stage.COLLECT),
    Stage.ROLL_BACK: (Stage.COLLECT,),
}
"""What may follow what. Train follows train when a run ended before its first step; collect follows what is given up."""


class LoopFailure(Frozen):
    """The last thing that went wrong."""

    stage: Stage
    message: str
    at: int
    """In Unix milliseconds."""


class LoopVerdict(Frozen):
    """What was decided about the last candidate, and why."""

    model: str
    decision: str
    """promote, hold or reject."""
    reason: str
    evaluation: str | None = None
    at: int = Field(default_factory=now_ms)


class LoopState(Frozen):
    """Where the loop stands. The ids are of the round under way, or of the last one."""

    stage: Stage = Stage.COLLECT
    round: int = 0
    """How many times the trigger has fired."""
    dataset: str | None = None
    run: str | None = None
    """The id of the training, and of the model that comes of it; written down before the training begins."""
    model: str | None = None
    live: str | None = None
    """The model that the loop applied last; None is the base model."""
    previous: str | None = None
    """What was live before it."""
    applied_at: int | None = None
    """When, in Unix milliseconds."""
    verdict: LoopVerdict | None = None
    n_episodes: int = 0
    """How many episodes of the scenario there were when the trigger fired last."""
    fired_at: int | None = None
    """When it fired last, in Unix milliseconds."""
    trigger: dict[str, JsonValue] = Field(default_factory=dict)
    """What the trigger must not forget."""
    attempts: int = 0
    """How often the stage has failed since it was entered."""
    retry_at: int | None = None
    """Not before this time, in Unix milliseconds, is the stage tried again."""
    failure: LoopFailure | None = None

    def to(self, stage: Stage, **changes: object) -> LoopState:
        """The state behind a move; failures of the stage before count no more. Raises ValueError for a move that the table lacks."""
        if stage not in TRANSITIONS[self.stage]:
            raise ValueError(f"{self.stage} is not followed by {stage}; expected {', '.join(TRANSITIONS[self.stage])}")
        return self.model_copy(update={"attempts": 0, "retry_at": None, "failure": None, **changes, "stage": stage})


class LoopNote:
    """The state of one alias in the ledger, read once and then only written by whoever read it."""

    def __init__(self, ledger: Ledger, alias: str) -> None:
        """Raises StoreError when what is kept is not the state of a loop."""
        self.ledger, self.alias = ledger, alias
        self._note = ledger.read(f"loop/{alias}")
        self.state = _parse(self._note)

    def move(self, state: LoopState, **data: JsonValue) -> None:
        """Keep `state` and say that the loop moved. Raises NoteChanged when another has moved it meanwhile."""
        told = {"from": self.state.stage, "to": state.stage, **_made_from(state), **data}
        self._write(state, Event(kind=MOVED, subject=self.alias, data=told))

    def fail(self, state: LoopState, **data: JsonValue) -> None:
        """Keep `state` and say what went wrong. Raises NoteChanged when another has moved it meanwhile."""
        self._write(state, Event(kind=FAILED, subject=self.alias, data={"stage": self.state.stage, **_made_from(state), **data}))

    def find_run(self, dataset: str) -> tuple[str, bool] | None:
        """The run that this alias has begun for `dataset` last, and whether it was trained to its end; None when there is none."""
        found: tuple[str, bool] | None = None
        for event in self.ledger.iter_events(kind=MOVED, subject=self.alias):
            run = event.data.get("run")
            if event.data.get("dataset") != dataset or not isinstance(run, str):
                continue
            if event.data["to"] == Stage.TRAIN:
                found = (run, False)
            elif event.data["to"] == Stage.EVALUATE:
                found = (run, True)
        return found

    def _write(self, state: LoopState, event: Event) -> None:
        note = self._note.model_copy(update={"data": state.model_dump(mode="json")})
        self._note, self.state = self.ledger.write(note, event), state


def read_state(ledger: Ledger, alias: str) -> LoopState:
    """Where the loop of `alias` stands; a new one has not begun. Raises StoreError when what is kept is no state."""
    return _parse(ledger.read(f"loop/{alias}"))


def pause(ledger: Ledger, alias: str = EVERY_ALIAS) -> None:
    """Let the loop of `alias`, or every loop, begin no further stage. One that is paused stays so."""
    note = ledger.read(PAUSE_NOTE)
    if alias not in note.data:
        ledger.write(note.model_copy(update={"data": {**note.data, alias: now_ms()}}), Event(kind=PAUSED, subject=alias))


def resume(ledger: Ledger, alias: str = EVERY_ALIAS) -> None:
    """Let the loop of `alias` go on; without one every loop, also those that were paused by name."""
    note = ledger.read(PAUSE_NOTE)
    left = {} if alias == EVERY_ALIAS else {name: at for name, at in note.data.items() if name != alias}
    if left != note.data:
        ledger.write(note.model_copy(update={"data": left}), Event(kind=RESUMED, subject=alias))


def paused_since(ledger: Ledger, alias: str) -> int | None:
    """When the loop of `alias` was paused, in Unix milliseconds; None when it is not."""
    found = [at for name, at in ledger.read(PAUSE_NOTE).data.items() if name in (alias, EVERY_ALIAS) and isinstance(at, int)]
    return min(found, default=None)


def iter_moves(ledger: Ledger, alias: str, *, after: int = 0) -> Iterator[Event]:
    """The moves of the loop of `alias`, oldest first."""
    return ledger.iter_events(after=after, kind=MOVED, subject=alias)


def _parse(note: Note) -> LoopState:
    try:
        return LoopState.model_validate(note.data)
    except ValidationError as error:
        raise StoreError(f"{note.name} in the store is not the state of a loop of this loraloop ({error}); update loraloop") from error


def _made_from(state: LoopState) -> dict[str, JsonValue]:
    return state.model_dump(mode="json", include={"round", "dataset", "run", "model", "live"}, exclude_none=True)
