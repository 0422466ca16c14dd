"""Which model answers: apply, rollback, and how the service stands."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from loraloop.cli.screen import DEFAULT_PROJECT, JsonOption, ProjectOption, err, show_next, show_table, write_line, write_text

if TYPE_CHECKING:
    from loraloop.serve.aliases import Served
    from loraloop.serve.fleet_status import ApplyReport
    from loraloop.serve.orders import ServiceStatus

AliasOption = Annotated[str, typer.Option("--alias", help="The name that clients call.")]


def apply(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A model's id, `latest`, or `base`.", show_default=False)] = None,
    project: ProjectOption = DEFAULT_PROJECT,
    alias: AliasOption = "agent",
    canary: Annotated[str | None, typer.Option(help="Only this share of conversations, on trial: 10% or 0.1.", show_default=False)] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Let the canary answer to all conversations.")] = False,
    override: Annotated[
        str | None, typer.Option(metavar="REASON", help="Serve a model that is not promoted, for this reason.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Let a model answer to an alias: it is started and proven first, then the alias moves, and the last one ends what it has begun.

    Without a running service the order is kept, and carried out when one starts.
    """
    from loraloop.project import Project

    if (model is None) != promote:
        raise typer.BadParameter("give a MODEL, or --promote without one")
    if promote and (canary is not None or override is not None):
        raise typer.BadParameter("--promote takes the canary as it is; leave --canary and --override")
    with Project(project, create=False) as opened:
        try:
            if model is None:
                report = opened.promote_canary(alias)
            else:
                report = opened.apply(model, alias, canary=None if canary is None else read_share(canary), override=override)
        except ValidationError as error:
            raise typer.BadParameter(f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from error
    _show(report, project, as_json=as_json)


def rollback(
    project: ProjectOption = DEFAULT_PROJECT,
    alias: AliasOption = "agent",
    to: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A model's id or a version's name that answered before.", show_default=False)
    ] = None,
    why: Annotated[str, typer.Option(help="Why, for the history.", show_default=False)] = "",
    as_json: JsonOption = False,
) -> None:
    """Let an alias go back to what answered before; with a canary on trial, end the trial."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        report = opened.rollback(alias, to=to, why=why)
    _show(report, project, as_json=as_json)


def status(project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """Show which version answers to which alias, and what is under way."""
    from loraloop.project import Project
    from loraloop.serve.orders import ServiceStatus

    with Project(project, create=False) as opened:
        found = opened.serving_status()
    if isinstance(found, ServiceStatus):
        if as_json:
            write_line(found.model_dump_json())
        else:
            _show_service(found)
            show_next("loraloop apply MODEL", project)
        return
    if as_json:
        from loraloop.files import json_line

        write_line(json_line({"running": False, "aliases": {alias: served.model_dump(mode="json") for alias, served in found.items()}}))
        return
    err().print("no service runs")
    rows = [_row(alias, served) for alias, served in sorted(found.items())]
    show_table(f"{len(rows)} aliases", ["alias", "version", "model", "canary", "to be taken up", "since"], rows)
    show_next("loraloop serve --base MODEL", project)


def read_share(text: str) -> float:
    """`10%` or `0.1` as 0.1. Raises typer.BadParameter for what is not above 0 and below 1."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise typer.BadParameter(f"--canary {text!r} is no share; expected above 0% and below 100%, as 10% or 0.1")
    return share


def register(app: typer.Typer) -> None:
    """Add `apply` and `rollback`."""
    app.command(epilog="Example: loraloop apply latest --canary 10%")(apply)
    app.command(epilog="Example: loraloop rollback --why 'calls the wrong tool'")(rollback)


def _show(report: ApplyReport, project: object, *, as_json: bool) -> None:
    if as_json:
        write_line(report.model_dump_json())
        return
    model = f" ({report.model_id})" if report.model_id else ""
    before = f", before {report.before}" if report.before else ""
    told = {
        "wanted": f"no service runs; {report.alias} is to be {report.version}{model} when one starts and it is proven{before}",
        "none": f"{report.alias} is {report.version}{model} already",
        "canary": f"{report.share or 0:.0%} of {report.alias}'s conversations go to {report.version}{model}, the rest to {report.before}",
        "canary_rolled_back": f"the trial is over; {report.alias} is {report.version}{model} for all conversations",
    }
    write_text(told.get(report.kind, f"{report.alias} is {report.version}{model}{before}"))
    if report.proof:
        write_text(f"proof: {report.proof.reason}")
    show_next("loraloop serve status", project)  # type: ignore[arg-type]


def _show_service(found: ServiceStatus) -> None:
    fleet = found.fleet
    write_text(f"{fleet.applier} serves {fleet.base}")
    rows = []
    for alias, each in fleet.aliases.items():
        trial = ""
        if each.canary and each.share and each.canary_arm and each.champion_arm:
            arms = (each.canary_arm, each.champion_arm)
            trial = f"{each.canary} {each.share:.0%}, failed {' against '.join(f'{arm.failures} of {arm.requests}' for arm in arms)}"
        rows.append(
            [alias, each.version or "-", "yes" if each.answers else each.problem or "no", trial or "-", ", ".join(each.previous) or "-"]
        )
    show_table(f"{len(rows)} aliases", ["alias", "version", "answers", "canary", "can go back to"], rows)
    columns = ["version", "state", "under way", "requests", "failed", "cut", "why"]
    versions = [
        [each.name, each.state, str(each.in_flight), str(each.requests), str(each.failures), str(each.cut), each.reason or "-"]
        for each in fleet.versions
    ]
    show_table(f"{len(versions)} versions", columns, versions)
    write_text("recorder: " + ", ".join(f"{name} {value}" for name, value in found.recorder.items()))
    for problem in fleet.problems:
        write_text(f"problem: {problem}")


def _row(alias: str, served: Served) -> list[str]:
    version = served.version
    canary = f"{served.canary.version.name} {served.canary.share:.0%}" if served.canary else "-"
    since = datetime.fromtimestamp(served.at / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    names = [version.name if version else "-", (version.model_id if version else None) or "-"]
    return [alias, *names, canary, served.wanted.name if served.wanted else "-", since]
