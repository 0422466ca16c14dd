"""Hears a training process: keeps the state of its run, passes its events on, and explains its end."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from loraloop.errors import EmptyData, LoraTrainerError, ProcessFailed, TrainingStopped
from loraloop.log_file import Log
from loraloop.lora.process import open_log
from loraloop.lora.report_to import Reporter
from loraloop.lora.runs import EVENTS_FILE, Run, RunState, RunStatus
from loraloop.training_record import TrainingEvent

log = logging.getLogger("loraloop.lora")

OnEvent = Callable[[TrainingEvent], None]
SECONDS_BETWEEN_STATES = 1.0


class Listener:
    """Of one process; without a `run` it only passes on, to `on_event` and to reporters."""

    def __init__(self, run: Run | None, on_event: OnEvent | None) -> None:
        self.stopped_at: int | None = None
        """The step that a checkpoint holds, when the process ended because it was told to."""
        self._run = run
        self._on_event = on_event or (lambda event: None)
        self._reporters: Sequence[Reporter] = ()
        self._events: Log | None = None
        self._status: RunStatus | None = None
        self._told_at = 0.0
        self._empty: TrainingEvent | None = None
        self._last_step: TrainingEvent | None = None
        self._kills = count_memory_kills()

    def open(self, reporters: Sequence[Reporter] = ()) -> None:
        """The run begins, or goes on, and is held by this process."""
        self._reporters = reporters
        if self._run is not None:
            self._events = open_log(self._run.path / EVENTS_FILE)
            self._status = self._run.status

    def started(self, pid: int) -> None:
        """The process has begun."""
        if self._run is not None and self._status is not None:
            with suppress(OSError):
                self._run.lease.join(pid)
            self._status = self._status.model_copy(update={"pid": pid})
            self._tell()

    def lose(self, to: str) -> None:
        """Somebody else holds the lease of the run: two must not write its checkpoints."""
        log.warning("run lost to %s; ending its training", to)
        if self._status is not None and self._status.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._status.pid, signal.SIGTERM)

    def hear_line(self, line: str) -> None:
        """A line of its standard output: an event, or log."""
        event = _parse(line)
        if event is None:
            log.debug("child %s", line)
            return
        if self._events is not None:
            self._events.write(line.encode("utf-8", "surrogatepass") + b"\n")
        if event.event == "empty":
            self._empty = event
            return
        self._note(event)
        for reporter in self._reporters:
            reporter.hear(event)
        self._on_event(event)

    def explain(self, error: ProcessFailed) -> LoraTrainerError:
        """Why the process ended as it did."""
        if self._empty is not None:
            return EmptyData(self._empty.message or "nothing to train on", self._empty.refused)
        if self.stopped_at is not None:
            steps = self._last_step.steps if self._last_step else None
            return TrainingStopped(self._run.id if self._run else "", self.stopped_at, steps)
        if error.signal_name == "SIGKILL":
            return ProcessFailed(error.exit_code, error.stderr, error.log_path, self._describe_kill())
        return error

    def close(self, state: RunState, error: BaseException | None = None) -> None:
        """The run has ended so."""
        if self._events is not None:
            self._events.close()
        if self._run is None:
            return
        told = {"step", "steps", "loss", "tokens_per_s", "memory_mb", "checkpoint"}
        known = self._status.model_dump(include=told) if self._status is not None else {}
        with suppress(OSError):  # a full disk: whoever looks finds that nobody works on it any more
            self._run.move(state, **known, message=_reason(error))

    def _note(self, event: TrainingEvent) -> None:
        if event.event == "stopped":
            self.stopped_at = event.step or 0
        if self._status is None:
            return
        if event.event == "step":
            self._last_step = event
            told = event.model_dump(include={"step", "steps", "loss", "eta_s", "tokens_per_s", "memory_mb"})
            self._status = self._status.model_copy(update=told)
        elif event.event == "checkpoint":
            self._status = self._status.model_copy(update={"checkpoint": event.step})
        if event.event != "step" or time.monotonic() - self._told_at > SECONDS_BETWEEN_STATES or event.step == event.steps:
            self._tell()

    def _tell(self) -> None:
        if self._run is not None and self._status is not None:
            self._told_at = time.monotonic()
            with suppress(OSError):  # a full disk: the training does not depend on what is told of it
                self._run.tell(self._status)

    def _describe_kill(self) -> str:
        by = "the system ran out of memory and ended it" if count_memory_kills() > self._kills else "from outside, or for want of memory"
        told = f"ended by SIGKILL: {by}"
        memory = self._last_step.memory_mb if self._last_step else None
        if memory:
            told += f"; it had {memory:,} MB at step {self._last_step.step if self._last_step else 0}"
        told += "; if memory was the reason, give it a limit by --max-memory, a smaller max_seq_length or batch, or a smaller base model"
        return told + (f". Go on behind its last checkpoint with `loraloop train --resume {self._run.id}`" if self._run else "")


def _reason(error: BaseException | None) -> str | None:
    """One line of why a run ended; of a process that complained, its last words."""
    if isinstance(error, ProcessFailed) and not error.reason and error.signal_name is None:
        said = [line for line in error.stderr.splitlines() if line.strip()]
        return said[-1] if said else f"exit {error.exit_code}"
    lines = str(error).splitlines() if error is not None else []
    return lines[0] if lines else None


def count_memory_kills() -> int:
    """Processes of this control group that Linux ended for want of memory so far; 0 where that is not told."""
    folder = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").strip().splitlines()[-1].rpartition(":")[2]
        for place in (folder / own.lstrip("/"), folder):
            events = place / "memory.events"
            if events.exists():
                counts = dict(line.split() for line in events.read_text(encoding="utf-8").splitlines())
                return int(counts.get("oom_kill", "0"))
    return 0


def _parse(line: str) -> TrainingEvent | None:
    """None for what is no event."""
    if not line.startswith("{"):
        return None
    try:
        return TrainingEvent.model_validate(json.loads(line))
    except (ValueError, RecursionError):  # also pydantic's ValidationError: a script's own JSON
        return None
