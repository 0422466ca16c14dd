"""`loraloop label`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraloop.cli.screen import DEFAULT_PROJECT, JsonOption, ProjectOption, by_reason, err, show_next, write_line, write_text
from loraloop.data_report.visible import visible
from loraloop.files import json_line

if TYPE_CHECKING:
    from loraloop.episode import AnyOutcome
    from loraloop.label import LabelReport


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: loraloop label --from results.json --key instance_id")(label)


def label(
    episode_id: Annotated[str | None, typer.Argument(metavar="[EPISODE]", help="The episode's id.", show_default=False)] = None,
    project: ProjectOption = DEFAULT_PROJECT,
    success: Annotated[float | None, typer.Option("--success", metavar="SCORE", help="It succeeded, with this score.")] = None,
    failure: Annotated[str | None, typer.Option("--failure", metavar="REASON", help="It failed, for this reason.")] = None,
    timeout: Annotated[bool, typer.Option("--timeout", help="It ran out of time or steps.")] = False,
    partial: Annotated[float | None, typer.Option("--partial", metavar="SCORE", help="With --timeout: how far it had come.")] = None,
    unknown: Annotated[bool, typer.Option("--unknown", help="Nobody knows how it ended, after all.")] = False,
    comment: Annotated[str, typer.Option("--comment", help="Kept with the label.")] = "",
    results: Annotated[
        Path | None,
        typer.Option("--from", help="A file with outcomes (JSON, JSON Lines, CSV, SWE-bench, Harbor), or a folder of Harbor trials."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", help="What the file's names are: id, task_id, or the name of a tag. Without it an id, else a task id."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say how episodes ended, later than they were recorded. The newest label counts; `episodes show --json` has them all."""
    from loraloop.episode import Label
    from loraloop.errors import SettingsError
    from loraloop.project import Project

    if (episode_id is None) == (results is None):
        raise SettingsError("label takes an episode's id, or --from FILE; give one of the two")
    if results is not None:
        with Project(project, create=False) as opened:
            report = opened.label_from(results, key)
        _show_report(report, as_json=as_json)
        if not report.joined and not report.known:
            raise typer.Exit(1)
    else:
        said = _outcome(success, failure, timeout, partial, unknown)
        with Project(project, create=False) as opened:
            opened.label([Label(episode_id=opened.store.get(str(episode_id)).id, outcome=said, source="command line", comment=comment)])
            labels = opened.store.get_labels(str(episode_id))
        if as_json:
            write_line(json_line([each.model_dump(mode="json") for each in labels]))
        else:
            write_text(f"{episode_id}  {labels[-2].outcome} -> {labels[-1].outcome}")
    show_next("loraloop build", project)


def _outcome(success: float | None, failure: str | None, timeout: bool, partial: float | None, unknown: bool) -> AnyOutcome:
    from pydantic import ValidationError

    from loraloop.episode import Failure, Success, Timeout, Unknown
    from loraloop.errors import SettingsError

    if sum((success is not None, failure is not None, timeout, unknown)) != 1 or (partial is not None and not timeout):
        raise SettingsError("label takes one of --success SCORE, --failure REASON, --timeout (with --partial SCORE or without), --unknown")
    try:
        if success is not None:
            return Success(success)
        if failure is not None:
            return Failure(failure)
        return Timeout(partial) if timeout else Unknown()
    except ValidationError as error:
        raise SettingsError(f"a score of {success if partial is None else partial}: expected a finite number") from error


def _show_report(report: LabelReport, *, as_json: bool) -> None:
    for detail in report.details:
        err().print(f"not joined: {visible(detail)}", markup=False)
    hidden = report.unmatched + report.ambiguous + sum(report.refused.values()) - len(report.details)
    if hidden > 0:
        err().print(f"… and {hidden} more in {report.path}", markup=False)
    if as_json:
        write_line(json_line(report.to_json()))
    else:
        counts = f"{report.joined} joined, {report.known} known, {report.unmatched} unmatched, {report.ambiguous} ambiguous"
        write_text(f"{report.read} verdicts: {counts}, refused: {by_reason(report.refused)}")
