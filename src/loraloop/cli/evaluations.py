"""Evaluations, listed and shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraloop.cli.evaluate import show_evaluation
from loraloop.cli.screen import DEFAULT_PROJECT, IdArgument, JsonOption, ProjectOption, err, show_next, show_table, write_line

if TYPE_CHECKING:
    from loraloop.evaluate.result import Evaluation

evaluations = typer.Typer(no_args_is_help=True, help="What has been measured.")


def register(app: typer.Typer) -> None:
    """Add the group to `app`."""
    app.add_typer(evaluations, name="evaluations")


@evaluations.command("list", epilog="Example: loraloop evaluations list --json")
def list_evaluations(project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """List finished evaluations, the newest last; one JSON object a line with --json."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        found = opened.list_evaluations()
    if as_json:
        for evaluation in found:
            write_line(evaluation.model_dump_json())
        return
    columns = ["id", "candidate", "opponent", "measured", "tasks", "difference", "interval", "by these alone"]
    show_table(f"{len(found)} evaluations", columns, [_row(one) for one in found])
    show_next("loraloop evaluations show ID" if found else "loraloop evaluate MODEL", project)


@evaluations.command("show", epilog="Example: loraloop evaluations show eval-3f9c --report evaluation.html")
def show(
    evaluation_id: IdArgument,
    project: ProjectOption = DEFAULT_PROJECT,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as a page of HTML, too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show one evaluation; the id may be cut short, and `latest` is the newest."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        found = opened.get_evaluation(evaluation_id)
        if report is not None:
            opened.report_evaluation(found, report)
            err().print(f"the report is in {report}", markup=False)
    if as_json:
        write_line(found.model_dump_json())
    else:
        show_evaluation(found)
        show_next("loraloop evaluations list", project)


def _row(evaluation: Evaluation) -> list[str]:
    primary = evaluation.primary
    interval = "-" if primary.lower is None or primary.upper is None else f"{primary.lower:+.3f} to {primary.upper:+.3f}"
    sides = [evaluation.plan.candidate.name, evaluation.plan.opponent.name]
    decision = evaluation.verdict.decision if evaluation.verdict else "-"
    return [evaluation.id, *sides, primary.name, str(primary.n), f"{primary.difference:+.3f}", interval, decision]
