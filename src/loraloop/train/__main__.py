"""`python -m loraloop.train`: the training process, usable by hand and started by `LoraTrainer`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from loraloop.base_model import tune_process
from loraloop.errors import EmptyData, LoraLoopError
from loraloop.train.arguments import TrainArguments, parse_arguments
from loraloop.train.progress import emit
from loraloop.train.stop import Stop, StopAsked
from loraloop.training_record import TrainingEvent


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the adapter is saved; 1 with one clear message on stderr when it cannot be; 128 + n when signal n ended it."""
    arguments = parse_arguments(argv)
    stop = Stop()
    try:
        with stop.listening():
            return _train(arguments, stop)
    except StopAsked:
        if not stop.is_told:  # before the first step of this process
            emit(TrainingEvent(event="stopped", step=_last_checkpoint(arguments)))
        return 128 + (stop.signal or 0)


def _last_checkpoint(arguments: TrainArguments) -> int:
    """The step of the newest checkpoint of an earlier process; 0 when there is none."""
    found = arguments.checkpoints.glob("step-*") if arguments.checkpoints is not None else ()
    return max((int(path.name.rpartition("-")[2]) for path in found), default=0)


def _train(arguments: TrainArguments, stop: Stop) -> int:
    keeps_memory = tune_process()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # meant for peft; it would stand in every error
    from loraloop.train.run import run  # torch only loads once the arguments are known to be right

    try:
        run(arguments, emit, stop=stop, keeps_memory=keeps_memory)
    except (LoraLoopError, OSError, ValueError) as error:
        if isinstance(error, EmptyData):
            emit(TrainingEvent(event="empty", message=error.message, refused=error.refused))
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
