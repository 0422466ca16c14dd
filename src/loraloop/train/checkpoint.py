"""Checkpoints: all that a training needs to go on to the very same adapter after it was killed.

    checkpoints/  identity.json            what the run is: data, base model, settings, versions, machine, memory plan
                  step-00000120/           one checkpoint: whole, or not there
                      state.safetensors    adapter, optimizer's moments, random generators
                      progress.json        what was done and measured so far
                      manifest.json        the hashes of the two

A checkpoint is written aside, put on the disk and renamed; then it is read again, and only when it is what was written do older ones
go, all but one. What cannot be read back is passed over for the one before it, with a warning.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loraloop.episode import Frozen
from loraloop.errors import LoraTrainerError
from loraloop.files import file_sha256, new_directory, remove_asides, write_json
from loraloop.training_record import TrainingEvent

Emit = Callable[[TrainingEvent], None]
Tensors = dict[str, torch.Tensor]

KEPT = 2
"""Checkpoints that stay, so that one can be damaged."""
FIRST_SECONDS = 10.0
SHARE_OF_TIME = 0.01
"""Of the training's time goes into checkpoints, at most, unless told to save every so many steps."""
_STATE, _PROGRESS, _MANIFEST, _IDENTITY = "state.safetensors", "progress.json", "manifest.json", "identity.json"


class Progress(Frozen):
    """What a training has done, besides its tensors."""

    step: int = 0
    losses: list[tuple[int, float]] = Field(default_factory=list)
    used: list[int] = Field(default_factory=list)
    """Indices of the units that were in a step, sorted."""
    n_logical: int = 0
    n_computed: int = 0
    seconds: float = 0.0
    """Of all processes that worked on it, up to here."""
    before: dict[str, float | None] | None = None
    """The held-out measure before the first step."""
    held_out: list[tuple[int, float]] = Field(default_factory=list)
    """(step, held-out loss) where it was measured on the way."""
    best_step: int | None = None
    ended_by: str | None = None


