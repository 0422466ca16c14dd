"""`loraloop settings`: what is set for a project, and by what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from loraloop.cli.screen import DEFAULT_PROJECT, JsonOption, ProjectOption, show_next, show_table, write_line
from loraloop.files import json_line

settings = typer.Typer(no_args_is_help=True, help="What is set for a project, and by what.")


def register(app: typer.Typer) -> None:
    """Add the group to `app`."""
    app.add_typer(settings, name="settings")


@settings.command("show", epilog="Example: loraloop settings show --json")
def show(project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """Each setting, its value and where that comes from; one JSON object a line with --json."""
    from loraloop.settings import load_settings

    found = load_settings(project)
    lines: list[dict[str, Any]] = [
        {"section": one.section, "name": one.name, "value": _to_json(one.value), "origin": one.origin} for one in found
    ]
    if as_json:
        for line in lines:
            write_line(json_line(line))
    else:
        rows = [[f"{line['section']}.{line['name']}", _shown(line["value"]), line["origin"]] for line in lines]
        show_table("", ["setting", "value", "from"], rows)
    show_next("loraloop status", project)


def _to_json(value: object) -> object:
    from pydantic import BaseModel

    if isinstance(value, tuple):
        return [_to_json(one) for one in value]
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    return _without_password(str(value)) if isinstance(value, str | Path) else value


def _shown(value: object) -> str:
    return "-" if value is None else value if isinstance(value, str) else json_line(value)


def _without_password(text: str) -> str:
    """A URL as it may be shown."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", text)
