"""The adapter that a training begins with: a fresh one, or one that was trained before and is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loraloop.base_model import BaseModel
from loraloop.errors import LoraTrainerError
from loraloop.files import file_sha256, hash_listing
from loraloop.train import loop
from loraloop.train.arguments import TrainArguments
from loraloop.training_record import RECORD_FILE, TrainingRecord


def start_adapter(model: Any, arguments: TrainArguments) -> Any:
    """`model` with the adapter to train. Raises LoraTrainerError when an earlier one does not fit onto it."""
    if arguments.adapter is None:
        return loop.new_adapter(model, arguments.rank, arguments.alpha, arguments.dropout, arguments.seed)
    import peft

    config = read_config(arguments.adapter)
    config.lora_dropout = arguments.dropout
    config.inference_mode = False
    try:
        return peft.PeftModel.from_pretrained(model, str(arguments.adapter), config=config, is_trainable=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise LoraTrainerError(f"--adapter {arguments.adapter} does not fit onto the base model: {error}") from error


def check_parent(arguments: TrainArguments, base: BaseModel) -> None:
    """Raises LoraTrainerError for an adapter that cannot be trained on as told: another base model, other rank or alpha, not LoRA."""
    if arguments.adapter is None:
        return
    config = read_config(arguments.adapter)
    told = {"--rank": (arguments.rank, config.r), "--alpha": (arguments.alpha, config.lora_alpha)}
    for option, (wanted, found) in told.items():
        if wanted != found:
            raise LoraTrainerError(f"{option} {wanted:g}: the adapter that is trained on has {found:g}; give {option} {found:g}")
    try:
        record = TrainingRecord.model_validate_json((arguments.adapter / RECORD_FILE).read_bytes())
    except (OSError, ValidationError):
        return  # not one of ours: what does not fit shows when it is loaded
    if record.base_sha256 != base.sha256:
        raise LoraTrainerError(
            f"--adapter {arguments.adapter} was trained on {record.base_model} (sha256 {record.base_sha256[:12]}…), and the base model "
            f"here is {base.name} (sha256 {base.sha256[:12]}…); give the base model that it was trained on"
        )


def read_config(folder: Path) -> Any:
    """PEFT's configuration of an adapter. Raises LoraTrainerError for what is no LoRA adapter."""
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoraTrainerError(f"--adapter {folder} is no adapter in PEFT's format: {error}") from error
    if not isinstance(config, peft.LoraConfig):
        raise LoraTrainerError(f"--adapter {folder} is a {type(config).__name__}, not LoRA; only LoRA adapters are trained on")
    return config


def adapter_hash(folder: Path | None) -> str | None:
    """The address of an adapter, as its record has it; None for no adapter."""
    if folder is None:
        return None
    return hash_listing({name: file_sha256(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors")})
