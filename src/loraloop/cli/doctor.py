"""`loraloop doctor`."""

from __future__ import annotations

import typer

from loraloop.cli.screen import DEFAULT_PROJECT, JsonOption, ProjectOption, show_next, show_table, write_line


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: loraloop doctor --json")(doctor)


def doctor(project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """Show what this machine has, and what is in the way. Exit code 1 when something will not work as it is."""
    from loraloop.doctor import examine

    found = list(examine(project))
    if as_json:
        for finding in found:
            write_line(finding.model_dump_json())
    else:
        rows = [[one.name, one.value, f"{'PROBLEM: ' if one.is_problem else ''}{one.advice}"] for one in found]
        show_table("", ["", "found", "to know or to do"], rows)
        show_next("loraloop ingest PATH", project)
    if any(one.is_problem for one in found):
        raise typer.Exit(1)
