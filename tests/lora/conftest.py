"""A trainer with a stand-in training script, which keeps the command-line contract and does what a test wants of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from standin import READ_ARGUMENTS, WRITE_ADAPTER, MakeTrainer

from loraloop.episode import Episode
from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.lora.trainer import LoraTrainer
from loraloop.plugins import EpisodeStore
from loraloop.store.memory import InMemoryEpisodeStore
from loraloop.testing import make_episode


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    """A trainer whose script runs the given lines after reading its arguments; one solved episode unless told otherwise."""

    def make(
        script: str | None = WRITE_ADAPTER,
        episodes: list[Episode] | EpisodeStore | None = None,
        options: TrainOptions | None = None,
        **settings: Any,
    ) -> LoraTrainer:
        if script is not None:
            path = tmp_path / "train.py"
            path.write_text(READ_ARGUMENTS + script)
            settings.setdefault("train_script", path)
        config = LoraTrainerConfig(**{"output_dir": tmp_path / "adapters", "data_dir": tmp_path / "data", **settings})
        store: EpisodeStore = InMemoryEpisodeStore()
        if episodes is None or isinstance(episodes, list):
            store.append_many([make_episode()] if episodes is None else episodes)
        else:
            store = episodes
        return LoraTrainer(config, store, options)

    return make


@pytest.fixture
def end_later() -> Iterator[list[int]]:
    """Process ids that the test's own scripts started and that are ended after it, whatever happens."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
