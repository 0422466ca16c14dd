"""A trained model: an adapter in a folder of its own, with what it was made from and how the training went."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from loraloop.episode import EpisodeId, Frozen
from loraloop.ids import SortableId
from loraloop.lora.states import ModelState
from loraloop.training_data import Method


class LoraModelId(SortableId):
    """`lora-<unix ms>-<8 hex digits>`: unique over threads and processes, ordered by time, safe as a folder's name."""

    prefix: ClassVar[str] = "lora"


class TrainingMetrics(Frozen):
    """What the training process measured; None where it did not say."""

    final_loss: float | None = None
    """Mean loss of the last tenth of the steps."""
    training_time_secs: float | None = None
    """From the start of the training process to its end."""
    gpu_memory_mb: int | None = None
    """Most memory taken on a GPU; None without one."""
    peak_memory_mb: int | None = None
    """Most resident memory of the training process."""
    n_tokens: int | None = None
    """Tokens of one pass over the training rows."""
    n_supervised_tokens: int | None = None
    """Those of them that carry loss."""
    held_out_loss_before: float | None = None
    """The method's loss on held-out tasks, for sft the mean for each supervised token, before the first step."""
    held_out_loss_after: float | None = None
    """The same after the last step."""
    held_out_accuracy_before: float | None = None
    """dpo and kto: the share of held-out pairs or samples that the model is right about, before the first step."""
    held_out_accuracy_after: float | None = None
    """The same after the last step."""


class TrainedModel(Frozen):
    """An adapter, its lineage and its state.

    All but the state is written down once and never changes; the state comes from the model's history. Records of earlier versions
    lack what was added since.
    """

    id: LoraModelId
    base_model: str
    adapter_path: Path
    learn_model_name: str
    episode_ids: tuple[EpisodeId, ...]
    """Exactly the episodes of which at least one row was in an optimizer step; all that it was given for another training script."""
    sample_count: int
    """Samples of which at least one row was in an optimizer step; all that it was given for another training script."""
    created_at: int
    """When training had ended, in Unix milliseconds."""
    metrics: TrainingMetrics | None = None
    base_sha256: str | None = None
    """Over the base model's weights and configuration."""
    adapter_sha256: str | None = None
    """The adapter's address: what `registry.hash_adapter` gave when it was recorded."""
    adapter_files: dict[str, str] = Field(default_factory=dict)
    """The SHA-256 of every file that `adapter_sha256` is over, by name."""
    parent: LoraModelId | None = None
    """The model whose adapter the training went on from."""
    run: str | None = None
    """The id of the run that trained it."""
    state: ModelState = ModelState.CANDIDATE
    """What it is now; not part of the record."""
    method: Method = "sft"
    """How it was trained."""
    dataset: str | None = None
    """The id of the frozen dataset, when it was trained from one."""
    refused: dict[str, int] = Field(default_factory=dict)
    """Episodes and turns left out, by reason."""
    log_path: Path | None = None
    """Everything that the training process wrote."""
