"""Reads a training file."""

from __future__ import annotations

from pathlib import Path

from loraloop.files import read_jsonl
from loraloop.training_data import TrainingData


def read_samples(path: Path) -> list[TrainingData]:
    """The samples of a training file. Raises ValueError naming the line that cannot be read."""
    samples = []
    for number, line in enumerate(read_jsonl(path), 1):
        try:
            samples.append(TrainingData.from_line(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, sample {number}: {error}") from error
    return samples
