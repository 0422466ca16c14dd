"""`loraloop watch`: the loops of a project, as a process that runs until it is told to stop."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraloop.cli.screen import DEFAULT_PROJECT, ProjectOption, err, show_next, write_line
from loraloop.errors import SettingsError
from loraloop.files import json_line

if TYPE_CHECKING:
    from loraloop.daemon.cycle import CycleReport

ScenarioOption = Annotated[list[str] | None, typer.Option("--scenario", metavar="ALIAS", help="Only this loop; may be repeated.")]

UNIT = """[Unit]
Description=loraloop watch of {project}
After=network.target

[Service]
ExecStart={command} watch --project {project}
Restart=on-failure
RestartSec=10
# a training saves a checkpoint first; one that is killed goes on from the last
TimeoutStopSec=120
KillMode=mixed
SuccessExitStatus=143

[Install]
WantedBy=default.target
"""

watch = typer.Typer(invoke_without_command=True)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.add_typer(watch, name="watch")


@watch.callback(
    epilog="Examples: loraloop watch --once\n\nloraloop watch pause --scenario agent\n\n"
    "loraloop watch --unit > ~/.config/systemd/user/loraloop.service"
)
def run(
    context: typer.Context,
    project: ProjectOption = DEFAULT_PROJECT,
    once: Annotated[bool, typer.Option("--once", help="One cycle of each loop, then end; 1 when one failed.")] = False,
    scenario: ScenarioOption = None,
    interval: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Between two looks for what is new; what the settings say without.")
    ] = None,
    unit: Annotated[bool, typer.Option("--unit", help="Print a unit of systemd that runs this, and end.")] = False,
) -> None:
    """Take in what is new, and train, judge and apply whenever there is reason to; one process a project.

    What happens is a JSON line on standard error, and an event in the store. Ctrl-C or SIGTERM saves a checkpoint of a training under
    way and ends, a second one ends at once; the next start goes on from there.
    """
    if context.invoked_subcommand is not None:
        return
    if interval is not None and interval <= 0:
        raise SettingsError(f"--interval {interval:g}: expected more than 0 seconds")
    if unit:
        write_line(UNIT.format(project=_quote(project.resolve()), command=_quote(Path(sys.argv[0]).resolve())).rstrip("\n"))
        return
    from loraloop.project import Project
    from loraloop.settings import FILE

    failed = False
    last: dict[str, CycleReport] = {}
    is_new = (project / FILE).exists()  # its settings may be there before its first episode
    with (
        Project(project, create=is_new) as opened,
        closing(opened.watch(scenario or (), once=once, interval_seconds=interval)) as reports,
    ):
        for report in reports:
            if is_news(report, last.get(report.alias)):
                sys.stderr.write(to_log(report) + "\n")
                sys.stderr.flush()
            last[report.alias] = report
            failed = failed or report.failure is not None
    show_next("loraloop status", project)
    if failed:
        raise typer.Exit(1)


@watch.command("pause", epilog="Example: loraloop watch pause --scenario agent")
def pause(project: ProjectOption = DEFAULT_PROJECT, scenario: ScenarioOption = None) -> None:
    """Let the loops begin no further stage, also after a restart; a training under way comes to its end."""
    _pause(project, scenario, paused=True)
    show_next("loraloop watch resume", project)


@watch.command("resume", epilog="Example: loraloop watch resume")
def resume(project: ProjectOption = DEFAULT_PROJECT, scenario: ScenarioOption = None) -> None:
    """Let the loops go on; without --scenario all, also those that were paused one by one."""
    _pause(project, scenario, paused=False)
    show_next("loraloop status", project)


def is_news(report: CycleReport, last: CycleReport | None) -> bool:
    """Whether a cycle did anything, or waits for something else than the one before."""
    came = report.collected.stored or report.collected.refused
    return bool(report.moves or report.failure or came) or last is None or (last.stage, last.waits_for) != (report.stage, report.waits_for)


def to_log(report: CycleReport) -> str:
    """One line: when, which loop, and what of the report says anything."""
    from datetime import UTC, datetime

    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json_line({"at": at, **report.model_dump(mode="json", exclude_defaults=True)})


def _pause(project: Path, aliases: list[str] | None, *, paused: bool) -> None:
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        opened.pause(aliases or (), paused=paused)
    named = ", ".join(aliases) if aliases else "every loop"
    err().print(f"{named}: {'paused' if paused else 'goes on'}", markup=False)


def _quote(path: Path) -> str:
    """As systemd wants it: a path with its own signs escaped, in quotes where it has a space."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"' if any(sign.isspace() for sign in text) else text
