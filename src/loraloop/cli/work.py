"""The verbs: ingest, build, train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraloop.cli.screen import (
    DEFAULT_PROJECT,
    JsonOption,
    ProjectOption,
    TrainingScreen,
    by_reason,
    err,
    show_next,
    show_table,
    write_line,
)
from loraloop.errors import SettingsError
from loraloop.files import json_line
from loraloop.lora.config import LoraTrainerConfig, TrainOptions

if TYPE_CHECKING:
    from loraloop.importers.ingest import IngestReport
    from loraloop.lora.model import TrainedModel

DEFAULTS = LoraTrainerConfig()
OPTIONS = TrainOptions()


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command(epilog="Example: loraloop ingest runs/ more/results.json")(ingest)
    app.command(epilog="Example: loraloop build --min-score 0.5 --held-out 0.2")(build)
    app.command(epilog="Example: loraloop train --base ./SmolLM2-135M-Instruct --epochs 2 --lr 1e-3")(train)


def ingest(
    paths: Annotated[list[Path], typer.Argument(help="Files, or directories to search for *.json and *.jsonl.", show_default=False)],
    project: ProjectOption = DEFAULT_PROJECT,
    format_name: Annotated[str | None, typer.Option("--format", help="The files' format, when it cannot be told from them.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Read recorded runs into the project's episode store. Reading a file again stores nothing twice."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

    from loraloop.project import Project

    reports: list[IngestReport] = []
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    with Project(project) as opened, Progress(*columns, console=err()) as bars:
        tasks: dict[Path, TaskID] = {}

        def on_progress(path: Path, done: int, total: int | None) -> None:
            if path not in tasks:
                tasks[path] = bars.add_task(path.name, total=total)
            bars.update(tasks[path], completed=done, total=total)

        for report in opened.ingest(paths, format_name, on_progress):
            reports.append(report)
            on_progress(Path(report.path), report.read, report.read)  # how many there were may only be known at the end
            if as_json:
                write_line(json_line(report.to_json()))
    _show_ingested(reports, as_json=as_json)
    if not any(report.stored or report.duplicates for report in reports):
        err().print("Error: nothing was stored, and nothing of it was known already", markup=False)
        raise typer.Exit(1)
    show_next("loraloop build", project)


def _show_ingested(reports: list[IngestReport], *, as_json: bool) -> None:
    for report in reports:
        for refusal in report.refusals:
            err().print(f"refused {refusal.reason}: {refusal.detail}", markup=False)
        hidden = sum(report.refused.values()) - len(report.refusals)
        if hidden > 0:
            err().print(f"… and {hidden} more in {report.path}", markup=False)
    if not as_json:
        rows = [[r.path, r.format, str(r.read), str(r.stored), str(r.duplicates), by_reason(r.refused)] for r in reports]
        show_table("", ["file", "format", "read", "stored", "already there", "refused"], rows)


def build(
    project: ProjectOption = DEFAULT_PROJECT,
    method: Annotated[str, typer.Option(help="What the data is for: sft.")] = "sft",
    learn_model: Annotated[str, typer.Option(help="How episodes become samples.")] = "conversation",
    min_score: Annotated[float, typer.Option(help="The least score of a success that is learned.")] = 0.0,
    held_out: Annotated[float, typer.Option(help="Share of the tasks kept from training, 0 or more and below 1.")] = 0.2,
    scenario: Annotated[str | None, typer.Option(help="Only episodes of this scenario.")] = None,
    outcome: Annotated[str | None, typer.Option(help="Only episodes that ended so: success, failure, timeout, unknown.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Freeze a dataset from the episodes that ended well, some tasks held out. Every episode is a sample or a counted refusal."""
    from pydantic import ValidationError

    from loraloop.episode import EpisodeFilter
    from loraloop.plugins import find
    from loraloop.project import Project

    if method != "sft":
        raise SettingsError(f"method {method!r}: expected sft")
    if not 0 <= held_out < 1:
        raise SettingsError(f"--held-out {held_out:g}: expected 0 <= share < 1")
    try:
        wanted = EpisodeFilter(scenario=scenario, outcome=outcome)
    except ValidationError as error:
        raise SettingsError(f"--outcome {outcome}: expected success, failure, timeout or unknown") from error
    model = find("learn_models", learn_model)(min_score=min_score)
    with Project(project, create=False) as opened:
        dataset = opened.build(model, episode_filter=wanted, held_out_fraction=held_out)
    manifest = dataset.manifest
    if as_json:
        keys = {"method", "episodes", "samples", "held_out", "refused", "learn_model", "tasks", "held_out_tasks"}
        write_line(json_line({"dataset": dataset.id, **manifest.model_dump(include=keys), "path": str(dataset.path)}))
    else:
        rows = [[dataset.id, str(manifest.episodes), str(manifest.samples), str(manifest.held_out), by_reason(manifest.refused)]]
        show_table("", ["dataset", "episodes", "samples to train on", "held out", "refused"], rows)
        write_line(f"{manifest.held_out_tasks} of {manifest.tasks} tasks are held out; the dataset is in {dataset.path}")
    show_next("loraloop train --base MODEL", project)


def train(
    base: Annotated[str, typer.Option("--base", help="Base model: hub id, folder, or .gguf file.")] = DEFAULTS.base_model,
    project: ProjectOption = DEFAULT_PROJECT,
    dataset: Annotated[str | None, typer.Option(help="Id of the dataset, or how it begins; the newest without one.")] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = DEFAULTS.lora_rank,
    alpha: Annotated[float, typer.Option(help="LoRA alpha; the adapter is scaled by alpha / rank.")] = DEFAULTS.lora_alpha,
    dropout: Annotated[float, typer.Option(help="LoRA dropout.")] = DEFAULTS.lora_dropout,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = DEFAULTS.epochs,
    batch_size: Annotated[int, typer.Option(help="Rows of a micro-batch, at most.")] = DEFAULTS.batch_size,
    grad_accum: Annotated[int, typer.Option(help="Micro-batches of an optimizer step.")] = DEFAULTS.gradient_accumulation,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = DEFAULTS.learning_rate,
    max_seq_length: Annotated[int, typer.Option(help="Tokens of a row; longer samples are cut into windows.")] = DEFAULTS.max_seq_length,
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
    options = TrainOptions(
        seed=seed,
        dtype=dtype,  # type: ignore[arg-type]
        max_steps=max_steps,
        engine=engine,  # type: ignore[arg-type]
        max_memory=max_memory,
        verify=verify,
    )
    with Project(project, create=False) as opened, TrainingScreen() as screen:
        model = opened.train(config, dataset=dataset, options=options, on_event=screen.show)
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
    rows = [[str(model.id), str(model.sample_count), loss, held_out, seconds]]
    show_table("", ["model", "samples", "final loss", "held-out loss", "time"], rows)
    write_line(f"the adapter is in {model.adapter_path}")
