"""`loraloop train`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraloop.cli.defaults import LONGER
from loraloop.cli.screen import DEFAULT_PROJECT, JsonOption, ProjectOption, TrainingScreen, err, show_next, show_table, write_line
from loraloop.errors import SettingsError
from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.training_data import METHODS

if TYPE_CHECKING:
    from loraloop.lora.model import TrainedModel
    from loraloop.lora.trainer import OnEvent
    from loraloop.project import Project
    from loraloop.training_record import TrainingEvent

DEFAULTS = LoraTrainerConfig()
OPTIONS = TrainOptions()
SETTINGS = {option: setting for setting, option in LONGER["train"].items()}
"""Options whose settings have longer names."""
_NO_SETTINGS = ("project", "resume", "force", "as_json")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        epilog="Examples: loraloop train --base ./SmolLM2-135M-Instruct --epochs 2 --lr 1e-3\n\n"
        "loraloop train --base ./SmolLM2-135M-Instruct --method dpo --lr 5e-5 --beta 0.1\n\n"
        "loraloop train --resume latest"
    )(train)


def train(
    context: typer.Context,
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
    continue_from: Annotated[str | None, typer.Option(help="Train on from the adapter of this model, or of the latest.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Minutes after which no step is begun; the adapter is saved as it is.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between measurements on what is held out.")] = None,
    early_stop: Annotated[int | None, typer.Option(help="End with the best adapter after so many without a lower loss.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; as often as takes 1 % of the time.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with a run that ended early, or the latest.")] = None,
    force: Annotated[bool, typer.Option("--force", help="With --resume: although something has changed.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait while another training uses the device.")] = False,
    report_to: Annotated[list[str] | None, typer.Option(help="Also to trackio, mlflow or tensorboard; may be repeated.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only look whether it can start, and what it takes.")] = False,
    train_script: Annotated[Path | None, typer.Option(help="A training script of your own that keeps the contract.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA adapter on a dataset, in a child process, and record it. With --json every event is a line, the last is the model.

    Ctrl-C saves a checkpoint and ends, a second one ends at once; --resume goes on to the very same adapter.
    """
    if resume is not None:
        told = {name: value for name, value in context.params.items() if _was_typed(context, name)}
        model = _resume(resume, project, told, force=force, as_json=as_json)
        _end(model, project, as_json=as_json)
        return
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
        continue_from=continue_from,
        time_limit=_seconds(time_limit),
        eval_every=eval_every,
        early_stop=early_stop,
        checkpoint_every=checkpoint_every,
        wait=wait,
        report_to=tuple(report_to or ()),
    )
    with _training(project, as_json=as_json) as (opened, hear):
        if check:
            opened.check_training(config, dataset=dataset, method=method, options=options, on_event=hear)
            return
        model = opened.train(config, dataset=dataset, method=method, options=options, on_event=hear)
    _end(model, project, as_json=as_json)


def _resume(run_id: str, project: Path, told: dict[str, Any], *, force: bool, as_json: bool) -> TrainedModel:
    from loraloop.project import Project

    changes = {SETTINGS.get(name, name): value for name, value in told.items() if name not in _NO_SETTINGS}
    if refused := sorted(set(changes) & {"dataset", "method", "train_script", "continue_from", "check"}):
        raise SettingsError(f"--{refused[0].replace('_', '-')}: what a run is made of cannot change with --resume; start a new run")
    if "time_limit" in changes:
        changes["time_limit"] = _seconds(changes["time_limit"])
    with Project(project, create=False) as opened:
        run_id = opened.runs.get(run_id).id
    with _training(project, as_json=as_json, resumed=run_id) as (opened, hear):
        return opened.resume(run_id, force=force, on_event=hear, **changes)


@contextmanager
def _training(project: Path, *, as_json: bool, resumed: str | None = None) -> Iterator[tuple[Project, OnEvent]]:
    """The project, and who shows or writes what a training tells; Ctrl-C says how to go on."""
    from loraloop.project import Project

    gone: list[OSError] = []

    def write(event: TrainingEvent) -> None:
        try:
            if not gone:
                write_line(event.model_dump_json(exclude_none=True))
                sys.stdout.flush()
        except OSError as error:  # the reader has seen enough, or its disk is full: the training goes on
            gone.append(error)

    with Project(project, create=False) as opened:
        earlier = {run.id for run in opened.runs.list_runs()}
        try:
            with nullcontext() if as_json else TrainingScreen() as screen:
                yield opened, write if screen is None else screen.show
        except (KeyboardInterrupt, SystemExit):
            begun = [run for run in opened.runs.list_runs() if run.id == resumed or run.id not in earlier]
            if begun and begun[-1].status.state in ("stopped", "interrupted"):
                status = begun[-1].status
                at = f"; a checkpoint keeps it as it was behind step {status.checkpoint}" if status.checkpoint else ""
                err().print(f"{begun[-1].id} is {status.state}{at}", markup=False)
                show_next(f"loraloop train --resume {begun[-1].id}", project)
            raise
        if gone:
            raise gone[0]


def _end(model: TrainedModel, project: Path, *, as_json: bool) -> None:
    if as_json:
        write_line(model.model_dump_json())
    else:
        _show_trained(model)
    show_next(f"loraloop models show {model.id}", project)


def _was_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _seconds(minutes: float | None) -> float | None:
    return None if minutes is None else 60 * minutes


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
