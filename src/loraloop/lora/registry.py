"""Where trained models are kept: one folder a model, its record written last.

A folder without a record is not a model: a run that was killed leaves nothing that looks finished. Nothing is ever overwritten.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from pydantic import ValidationError

from loraloop.errors import LoraTrainerError
from loraloop.files import write_atomic
from loraloop.lora.model import LoraModelId, TrainedModel

MODEL_FILE = "trained_model.json"


class LoraModelRegistry:
    """The models of one directory."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def save(self, model: TrainedModel) -> None:
        """Record `model`, whose adapter is in place. Raises LoraTrainerError when it is recorded already or its adapter is elsewhere."""
        folder = self.directory / model.id
        if model.adapter_path.resolve() != folder.resolve():
            raise LoraTrainerError(f"the adapter of {model.id} is in {model.adapter_path}, expected {folder}")
        if (folder / MODEL_FILE).exists():
            raise LoraTrainerError(f"{model.id} is recorded already in {folder}; a model never changes")
        write_atomic(folder / MODEL_FILE, model.model_dump_json(indent=2) + "\n")

    def list_models(self) -> list[TrainedModel]:
        """All models, oldest first."""
        return [self._load(file) for file in self._record_files()]

    def get(self, model_id: str) -> TrainedModel:
        """The model with this id, or `latest`. Raises LoraTrainerError naming those that there are."""
        known = [file.parent.name for file in self._record_files()]
        if model_id == "latest" and known:
            model_id = known[-1]
        if model_id not in known:
            near = difflib.get_close_matches(model_id, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            there = ", ".join(known[-5:]) or "none; train one with `loraloop train --base MODEL`"
            raise LoraTrainerError(f"no model {model_id!r} in {self.directory}; known: {there}.{hint}")
        return self._load(self.directory / model_id / MODEL_FILE)

    def find_latest(self, learn_model_name: str | None = None) -> TrainedModel | None:
        """The newest model, of one learn model when named; None when there is none."""
        models = [model for model in self.list_models() if learn_model_name in (None, model.learn_model_name)]
        return models[-1] if models else None

    def _record_files(self) -> list[Path]:
        """The records, oldest first; what a failed run left is in a folder with a dot in its name."""
        return sorted(file for file in self.directory.glob(f"{LoraModelId.prefix}-*/{MODEL_FILE}") if "." not in file.parent.name)

    def _load(self, file: Path) -> TrainedModel:
        try:
            model = TrainedModel.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise LoraTrainerError(f"the record {file} cannot be read: {error}") from error
        return model.model_copy(update={"adapter_path": file.parent})
