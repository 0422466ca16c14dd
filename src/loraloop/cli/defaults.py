"""What a command's options are when nobody types them: the settings of the project that it is about.

An option on the command line goes first, then its variable of the environment, then the settings, then the default that `--help` shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

LONGER = {
    "train": {
        "base_model": "base",
        "lora_rank": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "gradient_accumulation": "grad_accum",
        "learning_rate": "lr",
    },
    "build": {"held_out_fraction": "held_out"},
    "serve": {"drain_seconds": "drain", "options": "option"},
}
"""Settings whose options have shorter names, by section; a section has the name of the command that it is for."""
IN_MINUTES = {"time_limit"}
"""Options that are in minutes where the setting is in seconds."""


def from_settings(context: typer.Context, project: Path) -> Path:
    """The callback of the option `--project`, which is read before the others: their defaults are then what is set for the project.

    Raises SettingsError for settings that cannot be.
    """
    section = context.info_name or ""
    names = {parameter.name for parameter in context.command.params}
    if section in LONGER and not context.resilient_parsing:
        from loraloop.settings import load_settings

        given = load_settings(project).given(section)
        options = {LONGER[section].get(name, name): value for name, value in given.items() if value is not None}
        options |= {name: [f"{one}={value}" for one, value in said.items()] for name, said in options.items() if isinstance(said, Mapping)}
        minutes = {name: options[name] / 60 for name in IN_MINUTES & set(options)}
        context.default_map = {name: value for name, value in (options | minutes).items() if name in names}
    return project
