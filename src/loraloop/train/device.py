"""The device that a training computes on, for one training of this user at a time: two would take each other's memory and cores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loraloop.errors import LeaseHeld, LoraTrainerError
from loraloop.lease import Lease, lease_directory
from loraloop.train.arguments import TrainArguments
from loraloop.train.stop import Stop
from loraloop.training_record import TrainingEvent

Emit = Callable[[TrainingEvent], None]


@contextmanager
def held_device(device: str, arguments: TrainArguments, stop: Stop, emit: Emit) -> Iterator[None]:
    """Hold `device` during the block, when it is free or, with `--wait`, when it becomes so. Raises LoraTrainerError naming who has it."""
    lease = Lease(lease_directory() / f"{device}.json")
    try:
        _acquire(lease, device, arguments, emit)
    except OSError as error:
        message = f"no lease on the {device}: {lease.path.parent} cannot be written to ({error.strerror}); another training may use it too"
        emit(TrainingEvent(event="warning", message=message))
        yield
        return
    with lease.kept(lambda _: stop.ask()):
        yield


def _acquire(lease: Lease, device: str, arguments: TrainArguments, emit: Emit) -> None:
    waits = False
    while True:
        try:
            lease.acquire(f"the training of {arguments.output.name}")
        except LeaseHeld as error:
            if not arguments.wait:
                raise LoraTrainerError(
                    f"the {device} is used by {error}, and one training at a time uses it; wait for it by --wait, or stop it with "
                    "`loraloop runs stop`"
                ) from error
            if not waits:
                emit(TrainingEvent(event="note", message=f"waiting for {error}, which uses the {device}"))
            waits = True
            time.sleep(1.0)
        else:
            return
