"""Events on standard output, one JSON object a line, each written whole and at once."""

from __future__ import annotations

import sys

from loraloop.training_record import TrainingEvent


def emit(event: TrainingEvent) -> None:
    """Write `event`; a parent that has gone away does not stop the training."""
    try:
        sys.stdout.write(event.model_dump_json(exclude_none=True) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        return
