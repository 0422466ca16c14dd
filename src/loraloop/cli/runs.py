"""`loraloop runs`: trainings that go on or have ended, from any terminal."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from loraloop.cli.screen import (
    DEFAULT_PROJECT,
    JsonOption,
    ProjectOption,
    TrainingScreen,
    err,
    show_next,
    show_table,
    write_line,
    write_text,
)
from loraloop.files import json_line

if TYPE_CHECKING:
    from loraloop.lora.runs import Run

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's id, its beginning, or `latest`.", show_default=False)]

runs = typer.Typer(no_args_is_help=True, help="Trainings as they go: what they do now, how they ended.")


def register(app: typer.Typer) -> None:
    """Add the group to `app`."""
    app.add_typer(runs, name="runs")


@runs.command("list", epilog="Example: loraloop runs list --json")
def list_runs(project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """List runs, oldest first; one JSON object a line with --json."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        found = [run.summary() for run in opened.runs.list_runs()]
        for damaged in opened.runs.list_damaged():
            err().print(f"warning: {damaged}", markup=False)
    if as_json:
        for summary in found:
            write_line(json_line(summary))
        return
    rows = []
    for summary in found:
        done = f"{summary['step']}/{summary['steps']}" if summary["steps"] else "-"
        loss = "-" if summary["loss"] is None else f"{summary['loss']:.4f}"
        begun = datetime.fromtimestamp(summary["created_at"] / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
        rows.append([summary["id"], summary["state"], done, loss, str(summary["pid"] or "-"), summary["method"], begun])
    show_table(f"{len(found)} run{'' if len(found) == 1 else 's'}", ["id", "state", "step", "loss", "process", "method", "begun"], rows)
    unfinished = [summary["id"] for summary in found if summary["state"] not in ("running", "finished") and summary["can_resume"]]
    show_next(f"loraloop train --resume {unfinished[-1]}" if unfinished else "loraloop runs show RUN", project)


@runs.command("show", epilog="Example: loraloop runs show latest")
def show_run(run_id: RunArgument, project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """Show one run: how far it is, what it was told, how it ended."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        run = opened.runs.get(run_id)
        values = {**run.summary(), "config": run.plan.config, "options": run.plan.options, "log": str(run.path / "training.log")}
    if as_json:
        write_line(json_line(values))
        return
    for name, value in values.items():
        for key, part in value.items() if isinstance(value, dict) else (("", value),):
            write_text(f"{name}{'.' if key else ''}{key}: {part}")
    show_next(_next_of(run), project)


@runs.command("watch", epilog="Example: loraloop runs watch latest")
def watch_run(run_id: RunArgument, project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """Watch one run until it ends, from its beginning; with --json every event is a line. Ctrl-C ends the watching, not the run."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        run = opened.runs.get(run_id)
        if as_json:
            for event in run.follow():
                write_line(event.model_dump_json(exclude_none=True))
            return
        with TrainingScreen() as screen:
            for event in run.follow():
                screen.show(event)
        status = run.status
        write_text(f"{run.id} is {status.state}{': ' + status.message if status.message else ''}")
    show_next(_next_of(run), project)


@runs.command("stop", epilog="Example: loraloop runs stop latest")
def stop_run(run_id: RunArgument, project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """Let a run save a checkpoint and end; `loraloop train --resume RUN` goes on with it."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        run = opened.runs.get(run_id)
        status = run.stop()
    if as_json:
        write_line(json_line(run.summary()))
        return
    kept = f"a checkpoint keeps it as it was behind step {status.checkpoint}" if status.checkpoint else "it had no checkpoint yet"
    write_text(f"{run.id} is {status.state}: {kept}")
    show_next(_next_of(run), project)


def _next_of(run: Run) -> str:
    state = run.status.state
    if state == "finished":
        return f"loraloop models show {run.id}"
    if state == "running":
        return f"loraloop runs watch {run.id}"
    return f"loraloop train --resume {run.id}" if run.can_resume else "loraloop train, as a script of your own cannot be gone on with"
