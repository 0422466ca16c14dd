"""`loraloop train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraloop.cli.screen import DEFAULT_PROJECT, JsonOption, ProjectOption, TrainingScreen, show_next, show_table, write_line
from loraloop.errors import SettingsError
from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.training_data import METHODS

if TYPE_CHECKING:
    from loraloop.lora.model import TrainedModel

DEFAULTS = LoraTrainerConfig()
OPTIONS = TrainOptions()


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        epilog="Examples: loraloop train --base ./SmolLM2-135M-Instruct --epochs 2 --lr 1e-3\n\n"
        "loraloop train --base ./SmolLM2-135M-Instruct --method dpo --lr 5e-5 --beta 0.1"
    )(train)


def train(
    base: Annotated[str, typer.Option("--base", help="Base model: hub id, folder, or .gguf file.")] = DEFAULTS.base_model,
    project: ProjectOption = DEFAULT_PROJECT,
    dataset: Annotated[str | None, typer.Option(help="Id of the dataset, or how it begins; the newest without one.")] = None,
    method: Annotated[str | None, typer.Option(help="sft, weighted, dpo or kto; what the dataset was built for without.")] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = DEFAULTS.lora_rank,
    alpha: Annotated[float, typer.Option(help="LoRA alpha; the adapter is scaled by alpha / rank.")] = DEFAULTS.lora_alpha,
    dropout: Annotated[float, typer.Option(help="LoRA dropout.")] = DEFAULTS.lora_dropout,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = DEFAULTS.epochs,
    batch_size: Annotated[int, typer.Option(help="Rows of a micro-batch, at most.")] = DEFAULTS.batch_size,
    grad_accum: Annotated[int, typer.Option(help="Micro-batches of an optimizer step.")] = DEFAULTS.gradient_accumulation,
    lr: Annotated[float, typer.Option(help="Peak learning rate; lower it for dpo and kto, such as 5e-5.")] = DEFAULTS.learning_rate,
    beta: Annotated[float, typer.Option(help="dpo, kto: how closely the model stays to its reference, the base model.")] = OPTIONS.beta,
    loss: Annotated[str, typer.Option(help="dpo: the loss of a pair, sigmoid or ipo.")] = OPTIONS.loss,
    desirable_weight: Annotated[float, typer.Option(help="kto: of a desirable sample's loss.")] = OPTIONS.desirable_weight,
    undesirable_weight: Annotated[float, typer.Option(help="kto: of an undesirable sample's loss.")] = OPTIONS.undesirable_weight,
    max_seq_length: Annotated[int, typer.Option(help="Tokens of a row; longer samples are cut into windows.")] = DEFAULTS.max_seq_length,
    long: Annotated[str, typer.Option(help="Longer samples: window, elide (cut tool outputs) or refuse.")] = OPTIONS.long,
    max_steps: Annotated[int | None, typer.Option(help="End after this many optimizer steps.")] = None,
    seed: Annotated[int, typer.Option(help="Of adapter, order and dropout.")] = OPTIONS.seed,
    dtype: Annotated[str, typer.Option(help="Of the base weights: auto, float32 or bfloat16.")] = OPTIONS.dtype,
    engine: Annotated[
        str, typer.Option(help="tree computes tokens that samples share once; dense computes every sample.")
    ] = OPTIONS.engine,
    max_memory: Annotated[int | None, typer.Option(help="Bytes that the training process may take; 80 % of what is free without.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compute the first step with both engines; stop when they differ.")] = False,
    train_script: Annotated[Path | None, typer.Option(help="A training script of your own that keeps the contract.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA adapter on a dataset, in a child process, and record it."""
    from loraloop.project import Project

    config = LoraTrainerConfig(
        base_model=base,
        lora_rank=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation=grad_accum,
        learning_rate=lr,
        max_seq_length=max_seq_length,
        train_script=train_script,
    )
    if method is not None and method not in METHODS:
        raise SettingsError(f"--method {method}: expected {', '.join(METHODS)}")
    options = TrainOptions(
        long=long,  # type: ignore[arg-type]
        beta=beta,
        loss=loss,  # type: ignore[arg-type]
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        seed=seed,
        dtype=dtype,  # type: ignore[arg-type]
        max_steps=max_steps,
        engine=engine,  # type: ignore[arg-type]
        max_memory=max_memory,
        verify=verify,
    )
    with Project(project, create=False) as opened, TrainingScreen() as screen:
        model = opened.train(config, dataset=dataset, method=method, options=options, on_event=screen.show)
    if as_json:
        write_line(model.model_dump_json())
    else:
        _show_trained(model)
    show_next(f"loraloop models show {model.id}", project)


def _show_trained(model: TrainedModel) -> None:
    metrics = model.metrics
    before = metrics.held_out_loss_before if metrics else None
    after = metrics.held_out_loss_after if metrics else None
    held_out = f"{before:.4f} -> {after:.4f}" if before is not None and after is not None else "not measured"
    loss = f"{metrics.final_loss:.4f}" if metrics and metrics.final_loss is not None else "-"
    seconds = f"{metrics.training_time_secs:.0f} s" if metrics and metrics.training_time_secs is not None else "-"
    rows = [[str(model.id), model.method, str(model.sample_count), loss, held_out, seconds]]
    show_table("", ["model", "method", "samples", "final loss", "held-out loss", "time"], rows)
    if metrics and metrics.held_out_accuracy_before is not None and metrics.held_out_accuracy_after is not None:
        shares = f"{metrics.held_out_accuracy_before:.0%} -> {metrics.held_out_accuracy_after:.0%}"
        write_line(f"right about {shares} of what is held out, by its rewards; half is chance")
    write_line(f"the adapter is in {model.adapter_path}")
