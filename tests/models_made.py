"""Models as a training leaves them, without a training: their files in place, ready to be recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraloop.episode import EpisodeId
from loraloop.lora.model import LoraModelId, TrainedModel
from loraloop.lora.registry import LoraModelRegistry

PEFT_ADAPTER = {"adapter_config.json": '{"r": 8}', "adapter_model.safetensors": "weights"}
OWN_ADAPTER = {"adapter.bin": "weights"}


def make_model(directory: Path, files: dict[str, str] = PEFT_ADAPTER, **changes: Any) -> TrainedModel:
    """A model whose adapter lies in its place under `directory`."""
    model_id = changes.setdefault("id", LoraModelId.new())
    path = directory / model_id
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    fields: dict[str, Any] = {
        "base_model": "base",
        "adapter_path": path,
        "learn_model_name": "conversation",
        "episode_ids": (EpisodeId.new(),),
        "sample_count": 1,
        "created_at": 1,
        **changes,
    }
    return TrainedModel(**fields)


def save_model(directory: Path, files: dict[str, str] = PEFT_ADAPTER, **changes: Any) -> TrainedModel:
    """The same, recorded."""
    return LoraModelRegistry(directory).save(make_model(directory, files, **changes))
