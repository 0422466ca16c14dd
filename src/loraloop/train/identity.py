"""What a run is: everything that its adapter follows from. Two processes of one run must agree on it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version

from loraloop.errors import LoraTrainerError
from loraloop.files import file_sha256
from loraloop.train.arguments import TrainArguments
from loraloop.train.checkpoint import Identity
from loraloop.train.parent import adapter_hash
from loraloop.train.preflight import Prepared
from loraloop.training_record import TrainingEvent

Emit = Callable[[TrainingEvent], None]

PATHS = ("data", "output", "held_out", "adapter", "checkpoints")
HOW_TO_RUN = ("checkpoint_every", "resume", "force", "wait", "check")
"""What a process is told that changes nothing in what it trains."""
_NOT_COMPARED = ("model", "dtype", "max_memory", "verify", "time_limit", *PATHS, *HOW_TO_RUN)
"""What is compared otherwise, by content or as what came of it, or may change between two processes of a run."""


def identify(arguments: TrainArguments, prepared: Prepared) -> Identity:
    """What the run of `arguments` is, but for its plan."""
    import torch

    settings = {f"--{field.name.replace('_', '-')}": getattr(arguments, field.name) for field in fields(arguments)}
    facts: dict[str, str | int | float | bool | None] = {
        "data": file_sha256(arguments.data),
        "held-out data": file_sha256(arguments.held_out) if arguments.held_out else None,
        "base model": prepared.base.sha256,
        "base model's name": prepared.base.name,
        "adapter to go on from": adapter_hash(arguments.adapter),
        **{name: value for name, value in settings.items() if name[2:].replace("-", "_") not in _NOT_COMPARED},
        "device": prepared.device,
        "dtype": prepared.dtype,
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        **versions(),
    }
    return Identity(facts)


def settle(now: Identity, earlier: Identity | None, arguments: TrainArguments, emit: Emit) -> bool:
    """Whether the plan of the `earlier` process holds for this one. Raises LoraTrainerError naming what has changed, unless forced."""
    if earlier is None:
        return False
    differences = now.differences(earlier)
    if differences and not arguments.force:
        raise LoraTrainerError(
            f"the run cannot be gone on with as it was begun; {'; '.join(differences)}. Put it back as it was, start a new run, or say "
            "--force to go on all the same, to an adapter that no uninterrupted run would give"
        )
    if differences:
        emit(TrainingEvent(event="warning", message=f"going on by --force although there are changes: {'; '.join(differences)}"))
    return not arguments.force


def versions() -> dict[str, str]:
    """Of the libraries that the numbers follow from."""
    names = ("loraloop", "torch", "transformers", "peft", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
