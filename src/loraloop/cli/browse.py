"""The nouns: episodes, datasets and models, listed and shown."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from loraloop.cli.build import show_built
from loraloop.cli.screen import DEFAULT_PROJECT, JsonOption, ProjectOption, by_reason, show_next, show_table, write_line, write_text
from loraloop.files import json_line

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The id.", show_default=False)]

episodes = typer.Typer(no_args_is_help=True, help="What was recorded.")
datasets = typer.Typer(no_args_is_help=True, help="What can be trained on.")
models = typer.Typer(no_args_is_help=True, help="What has been trained.")


def register(app: typer.Typer) -> None:
    """Add the groups to `app`."""
    for name, group in (("episodes", episodes), ("datasets", datasets), ("models", models)):
        app.add_typer(group, name=name)


@episodes.command("list", epilog="Example: loraloop episodes list --outcome success --limit 5")
def list_episodes(
    project: ProjectOption = DEFAULT_PROJECT,
    outcome: Annotated[str | None, typer.Option(help="Only those that ended so: success, failure, timeout, unknown.")] = None,
    limit: Annotated[int, typer.Option(help="How many at most.", min=0)] = 20,
    as_json: JsonOption = False,
) -> None:
    """List episodes, oldest first; one JSON object a line with --json."""
    from pydantic import ValidationError

    from loraloop.episode import EpisodeFilter
    from loraloop.errors import SettingsError
    from loraloop.project import Project

    try:
        wanted = EpisodeFilter(outcome=outcome, limit=limit)
    except ValidationError as error:
        raise SettingsError(f"--outcome {outcome}: expected success, failure, timeout or unknown") from error
    with Project(project, create=False) as opened:
        found = opened.store.list_meta(wanted)
        total = opened.store.count(wanted.model_copy(update={"limit": None}))
    if as_json:
        for dto in found:
            write_line(dto.model_dump_json())
        return
    rows = [[str(d.id), d.metadata.scenario or "-", d.task_id or "-", d.outcome.kind, str(d.n_messages), str(d.n_records)] for d in found]
    show_table(f"{len(found)} of {total} episodes", ["id", "scenario", "task", "outcome", "messages", "records"], rows)
    show_next("loraloop episodes show ID" if found else "loraloop ingest PATH", project)


@episodes.command("show", epilog="Example: loraloop episodes show ep-0000000000000-0123… --json")
def show_episode(episode_id: IdArgument, project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """Show one episode, its messages in order."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        episode = opened.store.get(episode_id)
    if as_json:
        write_line(episode.model_dump_json())
        return
    write_text(f"{episode.id}  task {episode.task_id or '-'}  {episode.outcome}")
    for message in episode.messages:
        calls = " ".join(f"{call.function.name}({call.function.arguments})" for call in message.tool_calls)
        write_text(f"[{message.role}] {message.content or ''}{' ' + calls if calls else ''}")
    for record in episode.records:
        write_text(record.model_dump_json(exclude_none=True))
    show_next("loraloop build", project)


@datasets.command("list", epilog="Example: loraloop datasets list --json")
def list_datasets(project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """List frozen datasets, oldest first; one JSON object a line with --json."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        found = opened.list_datasets()
    if as_json:
        for dataset in found:
            write_line(json_line({**dataset.manifest.model_dump(mode="json"), "path": str(dataset.path)}))
        return
    rows = [
        [d.id, d.manifest.method, str(d.manifest.samples), str(d.manifest.pairs), str(d.manifest.held_out), by_reason(d.manifest.refused)]
        for d in found
    ]
    show_table(f"{len(found)} datasets", ["id", "method", "samples", "of them pairs", "held out", "refused"], rows)
    show_next("loraloop train --base MODEL" if found else "loraloop build", project)


@datasets.command("show", epilog="Example: loraloop datasets show 4f1c…")
def show_dataset(dataset_id: IdArgument, project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """Show what one dataset holds and what became of every episode; the id may be cut short. --json is the whole manifest."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        dataset = opened.get_dataset(dataset_id)
    if as_json:
        write_line(json_line({**dataset.manifest.model_dump(mode="json"), "path": str(dataset.path)}))
    else:
        show_built(dataset)
        show_next(f"loraloop train --base MODEL --dataset {dataset.id}", project)


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
    rows = []
    for model in found:
        metrics = model.metrics
        losses = [metrics.held_out_loss_before, metrics.held_out_loss_after] if metrics else [None, None]
        shown = " -> ".join("-" if loss is None else f"{loss:.4f}" for loss in losses)
        made = datetime.fromtimestamp(model.created_at / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
        rows.append([str(model.id), model.base_model, str(model.sample_count), shown, made])
    show_table(f"{len(found)} models", ["id", "base model", "samples", "held-out loss", "made"], rows)
    show_next("loraloop models show ID" if found else "loraloop train --base MODEL", project)


@models.command("show", epilog="Example: loraloop models show latest --json")
def show_model(model_id: IdArgument, project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """Show one trained model, its lineage and metrics; `latest` is the newest."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        model = opened.get_model(model_id)
    _show_object(model.model_dump(mode="json"), as_json=as_json)
    if not as_json:
        show_next("loraloop models list", project)


def _show_object(values: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        write_line(json_line(values))
        return
    for name, value in values.items():
        if isinstance(value, dict):
            for key, part in value.items():
                write_text(f"{name}.{key}: {part}")
        elif isinstance(value, list | tuple) and len(value) > 8:
            write_text(f"{name}: {len(value)}, the first {value[0]} (all with --json)")
        else:
            write_text(f"{name}: {value}")
