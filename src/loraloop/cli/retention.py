"""`loraloop forget` and `loraloop prune`."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from loraloop.cli.screen import DEFAULT_PROJECT, JsonOption, ProjectOption, ask, err, show_next, write_line, write_text

UNIT_MS = {"h": 3_600_000, "d": 86_400_000, "w": 7 * 86_400_000}

YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command(epilog="Example: loraloop forget ep-0000000000000-0123… --yes")(forget)
    app.command(epilog="Example: loraloop prune --older-than 90d --dry-run")(prune)


def forget(
    episode_ids: Annotated[list[str], typer.Argument(metavar="EPISODE...", help="Ids.", show_default=False)],
    project: ProjectOption = DEFAULT_PROJECT,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove episodes for good, keep them out, and name the datasets, runs and models that were made from them."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        if not yes and not ask(f"Forget {len(episode_ids)} episodes for good?"):
            err().print("Nothing is forgotten; where nobody can answer, say --yes.")
            raise typer.Exit(1)
        report = opened.forget(episode_ids)
    if as_json:
        write_line(report.model_dump_json())
        return
    write_text(f"forgot {report.forgotten} episodes; ingest keeps them out unless told --readmit")
    for each in report.missing:
        write_text(f"not in the store, kept out from now on: {each}")
    for kind, names in report.made_from.model_dump().items():
        for name in names:
            write_text(f"still in {kind}: {name}")
    if report.made_from.models:
        show_next(f"loraloop models delete {report.made_from.models[0]}", project)


def prune(
    older_than: Annotated[str, typer.Option("--older-than", metavar="AGE", help="Such as 36h, 30d or 8w, since it was stored.")],
    project: ProjectOption = DEFAULT_PROJECT,
    keep_used: Annotated[
        bool, typer.Option("--keep-used/--drop-used", help="Whether to keep what a dataset, a run or a model was made from.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many it would be.")] = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove old episodes for good. Reading their files again does not bring them back."""
    from loraloop.episode import now_ms
    from loraloop.project import Project

    before_ms = now_ms() - _to_ms(older_than)
    with Project(project, create=False) as opened:
        if not dry_run and not yes:
            would = opened.prune(before_ms, keep_used=keep_used, dry_run=True)
            if not ask(f"Remove {would.removed} of {would.older} episodes older than {older_than} for good?"):
                err().print("Nothing is removed; where nobody can answer, say --yes.")
                raise typer.Exit(1)
        report = opened.prune(before_ms, keep_used=keep_used, dry_run=dry_run)
    if as_json:
        write_line(report.model_dump_json())
        return
    verb = "would remove" if report.dry_run else "removed"
    write_text(
        f"{report.older} episodes are older than {older_than}: {verb} {report.removed}, kept {report.kept} that something was made from"
    )
    show_next("loraloop episodes list", project)


def _to_ms(age: str) -> int:
    from loraloop.errors import SettingsError

    found = re.fullmatch(r"(\d{1,6})([hdw])", age.strip())
    if not found:
        raise SettingsError(f"--older-than {age}: expected a number and h, d or w, such as 30d")
    return int(found[1]) * UNIT_MS[found[2]]