@dataclass(frozen=True)
class Identity:
    """What a run is; two processes of one run must agree on all but the plan, which the second takes over."""

    facts: dict[str, str | int | float | bool | None]
    """By names that a user knows: `data`, `base model`, `--lr`, `torch`, `threads`, …"""
    plan: dict[str, int] = field(default_factory=dict)
    """How much is computed at a time, which rounding follows from."""

    def differences(self, other: Identity) -> list[str]:
        """What differs from `other`, which came first: `--lr: 0.001 then, 0.0001 now`."""
        names = [*self.facts, *(name for name in other.facts if name not in self.facts)]
        pairs = ((name, other.facts.get(name), self.facts.get(name)) for name in names)
        return [f"{name}: {_short(then)} then, {_short(now)} now" for name, then, now in pairs if then != now]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, emit: Emit, every: int | None = None) -> None:
        self.folder = folder
        self.last: int | None = None
        """The step of the newest that is known to be whole."""
        self._emit = emit
        self._every = every
        self._cost = FIRST_SECONDS * SHARE_OF_TIME
        self._saved_at = time.monotonic()

    def begin(self) -> None:
        """Make room for a run's first process. Raises LoraTrainerError when there is one's already."""
        if self.folder.exists() and any(self.folder.iterdir()):
            raise LoraTrainerError(f"--checkpoints {self.folder} has those of another process; say --resume to go on with them")
        self.folder.mkdir(parents=True, exist_ok=True)

    def read_identity(self, *, force: bool) -> Identity | None:
        """What the run is; None when it was killed before it said so, or when `force` goes on although nobody can tell.

        Raises LoraTrainerError when there are checkpoints and nothing tells what of.
        """
        path = self.folder / _IDENTITY
        try:
            found = json.loads(path.read_bytes())
            return Identity(dict(found["facts"]), {str(name): int(value) for name, value in found["plan"].items()})
        except (OSError, ValueError, TypeError, KeyError) as error:
            if not self._list():
                return None
            what = f"{path} cannot be read ({error}), so nobody can tell whether this is the run that the checkpoints are of"
            if not force:
                raise LoraTrainerError(f"{what}; put it back, start a new run, or go on all the same by --force") from error
            self._warn(f"{what}; going on by --force")
            return None

    def write_identity(self, identity: Identity) -> None:
        """Say what the run is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _IDENTITY, {"facts": identity.facts, "plan": identity.plan})

    def is_due(self, step: int) -> bool:
        """Whether to save behind this step: every so many, or when so much time has passed that saving is little of it."""
        if self._every is not None:
            return step % self._every == 0
        return time.monotonic() - self._saved_at >= self._cost / SHARE_OF_TIME

    def save(self, progress: Progress, tensors: Tensors) -> bool:
        """Save, verify, and remove what is older. False, with a warning, when it could not be written: then the one before is kept."""
        if self.last == progress.step:
            return True
        started = time.monotonic()
        path = self.folder / f"step-{progress.step:08d}"
        try:
            if path.exists():  # of an earlier process, and not what it should be, or it would be `last`
                shutil.rmtree(path)
            with new_directory(path) as aside:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside / _STATE)
                write_json(aside / _PROGRESS, progress.model_dump(mode="json"))
                write_json(aside / _MANIFEST, {name: file_sha256(aside / name) for name in (_STATE, _PROGRESS)})
            self._verify(path)
        except (OSError, SafetensorError, Damaged) as error:
            self._saved_at = time.monotonic()
            kept = f"that of step {self.last} is kept" if self.last is not None else "there is none before it"
            why = getattr(error, "strerror", None) or error
            self._warn(f"the checkpoint of step {progress.step} could not be saved in {self.folder}: {why}; {kept}, the training goes on")
            return False
        self.last = progress.step
        there = self._list()
        upto = [old for old in there if old.name <= path.name]
        for gone in (*upto[:-KEPT], *there[len(upto) :]):  # those of later steps were damaged, or this one would not be taken again
            shutil.rmtree(gone, ignore_errors=True)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started
        self._emit(TrainingEvent(event="checkpoint", step=progress.step, seconds=round(self._cost, 4)))
        return True

    def load(self) -> tuple[Progress, Tensors] | None:
        """The newest that is whole; None when there is none. What a killed process has left half written is removed."""
        for left in self.folder.glob(".*.*"):
            remove_asides(self.folder / left.name[1:].rpartition(".")[0])
        for path in reversed(self._list()):
            try:
                self._verify(path)
                progress = Progress.model_validate_json((path / _PROGRESS).read_bytes())
                tensors = load_file(path / _STATE)
            except (OSError, SafetensorError, ValidationError, Damaged) as error:
                self._warn(f"the checkpoint {path.name} is damaged ({error}); going back to the one before it")
                continue
            self.last = progress.step
            return progress, tensors
        return None

    def _list(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-*"))

    def _verify(self, path: Path) -> None:
        """Raises OSError, Damaged."""
        try:
            manifest = json.loads((path / _MANIFEST).read_bytes())
            expected = {name: str(manifest[name]) for name in (_STATE, _PROGRESS)}
        except (ValueError, TypeError, KeyError) as error:
            raise Damaged(f"{_MANIFEST} is not what was written") from error
        for name, sha256 in expected.items():
            if file_sha256(path / name) != sha256:
                raise Damaged(f"{name} is not what was written")

    def _warn(self, message: str) -> None:
        self._emit(TrainingEvent(event="warning", message=message))


class Damaged(Exception):
    """A checkpoint whose files do not match its manifest."""


def pack(model: Any, optimizer: torch.optim.Optimizer, generators: Tensors, best: Tensors | None) -> Tensors:
    """All tensors of a checkpoint, by name: `adapter.…`, `optimizer.<moment>.…`, `generator.…`, `best.…`."""
    tensors: Tensors = {}
    for name, parameter in _trained(model):
        tensors[f"adapter.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value.detach()
    tensors |= {f"generator.{name}": state for name, state in generators.items()}
    return tensors | {f"best.{name}": value for name, value in (best or {}).items()}


def unpack(tensors: Tensors, model: Any, optimizer: torch.optim.Optimizer) -> Tensors | None:
    """Put a checkpoint's tensors where they came from, in place; gives the best adapter so far, if there is one.

    Raises LoraTrainerError when it is a checkpoint of another adapter.
    """
    trained = dict(_trained(model))
    saved = {name.removeprefix("adapter."): value for name, value in tensors.items() if name.startswith("adapter.")}
    if {name: value.shape for name, value in saved.items()} != {name: parameter.shape for name, parameter in trained.items()}:
        raise LoraTrainerError("the checkpoint is of an adapter with other matrices than this one; start a new run")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
            ending = f".{name}"
            moments = {key.removeprefix("optimizer.").removesuffix(ending) for key in tensors if _is_moment(key, ending)}
            optimizer.state[parameter] = {moment: _beside(parameter, tensors[f"optimizer.{moment}{ending}"]) for moment in sorted(moments)}
    set_generators({name.removeprefix("generator."): value for name, value in tensors.items() if name.startswith("generator.")})
    best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
    return best or None


def copy_adapter(model: Any) -> Tensors:
    """A copy of the adapter as it is now."""
    return {name: parameter.detach().clone() for name, parameter in _trained(model)}


def put_adapter(model: Any, adapter: Tensors) -> None:
    """Put a copy back."""
    with torch.no_grad():
        for name, parameter in _trained(model):
            parameter.copy_(adapter[name])


def generators() -> Tensors:
    """The state of torch's random generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_generators(states: Tensors) -> None:
    """Put them back."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda0" in states:
        torch.cuda.set_rng_state_all([states[f"cuda{number}"] for number in range(torch.cuda.device_count())])


def _trained(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _beside(parameter: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """On the parameter's device; the count of steps stays on the CPU, where AdamW keeps it."""
    return moment.to(parameter.device).clone() if moment.ndim else moment.clone()


def _is_moment(key: str, ending: str) -> bool:
    return key.startswith("optimizer.") and key.endswith(ending) and "." not in key.removeprefix("optimizer.").removesuffix(ending)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
