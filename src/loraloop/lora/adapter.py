"""What a training process has left: whether it is an adapter, and the model that it is recorded as."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from pydantic import ValidationError

from loraloop.episode import EpisodeId, now_ms
from loraloop.errors import LoraTrainerError, ProcessFailed, SettingsError
from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.lora.model import LoraModelId, TrainedModel, TrainingMetrics
from loraloop.lora.registry import MODEL_FILE, LoraModelRegistry
from loraloop.lora.runs import RunPlan
from loraloop.lora.states import HISTORY_FILE
from loraloop.training_record import RECORD_FILE, TrainingRecord


def check_adapter(output: Path, log_path: Path, *, is_ours: bool) -> None:
    """A folder with something in it from a script, PEFT's two files from our own process; the model's record comes from us.

    Raises ProcessFailed when it is not.
    """
    for name in (MODEL_FILE, HISTORY_FILE):
        if (output / name).exists():
            reason = f"the training process wrote {name} into {output}; that is the name of loraloop's own record, choose another"
            raise ProcessFailed(0, "", log_path, reason)
    for pattern in ["adapter_config.json", "adapter_model.safetensors"] if is_ours else ["*"]:
        if not any(file.is_file() and file.stat().st_size for file in output.glob(pattern)):
            missing = "adapter" if pattern == "*" else pattern
            raise ProcessFailed(0, "", log_path, f"the training process ended well (exit 0) but wrote no {missing} into {output}")


def make_model(plan: RunPlan, adapter_path: Path, seconds: float | None, log_path: Path, *, base_model: str) -> TrainedModel:
    """The model that the run of `plan` has become; `seconds` is what its process took, None where its record has to tell."""
    record = _load_record(adapter_path / RECORD_FILE)
    used, sample_count = list(plan.episode_ids), plan.sample_count
    refused = Counter(plan.refused)
    metrics = TrainingMetrics(training_time_secs=None if seconds is None else round(seconds, 3))
    if record is not None:
        used, sample_count = record.used_episode_ids, record.samples_trained
        refused.update(record.data.refused)
        metrics = TrainingMetrics(
            final_loss=record.final_loss,
            training_time_secs=round(max(seconds or 0.0, record.training_time_secs), 3),
            gpu_memory_mb=record.gpu_memory_mb,
            peak_memory_mb=record.peak_memory_mb,
            n_tokens=record.data.n_tokens,
            n_supervised_tokens=record.data.n_supervised_tokens,
            held_out_loss_before=record.held_out_loss_before,
            held_out_loss_after=record.held_out_loss_after,
            held_out_accuracy_before=record.held_out_accuracy_before,
            held_out_accuracy_after=record.held_out_accuracy_after,
        )
    return TrainedModel(
        id=plan.id,
        base_model=base_model,
        adapter_path=adapter_path,
        learn_model_name=plan.learn_model,
        episode_ids=tuple(EpisodeId.parse(episode_id) for episode_id in used),
        sample_count=sample_count,
        created_at=now_ms(),
        metrics=metrics,
        base_sha256=record.base_sha256 if record else None,
        dataset=plan.dataset,
        method=plan.method,
        refused=dict(sorted(refused.items())),
        log_path=log_path,
        parent=plan.parent,
        run=plan.id,
    )


def read_shape(adapter: Path) -> tuple[int, float]:
    """(rank, alpha) of an adapter in PEFT's format. Raises LoraTrainerError when it has none."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_bytes())
        return int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        lacks = f"{adapter} has no readable adapter_config.json ({error})"
        raise LoraTrainerError(f"{lacks}; only a LoRA adapter can be continued from") from error


def find_parent(config: LoraTrainerConfig, options: TrainOptions) -> tuple[LoraModelId | None, LoraTrainerConfig]:
    """The model to continue from, unchanged since it was recorded, and the configuration with its rank and alpha.

    Raises LoraTrainerError, and SettingsError for another rank or alpha than its own.
    """
    wanted = options.continue_from
    if wanted is None:
        return None, config
    if config.train_script is not None:
        raise LoraTrainerError("continue_from is loraloop's own; a train_script is not told of it")
    registry = LoraModelRegistry(config.output_dir)
    parent = registry.get(wanted)
    if parent.adapter_sha256 is not None:
        registry.verify(parent.id)
    rank, alpha = read_shape(parent.adapter_path)
    defaults = LoraTrainerConfig()
    for name, found in (("lora_rank", rank), ("lora_alpha", alpha)):
        told = getattr(config, name)
        if told not in (found, getattr(defaults, name)):
            raise SettingsError(f"{name}={told:g}: {parent.id}, which is continued from, has {found:g}; leave it out, or give that")
    return parent.id, config.replace(lora_rank=rank, lora_alpha=alpha)


def _load_record(path: Path) -> TrainingRecord | None:
    """The training record, None when the script wrote none that we understand."""
    try:
        return TrainingRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
