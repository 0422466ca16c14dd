"""Episodes and datasets, listed and shown; where the groups of all nouns are added."""

from __future__ import annotations

from typing import Annotated

import typer

from loraloop.cli.build import show_built
from loraloop.cli.models import models
from loraloop.cli.screen import (
    DEFAULT_PROJECT,
    IdArgument,
    JsonOption,
    ProjectOption,
    by_reason,
    show_next,
    show_table,
    write_line,
    write_text,
)
from loraloop.files import json_line

episodes = typer.Typer(no_args_is_help=True, help="What was recorded.")
datasets = typer.Typer(no_args_is_help=True, help="What can be trained on.")


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
        labels = opened.store.get_labels(episode_id)
    if as_json:
        write_line(json_line({**episode.model_dump(mode="json"), "labels": [label.model_dump(mode="json") for label in labels]}))
        return
    write_text(f"{episode.id}  task {episode.task_id or '-'}  {episode.outcome}")
    for message in episode.messages:
        calls = " ".join(f"{call.function.name}({call.function.arguments})" for call in message.tool_calls)
        write_text(f"[{message.role}] {message.content or ''}{' ' + calls if calls else ''}")
    for record in episode.records:
        write_text(record.model_dump_json(exclude_none=True))
    for label in labels[1:]:
        what = label.outcome if label.license is None else f"license {label.license}"
        write_text(f"label {what}  by {label.source or '-'}  {label.comment}".rstrip())
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
