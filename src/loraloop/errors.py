"""Every error that loraloop raises on purpose, named by the boundary that broke.

    LoraLoopError
    ├── SettingsError (ValueError)        a value out of its range, an unknown setting or plug-in
    ├── ImportFailed (ValueError)         a file that no importer can read
    ├── StoreError                        the episode store: locked, damaged, too new, an id it does not have
    ├── DatasetError                      a dataset folder that is missing or does not match its manifest
    ├── BaseModelError                    a base model that cannot be had or used
    ├── RenderError (ValueError)          a chat template that cannot render an episode exactly
    ├── EvaluationError                   a play or a measurement that cannot go on
    ├── ServingError                      a version that cannot be served, a server that does not do what it must
    │   ├── UnknownModel                  a name that nobody answers to
    │   └── NothingServes                 nobody answers now
    ├── LeaseHeld                         another process uses what only one may: a device, a run
    └── LoraTrainerError
        ├── EmptyData                     nothing to train on, with the counts by reason
        ├── CannotStart                   all that stands in the way of a training, found before it starts
        ├── ScriptNotFound (FileNotFoundError)
        ├── TrainingStopped               it was told to stop, and can be gone on with
        └── ProcessFailed                 the training process ended badly, or left no adapter

A message says what, which value, what was expected, and what to do. All of them can be pickled.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

TAIL_LINES = 40
"""How many of the last lines of a child's stderr an error message carries; the log file has them all."""


class LoraLoopError(Exception):
    """The root: catch this to catch whatever loraloop raises on purpose."""


class SettingsError(LoraLoopError, ValueError):
    """A setting has a value outside its range, or a name that does not exist."""


class ImportFailed(LoraLoopError, ValueError):
    """A file cannot be read as episodes at all; single bad lines are refusals, not errors. `reason` is the code that it counts under."""

    def __init__(self, message: str, reason: str = "unreadable_file") -> None:
        self.reason = reason
        super().__init__(message)


class StoreError(LoraLoopError):
    """The episode store cannot do what was asked."""


class DatasetError(LoraLoopError):
    """A dataset folder is missing, incomplete, or differs from its manifest."""


class BaseModelError(LoraLoopError):
    """A base model cannot be found, read or used."""


class RenderError(LoraLoopError, ValueError):
    """A chat template cannot render messages in a way that keeps every part of them."""


class EvaluationError(LoraLoopError):
    """A play or a measurement cannot go on."""


class ServingError(LoraLoopError):
    """A version cannot be served, or a server does not do what it must."""


class UnknownModel(ServingError):
    """Nobody answers to the name of a model that was asked for."""


class NothingServes(ServingError):
    """The name is known, and nobody answers to it at the moment."""


class LeaseHeld(LoraLoopError):
    """Another process holds what only one may use at a time."""


class LoraTrainerError(LoraLoopError):
    """A training cannot start or did not end well."""


class EmptyData(LoraTrainerError):
    """Nothing is left to train on; `refused` counts the reasons."""

    def __init__(self, message: str, refused: Mapping[str, int] | None = None) -> None:
        self.message = message
        self.refused = dict(sorted((refused or {}).items()))
        super().__init__(message, self.refused)

    def __str__(self) -> str:
        counts = ", ".join(f"{reason} {count}" for reason, count in self.refused.items())
        return f"Empty data: {self.message}" + (f" (refused: {counts})" if counts else "")


class ScriptNotFound(LoraTrainerError, FileNotFoundError):
    """The training script does not exist."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        super().__init__(str(path))

    def __str__(self) -> str:
        return (
            f"Script not found: {self.path}; give the path of an existing script, or train_script=None for loraloop's own training process"
        )


class CannotStart(LoraTrainerError):
    """A training cannot start; `findings` are all reasons that there are, each with its way out."""

    def __init__(self, findings: Sequence[str]) -> None:
        self.findings = tuple(findings)
        super().__init__(self.findings)

    def __str__(self) -> str:
        listed = "".join(f"\n  {number}. {finding}" for number, finding in enumerate(self.findings, 1))
        return f"{len(self.findings)} things stand in the way of this training:{listed}"


class TrainingStopped(LoraTrainerError):
    """A training was told to stop; `step` is the last that a checkpoint holds, 0 when there is none."""

    def __init__(self, run_id: str, step: int, steps: int | None = None) -> None:
        self.run_id, self.step, self.steps = run_id, step, steps
        super().__init__(run_id, step, steps)

    def __str__(self) -> str:
        of = f" of {self.steps}" if self.steps else ""
        where = f"after step {self.step}{of}" if self.step else "before its first checkpoint"
        return f"Training {self.run_id} was stopped {where}; go on with `loraloop train --resume {self.run_id}`"


class ProcessFailed(LoraTrainerError):
    """The training process failed.

    `exit_code` is the process's own, or minus the number of the signal that ended it (then `signal_name` is set). `stderr` holds
    the last lines only; `log_path`, where there is one, holds everything.
    """

    def __init__(self, exit_code: int, stderr: str, log_path: str | Path | None = None, reason: str = "") -> None:
        self.exit_code = exit_code
        self.stderr = "\n".join(stderr.splitlines()[-TAIL_LINES:])
        self.log_path = Path(log_path) if log_path else None
        self.reason = reason
        super().__init__(exit_code, self.stderr, log_path, reason)

    @property
    def signal_name(self) -> str | None:
        """`SIGKILL` and the like when a signal ended the process, else None."""
        if self.exit_code >= 0:
            return None
        try:
            return signal.Signals(-self.exit_code).name
        except ValueError:
            return f"signal {-self.exit_code}"

    def __str__(self) -> str:
        if self.reason:
            head = f"Training failed: {self.reason}"
        elif self.signal_name:
            head = f"Training failed (ended by {self.signal_name}): {_ADVICE.get(self.signal_name, 'it was stopped from outside')}"
        else:
            head = f"Training failed (exit {self.exit_code})"
        log = f"\nThe whole output is in {self.log_path}" if self.log_path else ""
        tail = f"\n{self.stderr}" if self.stderr.strip() else "\n(nothing was written to stderr)"
        return head + tail + log


_ADVICE = {
    "SIGKILL": "often the system ran out of memory; use a smaller batch size or max_seq_length, or a smaller base model",
    "SIGSEGV": "a native library crashed; check the installed torch against constraints.txt",
}
