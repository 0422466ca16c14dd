"""`loraloop export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from loraloop.cli.screen import DEFAULT_PROJECT, ProjectOption, by_reason, err
from loraloop.errors import SettingsError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: loraloop export --outcome success --output good.jsonl")(export)


def export(
    project: ProjectOption = DEFAULT_PROJECT,
    format_name: Annotated[str, typer.Option("--format", help="openai: chat lines; atif: trajectories, one a line.")] = "openai",
    output: Annotated[Path | None, typer.Option(help="The file to write; standard output without it.")] = None,
    outcome: Annotated[str | None, typer.Option(help="Only those that ended so: success, failure, timeout, unknown.")] = None,
    scenario: Annotated[str | None, typer.Option(help="Only episodes of this scenario.")] = None,
    task: Annotated[str | None, typer.Option(help="Only attempts at this task.")] = None,
    limit: Annotated[int | None, typer.Option(help="How many at most.", min=0)] = None,
) -> None:
    """Write episodes for other programs, oldest first. What is written can be taken in again, and gives the same episodes."""
    from pydantic import ValidationError

    from loraloop.episode import EpisodeFilter
    from loraloop.project import Project

    try:
        wanted = EpisodeFilter.model_validate({"outcome": outcome, "scenario": scenario, "task_id": task, "limit": limit})
    except ValidationError as error:
        raise SettingsError(f"--outcome {outcome}: expected success, failure, timeout or unknown") from error
    with Project(project, create=False) as opened:
        counts = opened.export(output or sys.stdout, format_name, wanted)
    n_others = sum(count for kind, count in counts.items() if kind in ("failure", "timeout", "unknown"))
    err().print(f"exported: {by_reason(counts)}", markup=False)
    if n_others:
        err().print(f"{n_others} did not succeed, or nobody said so; whoever learns from the file wants --outcome success", markup=False)
