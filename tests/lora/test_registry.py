"""The registry of trained models: what it lists, what it refuses, and that it never changes a model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from loraloop.episode import EpisodeId
from loraloop.errors import LoraTrainerError
from loraloop.lora.model import LoraModelId, TrainedModel, TrainingMetrics
from loraloop.lora.registry import MODEL_FILE, LoraModelRegistry


def make_model(directory: Path, **changes: Any) -> TrainedModel:
    """A model whose adapter lies in its place under `directory`."""
    model_id = changes.setdefault("id", LoraModelId.new())
    path = directory / model_id
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter.bin").write_text("weights")
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


def save_model(directory: Path, **changes: Any) -> TrainedModel:
    model = make_model(directory, **changes)
    LoraModelRegistry(directory).save(model)
    return model


def test_a_saved_model_is_read_back_the_same(tmp_path: Path) -> None:
    metrics = TrainingMetrics(final_loss=0.5, held_out_loss_before=2.0, held_out_loss_after=1.5, n_tokens=10, n_supervised_tokens=5)
    model = save_model(
        tmp_path, metrics=metrics, refused={"outcome_failure": 2}, log_path=tmp_path / "log", dataset="d", learn_model_name="../é"
    )
    assert LoraModelRegistry(tmp_path).get(model.id) == model


def test_models_are_listed_oldest_first_and_latest_is_the_last(tmp_path: Path) -> None:
    models = [save_model(tmp_path, learn_model_name=name) for name in ("a", "b", "a", "c")]
    registry = LoraModelRegistry(str(tmp_path))
    assert registry.list_models() == models
    assert registry.get("latest") == registry.find_latest() == models[3]
    assert registry.find_latest("a") == models[2]
    assert registry.find_latest("d") is None


def test_a_directory_that_is_not_there_has_no_models(tmp_path: Path) -> None:
    registry = LoraModelRegistry(tmp_path / "missing")
    assert registry.list_models() == []
    assert registry.find_latest() is None
    assert not (tmp_path / "missing").exists()


def test_only_folders_with_a_record_are_models(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    for name in (LoraModelId.new(), f"{LoraModelId.new()}.failed", f".{LoraModelId.new()}.abcdef", "other"):
        (tmp_path / name).mkdir()
        if "." in name or name == "other":
            shutil.copy(tmp_path / model.id / MODEL_FILE, tmp_path / name)
    assert LoraModelRegistry(tmp_path).list_models() == [model]


def test_an_unknown_model_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    wrong = model.id[:-1] + ("0" if model.id[-1] != "0" else "1")
    with pytest.raises(LoraTrainerError, match=rf"no model '{wrong}' in .*; known: {model.id}\. Did you mean {model.id}\?"):
        LoraModelRegistry(tmp_path).get(wrong)


@pytest.mark.parametrize("name", ["..", "../adapters", "", ".", "/etc"])
def test_a_name_never_leads_out_of_the_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / MODEL_FILE).write_text("{}")
    with pytest.raises(LoraTrainerError, match="no model"):
        LoraModelRegistry(tmp_path / "adapters").get(name)


def test_a_model_is_recorded_once(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    before = (model.adapter_path / MODEL_FILE).read_bytes()
    with pytest.raises(LoraTrainerError, match=r"is recorded already in .*; a model never changes"):
        LoraModelRegistry(tmp_path).save(model.model_copy(update={"sample_count": 99}))
    assert (model.adapter_path / MODEL_FILE).read_bytes() == before


def test_an_adapter_in_another_place_is_not_recorded(tmp_path: Path) -> None:
    model = make_model(tmp_path / "elsewhere")
    with pytest.raises(LoraTrainerError, match=r"is in .*elsewhere.*, expected"):
        LoraModelRegistry(tmp_path / "adapters").save(model)
    assert not (tmp_path / "adapters").exists()


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    (model.adapter_path / MODEL_FILE).write_text('{"id": "lora-')
    with pytest.raises(LoraTrainerError, match=re.escape(f"the record {model.adapter_path / MODEL_FILE} cannot be read")):
        LoraModelRegistry(tmp_path).get(model.id)


def test_a_registry_can_be_moved(tmp_path: Path) -> None:
    model = save_model(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert LoraModelRegistry(tmp_path / "there").get(model.id).adapter_path == tmp_path / "there" / model.id
