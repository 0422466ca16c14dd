"""`loraloop ingest`."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraloop.cli.screen import DEFAULT_PROJECT, JsonOption, ProjectOption, by_reason, err, show_next, show_table, write_line
from loraloop.data_report.visible import visible
from loraloop.errors import SettingsError
from loraloop.files import json_line

if TYPE_CHECKING:
    from loraloop.importers.ingest import IngestReport


POLL_SECONDS = 0.5
"""How long --follow waits when nothing is new."""


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
    readmit: Annotated[bool, typer.Option("--readmit", help="Take in again what was forgotten or pruned.")] = False,
    score: Annotated[
        str | None, typer.Option(metavar="KEY[.SUBKEY]", help="Which score counts, such as reward.correct; else what the format says.")
    ] = None,
    scale: Annotated[str | None, typer.Option(metavar="LOW..HIGH", help="The scale that the score is on; 0..1 with --score.")] = None,
    success_from: Annotated[float | None, typer.Option(help="The least score of a success; the top of the scale without it.")] = None,
    is_followed: Annotated[
        bool, typer.Option("--follow", help="Go on with what is written to JSON Lines files, until Ctrl-C; a restart goes on from there.")
    ] = False,
    follow_for: Annotated[float | None, typer.Option(metavar="SECONDS", help="--follow for so long.", min=0)] = None,
    as_json: JsonOption = False,
) -> None:
    """Read recorded runs into the project's episode store. Reading a file again stores nothing twice."""
    from loraloop.importers.scores import ScoreRule

    rule = ScoreRule.parse(score, scale, success_from)
    told: dict[str, Any] = {"format_name": format_name, "license_name": license_name, "score_rule": rule}
    if is_followed or follow_for is not None:
        if readmit:
            raise SettingsError("--readmit: take files in again without --follow")
        _follow(project, paths, told, seconds=follow_for, as_json=as_json)
        return
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

        for report in opened.ingest(paths, on_progress=on_progress, readmit=readmit, **told):
            reports.append(report)
            on_progress(Path(report.path), report.read, report.read)  # how many there were may only be known at the end
            if as_json:
                write_line(json_line(report.to_json()))
    _show_ingested(reports, as_json=as_json)
    _end(reports, license_name, project)


def _end(reports: list[IngestReport], license_name: str | None, project: Path) -> None:
    """What is still to be said, and the next command; Exit(1) when nothing came in."""
    if not any(report.stored or report.duplicates for report in reports):
        err().print("Error: nothing was stored, and nothing of it was known already", markup=False)
        raise typer.Exit(1)
    if relicensed := sum(report.relicensed for report in reports):
        said = "were there under other terms or none; the terms said now count, and `loraloop episodes show` has those before"
        err().print(f"{relicensed} episodes {said}", markup=False)
    if license_name is None:
        err().print("No --license was given: build takes what says no terms with --unknown-license allow only", markup=False)
    show_next("loraloop build" if license_name else "loraloop build --unknown-license allow", project)


def _follow(project: Path, paths: list[Path], told: dict[str, Any], *, seconds: float | None, as_json: bool) -> None:
    """Read what is new until Ctrl-C or for `seconds`, a line on standard error for every piece, then the sums."""
    from loraloop.project import Project

    ends_at = None if seconds is None else time.monotonic() + seconds

    def wait() -> bool:
        left = POLL_SECONDS if ends_at is None else min(POLL_SECONDS, ends_at - time.monotonic())
        if left > 0:
            time.sleep(left)
        return left > 0

    sums: dict[str, IngestReport] = {}
    err().print(f"following {len(paths)} paths; Ctrl-C ends it" if seconds is None else f"following for {seconds:g} s", markup=False)
    with Project(project) as opened:
        try:
            for report in opened.follow(paths, wait, **told):
                _show_piece(report, as_json=as_json)
                sums[report.path] = sums[report.path].plus(report) if report.path in sums else report
        except KeyboardInterrupt:  # the way to end it; what was read is stored, and its place kept
            err().print("no longer followed; the same command goes on from here", markup=False)
    if not as_json:
        _show_ingested([report.model_copy(update={"refusals": ()}) for report in sums.values()], as_json=False)
    show_next("loraloop build" if told["license_name"] else "loraloop build --unknown-license allow", project)


def _show_piece(report: IngestReport, *, as_json: bool) -> None:
    for refusal in report.refusals:
        err().print(f"refused {refusal.reason}: {visible(refusal.detail)}", markup=False)
    told = f"{report.stored} stored, {report.duplicates} already there, {sum(report.refused.values())} refused"
    err().print(f"{visible(report.path)}: {report.read} new: {told}", markup=False)
    if as_json:
        write_line(json_line(report.to_json()))
        sys.stdout.flush()


def _show_ingested(reports: list[IngestReport], *, as_json: bool) -> None:
    from loraloop.importers.ingest import SIDE_FILE

    for report in reports:
        for refusal in report.refusals:
            err().print(f"refused {refusal.reason}: {visible(refusal.detail)}", markup=False)
        hidden = sum(report.refused.values()) - len(report.refusals)
        if hidden > 0 and report.refusals:
            err().print(f"… and {hidden} more in {report.path}", markup=False)
    aside = Counter(Path(report.path).name for report in reports if report.format == SIDE_FILE)
    if aside:
        err().print(f"left aside what harnesses write beside their runs: {by_reason(aside)}", markup=False)
    if not as_json:
        reports = [report for report in reports if report.format != SIDE_FILE]
        rows = [[r.path, r.format, str(r.read), str(r.stored), str(r.duplicates), by_reason(r.refused), r.scores] for r in reports]
        show_table("", ["file", "format", "read", "stored", "already there", "refused", "scores"], rows)
