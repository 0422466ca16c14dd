"""`loraloop ingest`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraloop.cli.screen import DEFAULT_PROJECT, JsonOption, ProjectOption, by_reason, err, show_next, show_table, write_line
from loraloop.data_report.visible import visible
from loraloop.files import json_line

if TYPE_CHECKING:
    from loraloop.importers.ingest import IngestReport


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: loraloop ingest runs/ more/results.json")(ingest)


def ingest(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Files, patterns such as 'runs/**/*.jsonl', or directories to search for *.json, *.jsonl, *.traj and *.eval, each also "
            "with .gz or .zst; - for standard input.",
            show_default=False,
        ),
    ],
    project: ProjectOption = DEFAULT_PROJECT,
    format_name: Annotated[str | None, typer.Option("--format", help="The files' format, when it cannot be told from them.")] = None,
    license_name: Annotated[
        str | None,
        typer.Option("--license", help="Their licence or terms, such as MIT, or own for runs of your own; kept with each episode."),
    ] = None,
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

        for report in opened.ingest(paths, format_name, on_progress, license_name=license_name):
            reports.append(report)
            on_progress(Path(report.path), report.read, report.read)  # how many there were may only be known at the end
            if as_json:
                write_line(json_line(report.to_json()))
    _show_ingested(reports, as_json=as_json)
    if not any(report.stored or report.duplicates for report in reports):
        err().print("Error: nothing was stored, and nothing of it was known already", markup=False)
        raise typer.Exit(1)
    if license_name is None:
        err().print("No --license was given: build takes what says no terms with --unknown-license allow only", markup=False)
    show_next("loraloop build" if license_name else "loraloop build --unknown-license allow", project)


def _show_ingested(reports: list[IngestReport], *, as_json: bool) -> None:
    from loraloop.importers.ingest import SIDE_FILE

    for report in reports:
        for refusal in report.refusals:
            err().print(f"refused {refusal.reason}: {visible(refusal.detail)}", markup=False)
        hidden = sum(report.refused.values()) - len(report.refusals)
        if hidden > 0:
            err().print(f"… and {hidden} more in {report.path}", markup=False)
    aside = Counter(Path(report.path).name for report in reports if report.format == SIDE_FILE)
    if aside:
        err().print(f"left aside what harnesses write beside their runs: {by_reason(aside)}", markup=False)
    if not as_json:
        reports = [report for report in reports if report.format != SIDE_FILE]
        rows = [[r.path, r.format, str(r.read), str(r.stored), str(r.duplicates), by_reason(r.refused)] for r in reports]
        show_table("", ["file", "format", "read", "stored", "already there", "refused"], rows)
