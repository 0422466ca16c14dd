"""Events on standard output, one JSON object a line, each written whole and at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from loraloop.training_record import TrainingEvent


def emit(event: TrainingEvent) -> None:
    """Write `event`; that it cannot be written, since the reader has gone away or a disk is full, does not stop the training."""
    line = event.model_dump_json(exclude_none=True) + "\n"
    try:
        sys.stdout.write(line)
        sys.stdout.flush()
    except OSError:
        # what was not written stays in the buffer, and would be an error again at the end
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
