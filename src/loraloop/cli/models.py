"""Trained models: listed, shown, deleted."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from loraloop.cli.screen import (
    DEFAULT_PROJECT,
    IdArgument,
    JsonOption,
    ProjectOption,
    ask,
    err,
    show_next,
    show_table,
    write_line,
    write_text,
)
from loraloop.files import json_line

if TYPE_CHECKING:
    from loraloop.lora.model import TrainedModel

HASH_DIGITS = 12
"""How much of a hash is shown in a table."""

models = typer.Typer(no_args_is_help=True, help="What has been trained.")


@models.command("list", epilog="Example: loraloop models list --json")
def list_models(project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """List trained models, oldest first; one JSON object a line with --json."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        found = opened.list_models()
    if as_json:
        for model in found:
            write_line(model.model_dump_json())
        return
    columns = ["id", "state", "base model", "samples", "held-out loss", "parent", "adapter", "run", "made"]
    show_table(f"{len(found)} models", columns, [_row(model) for model in found])
    show_next("loraloop models show ID" if found else "loraloop train --base MODEL", project)


@models.command("show", epilog="Example: loraloop models show latest --json")
def show_model(model_id: IdArgument, project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """Show one trained model, its lineage, metrics, verdict and history; the id may be cut short, and `latest` is the newest."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        model = opened.get_model(model_id)
        history = opened.registry.get_history(model.id)
        judged = opened.find_judgement(model.id)
        alike = opened.registry.find_by_hash(model.adapter_sha256) if model.adapter_sha256 else []
    same = [str(other.id) for other in alike if other.id != model.id]
    if as_json:
        changes = [change.model_dump(mode="json", by_alias=True) for change in history]
        kept = judged.model_dump(mode="json") if judged else None
        write_line(json_line({**model.model_dump(mode="json"), "history": changes, "same_adapter": same, "judgement": kept}))
        return
    _show_fields(model.model_dump(mode="json"))
    if same:
        write_text(f"the very same adapter: {', '.join(same)}")
    for finding in judged.verdict.findings if judged else ():
        write_text(f"{finding.check}: {finding.choice}: {finding.message}")
    for change in history:
        write_text(f"{_time(change.at)}  {change.before} -> {change.state}: {change.reason}")
    show_next("loraloop models list", project)


@models.command("verify", epilog="Example: loraloop models verify latest")
def verify_model(model_id: IdArgument, project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """Hash the files of one model again: whether they are what was recorded."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        model = opened.registry.verify(model_id)
    if as_json:
        write_line(json_line({"id": model.id, "adapter_sha256": model.adapter_sha256, "verified": True}))
    else:
        write_text(f"{model.id} is what was recorded: {model.adapter_sha256}")
        show_next(f"loraloop models show {model.id}", project)


@models.command("delete", epilog="Example: loraloop models delete lora-0000000000000-0123abcd --yes")
def delete_model(
    model_id: IdArgument,
    project: ProjectOption = DEFAULT_PROJECT,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete one trained model, its adapter with it. One that is promoted, or that a model or a run goes on from, is kept."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        if not yes:
            model = opened.get_model(model_id)
            if not ask(f"Delete {model.id} ({model.state}) and its adapter for good?"):
                err().print("Nothing is deleted; where nobody can answer, say --yes.")
                raise typer.Exit(1)
            model_id = model.id
        deleted = opened.delete_model(model_id)
    if as_json:
        write_line(json_line({"id": deleted, "deleted": True}))
    else:
        write_text(f"deleted {deleted}")
        show_next("loraloop models list", project)


def _row(model: TrainedModel) -> list[str]:
    metrics = model.metrics
    losses = [metrics.held_out_loss_before, metrics.held_out_loss_after] if metrics else [None, None]
    shown = " -> ".join("-" if loss is None else f"{loss:.4f}" for loss in losses)
    adapter = (model.adapter_sha256 or "-")[:HASH_DIGITS]
    lineage = [str(model.parent or "-"), adapter, model.run or "-"]
    return [str(model.id), model.state, model.base_model, str(model.sample_count), shown, *lineage, _time(model.created_at)]


def _time(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _show_fields(values: dict[str, object]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            for key, part in value.items():
                write_text(f"{name}.{key}: {part}")
        elif isinstance(value, list | tuple) and len(value) > 8:
            write_text(f"{name}: {len(value)}, the first {value[0]} (all with --json)")
        else:
            write_text(f"{name}: {value}")
