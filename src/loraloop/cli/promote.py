"""`loraloop promote`: what a person decides against the gate."""

from __future__ import annotations

from typing import Annotated

import typer

from loraloop.cli.screen import DEFAULT_PROJECT, IdArgument, JsonOption, ProjectOption, show_next, write_line, write_text


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog='Example: loraloop promote latest --override "the string that came out is public"')(promote)


def promote(
    model_id: IdArgument,
    override: Annotated[str, typer.Option(help="Why the verdict is put aside; it is kept with the verdict.")],
    project: ProjectOption = DEFAULT_PROJECT,
    as_json: JsonOption = False,
) -> None:
    """Promote a model that the gate has held or rejected. What is proven better needs no such command: the gate promotes it."""
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        model = opened.get_model(model_id)
        verdict = opened.promote(model.id, override)
    if as_json:
        write_line(verdict.model_dump_json())
        return
    write_text(f"{model.id} is promoted; {verdict.reason}")
    show_next(f"loraloop models show {model.id}", project)
