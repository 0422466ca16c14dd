"""What a training process tells: events while it runs, and a record beside the adapter when it has ended.

Events are JSON objects, one a line, on the process's standard output; any other line there is log. The record is
`training_record.json` in the adapter's folder: enough to trace every sample and to train the same again.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from loraloop.episode import Frozen
from loraloop.training_data import Method

RECORD_FILE = "training_record.json"


class DataReport(Frozen):
    """What the data became for the base model's template; printed before the first step."""

    samples: int
    samples_used: int
    """Those that gave at least one row to train on. A training that ends early trains fewer: see `samples_trained`."""
    rows: int
    """Sequences trained on; a sample longer than the limit becomes several."""
    n_tokens: int
    n_supervised_tokens: int
    trained_by_role: dict[str, int]
    turns: int
    """Agent turns that carry loss."""
    stops_trained: int
    calls_recorded: int
    calls_rendered: int
    refused: dict[str, int] = Field(default_factory=dict)
    tools_rendered_by: Literal["template", "fallback", "none"] = "none"
    windowed: int = 0
    """Samples that were too long and became windows."""
    elided: int = 0
    """Samples of which tool outputs were cut in the middle to make them fit."""
    characters_elided: int = 0
    prefix_broken: int = 0
    """Samples that became several rows because the template renders earlier turns otherwise once later ones are there."""
    prefix_broken_rows: int = 0
    tools_recorded: int = 0
    """Tool schemas of all rows."""
    tools_rendered: int = 0
    """Those whose name stands in the row's prompt."""
    turns_reworded: int = 0
    """Trained turns whose words the template does not show as they were recorded: trimmed, or without a thought."""
    tokens_by_author: dict[str, int] = Field(default_factory=dict)
    """Tokens of all rows by who wrote them; `template` are the chat template's own, `assistant` the agent's, trained or not."""


class TrainingEvent(Frozen):
    """One thing that happened; fields that do not apply are None."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    event: Literal["note", "warning", "data", "reference", "held_out", "step", "checkpoint", "saved", "stopped", "empty"]
    """`empty` says, before the process fails, that it has nothing to train on, and `refused` why; `stopped` that it ends because it
    was told to, and in `step` what a checkpoint holds; `reference` counts in `step` and `steps` the rows that the base model has
    measured."""
    message: str | None = None
    refused: dict[str, int] | None = None
    data: DataReport | None = None
    step: int | None = None
    steps: int | None = None
    epoch: int | None = None
    loss: float | None = None
    accuracy: float | None = None
    """dpo and kto: the share of pairs or samples that the model is right about."""
    margin: float | None = None
    """dpo and kto: how much better its reward of what is better is."""
    learning_rate: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    memory_mb: int | None = None
    """Most resident memory so far."""
    seconds: float | None = None
    """checkpoint: what saving it took."""


class RefusedSample(Frozen):
    """A sample, or one turn of it, that was left out."""

    episode_id: str | None
    reason: str
    detail: str


class TrainingRecord(Frozen):
    """Everything about one finished training."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int = 1
    base_model: str
    base_sha256: str
    base_source: str
    data_sha256: str
    held_out_sha256: str | None
    method: Method = "sft"
    settings: dict[str, str | int | float | bool | None]
    seed: int
    dtype: str
    device: str
    versions: dict[str, str]
    data: DataReport
    samples_trained: int
    """Samples of which at least one row was in an optimizer step."""
    used_episode_ids: list[str]
    """Exactly the episodes of which at least one row was in an optimizer step, in the order of the data."""
    refused: list[RefusedSample]
    steps: int
    final_loss: float | None
    """Mean loss of the last tenth of the steps."""
    held_out_loss_before: float | None
    held_out_loss_after: float | None
    held_out_accuracy_before: float | None = None
    """dpo and kto: the share of held-out pairs or samples that the model is right about; before training it
    prefers nothing, which counts as half."""
    held_out_accuracy_after: float | None = None
    held_out_rows: int
    loss_history: list[tuple[int, float]]
    """(step, loss) for every step."""
    ended_by: Literal["steps", "time_limit", "early_stop"] = "steps"
    """Why it took no further step: all were taken, the time was up, or the held-out loss did not fall any more."""
    best_step: int | None = None
    """The step whose adapter was kept, where the held-out loss decided."""
    held_out_history: list[tuple[int, float]] = Field(default_factory=list)
    """(step, held-out loss) where it was measured on the way."""
    continued_from: str | None = None
    """SHA-256 of the adapter that the training began with; None for a fresh one."""
    training_time_secs: float
    """Of all processes that worked on it."""
    peak_memory_mb: int
    gpu_memory_mb: int | None
    engine: str = "dense"
    """tree or dense."""
    n_logical_tokens: int = 0
    """Tokens of all samples of all steps."""
    n_computed_tokens: int = 0
    """Tokens computed for them; fewer where samples share."""
