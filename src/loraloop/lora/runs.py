"""Trainings as they go: a folder each, which tells what it was told to do and how far it is, to any process that looks.

    runs/<id>/  run.json         what it was told; never changes
                state.json       how far it is
                events.jsonl     what the training process told, a line each
                lease.json       the processes that work on it now
                train.jsonl, held_out.jsonl, training.log, checkpoints/

The id is that of the model which comes of it. Whoever holds the lease writes; everybody may read. A run whose state is `running` and
whose lease nobody living holds was killed: it is interrupted, and can be gone on with.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from loraloop.episode import Frozen, now_ms
from loraloop.errors import LeaseHeld, LoraTrainerError
from loraloop.files import file_sha256, remove_asides, write_atomic
from loraloop.lease import Lease, read_holder, start_time
from loraloop.lora.model import LoraModelId
from loraloop.training_data import Method
from loraloop.training_record import TrainingEvent

Model = TypeVar("Model", bound=BaseModel)
RunState = Literal["running", "finished", "stopped", "failed", "interrupted"]
TRANSITIONS: dict[RunState, tuple[RunState, ...]] = {
    "running": ("finished", "stopped", "failed", "interrupted"),
    "stopped": ("running",),
    "failed": ("running",),
    "interrupted": ("running",),
    "finished": (),
}
"""What may follow what. `stopped` is on request, `failed` with an error, `interrupted` by the death of its processes."""
RUN_FILE, STATE_FILE, EVENTS_FILE, LEASE_FILE, LOG_FILE = "run.json", "state.json", "events.jsonl", "lease.json", "training.log"
SECONDS_TO_STOP = 90.0
KILLED = "its processes were killed"
SWEEP = "a sweep of runs, which is over at once"


class RunPlan(Frozen):
    """What a run was told. Enough to go on with it in another process, on another day."""

    id: LoraModelId
    created_at: int
    """In Unix milliseconds."""
    learn_model: str
    method: Method
    dataset: str | None
    config: dict[str, Any]
    """Of `LoraTrainerConfig`."""
    options: dict[str, Any]
    """Of `TrainOptions`."""
    data_sha256: str
    held_out_sha256: str | None
    sample_count: int
    episode_ids: tuple[str, ...]
    refused: dict[str, int] = Field(default_factory=dict)
    parent: LoraModelId | None = None
    """The model that it continues from."""


class RunStatus(Frozen):
    """How far a run is."""

    state: RunState
    pid: int | None = None
    """The training process, while there is one."""
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    eta_s: float | None = None
    tokens_per_s: float | None = None
    memory_mb: int | None = None
    checkpoint: int | None = None
    """The step of the last checkpoint."""
    message: str | None = None
    """Why it ended as it did."""
    updated_at: int = 0
    """In Unix milliseconds."""


class Run:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name

    @property
    def plan(self) -> RunPlan:
        """What it was told. Raises LoraTrainerError when that cannot be read."""
        return _read(self.path / RUN_FILE, RunPlan)

    @property
    def status(self) -> RunStatus:
        """How far it is; `interrupted` when it was running and its processes are gone."""
        status = self._recorded()
        newest = max((int(path.name.rpartition("-")[2]) for path in self.checkpoints.glob("step-*")), default=status.checkpoint)
        status = status.model_copy(update={"checkpoint": newest})
        if status.state != "running" or self.is_held:
            return status
        return status.model_copy(update={"state": "interrupted", "pid": None, "eta_s": None, "message": KILLED})

    @property
    def is_held(self) -> bool:
        """Whether processes work on it."""
        holder = read_holder(self.path / LEASE_FILE)
        return holder is not None and holder.is_alive

    @property
    def can_resume(self) -> bool:
        """Whether it can be gone on with: a `train_script` of the user's own cannot."""
        return self.plan.config.get("train_script") is None

    @property
    def lease(self) -> Lease:
        """To be held by whoever works on it."""
        return Lease(self.path / LEASE_FILE)

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.path / "checkpoints"

    def summary(self) -> dict[str, Any]:
        """Plan and status in one object, as `loraloop runs list --json` gives it."""
        plan, status = self.plan, self.status
        return {
            "id": self.id,
            "state": status.state,
            "step": status.step,
            "steps": status.steps,
            "model": self.id if status.state == "finished" else None,
            "pid": status.pid,
            "base_model": plan.config.get("base_model"),
            "method": plan.method,
            "learn_model": plan.learn_model,
            "dataset": plan.dataset,
            "parent": plan.parent,
            "can_resume": self.can_resume,
            "created_at": plan.created_at,
            **status.model_dump(mode="json", include={"loss", "eta_s", "tokens_per_s", "memory_mb", "checkpoint", "message", "updated_at"}),
        }

    def tell_plan(self, plan: RunPlan) -> None:
        """Write down what it is told: when it begins, and when `--force` has it go on otherwise."""
        write_atomic(self.path / RUN_FILE, plan.model_dump_json(indent=2) + "\n")

    def move(self, state: RunState, **changes: Any) -> None:
        """Put it into `state`, durably. Raises LoraTrainerError for a transition that there is not."""
        there = self.status if (self.path / STATE_FILE).exists() else None
        if there is not None and state not in TRANSITIONS[there.state]:
            allowed = ", ".join(TRANSITIONS[there.state]) or "nothing"
            raise LoraTrainerError(f"run {self.id} is {there.state}, after which comes {allowed}, not {state}")
        begun = there or RunStatus(state=state)
        update = {"pid": None, "eta_s": None, "message": None, **changes, "state": state, "updated_at": now_ms()}
        self._write(begun.model_copy(update=update), durable=True)

    def tell(self, status: RunStatus) -> None:
        """How far it is now; what a power cut takes of this, the next one tells again."""
        self._write(status.model_copy(update={"updated_at": now_ms()}), durable=False)

    def check_data(self, *, force: bool = False) -> None:
        """Raises LoraTrainerError when what it trains on is not what it was told any more; with `force` only when it is not there."""
        plan = self.plan
        for name, expected in (("train.jsonl", plan.data_sha256), ("held_out.jsonl", plan.held_out_sha256)):
            if expected is None or (force and (self.path / name).is_file()):
                continue
            try:
                found = file_sha256(self.path / name)
            except OSError as error:
                raise LoraTrainerError(f"{self.path / name} cannot be read: {error.strerror}; start a new run") from error
            if found != expected:
                message = f"{self.path / name} has changed since the run began (sha256 {expected[:12]}… then, {found[:12]}… now)"
                raise LoraTrainerError(f"{message}; put it back, or go on with what is there by --force")

    def events(self) -> Iterator[TrainingEvent]:
        """What the training process has told so far."""
        return (event for event, _ in _read_events(self.path / EVENTS_FILE, 0))

    def follow(self, every: float = 0.3) -> Iterator[TrainingEvent]:
        """What it has told and tells, until nobody works on it any more; a new one is waited for every so many seconds."""
        position = 0
        while True:
            held = self.is_held  # looked at first: what comes after it is read once more
            for event, end in _read_events(self.path / EVENTS_FILE, position):
                position = end
                yield event
            if not held:
                return
            time.sleep(every)

    def stop(self) -> RunStatus:
        """Ask it to save a checkpoint and end, and wait until it has.

        Raises LoraTrainerError when nobody works on it, or it does not end.
        """
        status = self.status
        if status.state != "running":
            raise LoraTrainerError(f"run {self.id} is {status.state}: there is nothing to stop")
        holder = read_holder(self.path / LEASE_FILE)
        known = dict(holder.processes) if holder else {}
        if status.pid is None or known.get(status.pid) is None or start_time(status.pid) != known[status.pid]:
            raise LoraTrainerError(f"run {self.id} has no training process yet, or no more; try again in a moment")
        with suppress(ProcessLookupError):
            os.kill(status.pid, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS_TO_STOP
        while self.is_held:
            if time.monotonic() > deadline:
                raise LoraTrainerError(
                    f"run {self.id} (process {status.pid}) has not ended within {SECONDS_TO_STOP:.0f} s; end it by kill -9"
                )
            time.sleep(0.1)
        return self.status

    def sweep(self) -> None:
        """Mark it as interrupted when its processes were killed, and clean up what they left half written."""
        try:
            state = self._recorded().state
            if state == "finished":
                remove_checkpoints(self)
            if state != "running" or self.is_held:
                return
            lease = self.lease
            lease.acquire(SWEEP)
        except (LeaseHeld, OSError, LoraTrainerError):  # another's by now, or a folder that cannot be written to: it is shown as it is
            return
        try:
            self.settle()
        finally:
            lease.release()

    def settle(self) -> None:
        """What `sweep` does, for whoever holds the lease: nobody else can be working on it."""
        for name in (RUN_FILE, STATE_FILE):
            remove_asides(self.path / name)
        recorded = self._recorded()
        if recorded.state == "running":
            gone = {"state": "interrupted", "pid": None, "eta_s": None, "message": KILLED, "updated_at": now_ms()}
            self._write(recorded.model_copy(update=gone), durable=True)

    def _recorded(self) -> RunStatus:
        """What its state file says; `running` when it has none yet, or one that cannot be read: who works on it tells then."""
        try:
            return _read(self.path / STATE_FILE, RunStatus)
        except LoraTrainerError:
            return RunStatus(state="running")

    def _write(self, status: RunStatus, *, durable: bool) -> None:
        write_atomic(self.path / STATE_FILE, status.model_dump_json(exclude_none=True) + "\n", durable=durable)


class RunStore:
    """The runs of one directory."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def of(self, plan: RunPlan) -> Run:
        """The run of `plan`, whose data lies in its folder already; it is listed from when its plan is told."""
        return Run(self.directory / plan.id)

    def list_runs(self) -> list[Run]:
        """All runs whose plan can be read, oldest first, after a sweep."""
        runs = [run for run in self._all() if self._trouble(run) is None]
        for run in runs:
            run.sweep()
        return runs

    def list_damaged(self) -> list[str]:
        """What is wrong with the runs whose plan cannot be read, a sentence each."""
        return [trouble for trouble in map(self._trouble, self._all()) if trouble is not None]

    def _all(self) -> list[Run]:
        return [Run(file.parent) for file in sorted(self.directory.glob(f"{LoraModelId.prefix}-*/{RUN_FILE}"))]

    def _trouble(self, run: Run) -> str | None:
        try:
            _ = run.plan
        except LoraTrainerError as error:
            return str(error)
        return None

    def get(self, run_id: str) -> Run:
        """The run whose id begins with `run_id`, or the `latest`. Raises LoraTrainerError naming those that there are."""
        runs = self.list_runs()
        if run_id == "latest" and runs:
            return runs[-1]
        found = [run for run in runs if run_id and run.id.startswith(run_id)]
        if len(found) != 1:
            known = [run.id for run in runs]
            near = difflib.get_close_matches(run_id, known, n=1)
            hint = f" Did you mean {near[0]}?" if near and not found else ""
            there = ", ".join(known[-5:]) or "none; start one with `loraloop train --base MODEL`"
            raise LoraTrainerError(f"{len(found) or 'no'} runs begin with {run_id!r} in {self.directory}; known: {there}.{hint}")
        return found[0]


async def hold(run: Run) -> Lease:
    """The lease of `run`, held; a sweep that has it just now is waited for. Raises LoraTrainerError when it is another's."""
    lease = run.lease
    for attempt in range(30):
        try:
            lease.acquire(f"run {run.id}")
        except LeaseHeld as error:
            if not str(error).startswith(SWEEP) or attempt == 29:
                raise LoraTrainerError(f"another process works on {error}; watch it by `loraloop runs watch {run.id}`") from error
            await asyncio.sleep(0.1)
        else:
            break
    return lease


def remove_checkpoints(run: Run) -> None:
    """After its model is recorded, they are of no use."""
    shutil.rmtree(run.checkpoints, ignore_errors=True)


def _read_events(path: Path, position: int) -> Iterator[tuple[TrainingEvent, int]]:
    """(event, position behind it) of every whole line from `position` on; what is no event is passed over."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(position)
        for line in file:
            if not line.endswith(b"\n"):
                return
            position += len(line)
            with suppress(ValueError, RecursionError):
                yield TrainingEvent.model_validate(json.loads(line)), position


def _read(path: Path, kind: type[Model]) -> Model:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise LoraTrainerError(f"{path} cannot be read: {error}; it is not a run of this loraloop, or it is damaged") from error
