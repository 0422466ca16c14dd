"""What other processes do to a registry in the tests. Nothing heavy is imported, so that they begin quickly."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from models_made import make_model

from loraloop.errors import LoraTrainerError
from loraloop.lora.model import TrainedModel
from loraloop.lora.registry import LoraModelRegistry
from loraloop.lora.states import ModelState


def save_many(directory: Path, begin_at: float, count: int) -> list[str]:
    """Record `count` models one after another, with other processes that began at the same moment."""
    time.sleep(max(0.0, begin_at - time.time()))
    return [LoraModelRegistry(directory).save(make_model(directory)).id for _ in range(count)]


def save_the_same(directory: Path, begin_at: float, models: list[TrainedModel]) -> list[str]:
    """Try to record each of `models`; gives the ids of those that were taken."""
    time.sleep(max(0.0, begin_at - time.time()))
    taken = []
    for model in models:
        try:
            taken.append(LoraModelRegistry(directory).save(model).id)
        except LoraTrainerError as error:
            assert "is recorded already" in str(error)  # noqa: PT017  in another process
    return taken


def delete_the_same(directory: Path, begin_at: float, model_ids: list[str]) -> list[str]:
    """Try to delete each of the models; gives the ids of those that this process deleted."""
    time.sleep(max(0.0, begin_at - time.time()))
    deleted = []
    for model_id in model_ids:
        try:
            deleted.append(LoraModelRegistry(directory).delete(model_id))
        except LoraTrainerError as error:
            assert f"no model '{model_id}'" in str(error)  # noqa: PT017  in another process
    return deleted


def move_often(directory: Path, begin_at: float, worker: int, tries: int) -> int:
    """Try to give the one model random states; gives how often it was done."""
    draw, done = random.Random(worker), 0
    time.sleep(max(0.0, begin_at - time.time()))
    for _ in range(tries):
        try:
            LoraModelRegistry(directory).move("latest", draw.choice(list(ModelState)), f"worker {worker}")
        except LoraTrainerError as error:
            assert "cannot become" in str(error)  # noqa: PT017  in another process
        else:
            done += 1
    return done


def work_until_killed(directory: Path, log: Path) -> None:
    """Record, move and delete without end; the log has a line before each of them and one behind."""
    registry = LoraModelRegistry(directory)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in range(1_000_000):
        model = make_model(directory)
        _tell(handle, "begin save", model.id)
        registry.save(model)
        _tell(handle, "end save", model.id)
        for state in ("promoted", "retired"):
            _tell(handle, f"begin {state}", model.id)
            registry.move(model.id, state, "why")
            _tell(handle, f"end {state}", model.id)
        if number % 2:
            _tell(handle, "begin delete", model.id)
            registry.delete(model.id)
            _tell(handle, "end delete", model.id)


def _tell(handle: int, what: str, model_id: str) -> None:
    os.write(handle, f"{what} {model_id}\n".encode())
