"""Writes docs/reference/: the help of every command, the defaults of a training, and the tables that code decides by.

`make docs`; a test compares.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

from loraloop import settings
from loraloop.learn.outcome_rules import OutcomeSettings, to_markdown
from loraloop.lora import states
from loraloop.serve import states as version_states
from loraloop.serve.llama_server import LlamaCppSettings, count_processors
from loraloop.serve.vllm import VllmSettings

REFERENCE = Path(__file__).parent / "reference"
COMMANDS = [
    [],
    ["ingest"],
    ["label"],
    ["forget"],
    ["prune"],
    ["build"],
    ["train"],
    ["evaluate"],
    *([noun, verb] for noun in ("episodes", "datasets", "models", "evaluations") for verb in ("list", "show")),
    ["models", "delete"],
    ["watch"],
    ["watch", "pause"],
    ["watch", "resume"],
    ["watch", "now"],
    ["status"],
    ["settings", "show"],
    ["export"],
    ["apply"],
    ["rollback"],
    ["serve"],
    ["serve", "status"],
]


def cli_page() -> str:
    """Every command's --help, one after another."""
    parts = ["# Commands\n\nWritten by `make docs` from `loraloop … --help`.\n"]
    parts += [
        f"## loraloop {' '.join(command)}".rstrip() + f"\n\n```\n{_help(['-m', 'loraloop', *command])}\n```\n" for command in COMMANDS
    ]
    parts.append(f"## The training process\n\n```\n{_help(['-m', 'loraloop.train'])}\n```\n")
    return "\n".join(parts)


def settings_page() -> str:
    """Every section of `loraloop.toml`, with the string under each field as its description."""
    intro = (
        "# Settings\n\nWritten by `make docs` from the classes that declare them; `loraloop.settings.SECTIONS` says which section each\n"
        "is of. In `loraloop.toml` in the project's directory, in the environment as `LORALOOP_<SECTION>_<NAME>`, which goes before\n"
        "the file, or in Python as arguments of the class. Every value is checked when it is set. `loraloop settings show` tells\n"
        "where each comes from.\n"
    )
    parts = [intro]
    for section, kind in [*settings.describe(), ("[watch.scenario]", settings.ScenarioSettings)]:
        title = f"## `[{section}]`: {kind.__name__}\n\n{inspect.getdoc(kind)}"
        parts.append("\n".join([title, "\n| field | default | |\n|---|---|---|", *_rows(kind), ""]))
    return "\n".join(parts)


def options_page() -> str:
    """What `loraloop serve --option NAME=VALUE` may set of each applier."""
    intro = (
        "# Options of the appliers\n\nWritten by `make docs` from the classes that declare them: what `--option NAME=VALUE`\n"
        "of `loraloop serve` sets; it may be repeated. See [serving](../serving.md).\n"
    )
    parts = [intro]
    for applier, kind in (("llama.cpp", LlamaCppSettings), ("vllm", VllmSettings)):
        title = f"## `--applier {applier}`: {kind.__name__}\n\n{inspect.getdoc(kind)}"
        parts.append("\n".join([title, "\n| option | default | |\n|---|---|---|", *_rows(kind), ""]))
    return "\n".join(parts)


def outcomes_page() -> str:
    """What each outcome means to each method, and what may be set about it."""
    intro = (
        "# Outcomes\n\nWritten by `make docs` from `loraloop.learn.outcome_rules`: what each outcome of an episode means to each method.\n"
        "A name in backquotes alone is the reason code of a refusal. An episode with a score outside `score_range` is refused as\n"
        "`score_outside_scale`, whatever the method. Scores count as their place on that scale, 0 to 1.\n"
    )
    return "\n".join([intro, to_markdown(), "\n| setting | default | |\n|---|---|---|", *_rows(OutcomeSettings), ""])


def states_page() -> str:
    """The states of a model, and which follows which."""
    intro = (
        "# States of a model\n\nWritten by `make docs` from `loraloop.lora.states`: what a model can be, and what it may become; any\n"
        "other change is refused. See [how they are kept](../concepts.md#models-and-their-states).\n"
    )
    return f"{intro}\n{states.to_markdown()}\n"


def version_states_page() -> str:
    """The states of a version that is served, and which follows which."""
    intro = (
        "# States of a served version\n\nWritten by `make docs` from `loraloop.serve.states`: the life of a base model or an adapter in\n"
        "the service; any other step is refused. See [serving](../serving.md).\n"
    )
    return f"{intro}\n{version_states.to_markdown()}\n"


def pages() -> dict[Path, str]:
    """What each reference page should hold."""
    return {
        REFERENCE / "cli.md": cli_page(),
        REFERENCE / "settings.md": settings_page(),
        REFERENCE / "options.md": options_page(),
        REFERENCE / "outcomes.md": outcomes_page(),
        REFERENCE / "states.md": states_page(),
        REFERENCE / "version-states.md": version_states_page(),
    }


def _help(arguments: list[str]) -> str:
    environment = {**os.environ, "COLUMNS": "110", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, *arguments, "--help"], capture_output=True, text=True, check=True, env=environment)
    return "\n".join(line.rstrip() for line in done.stdout.replace("python -m loraloop", "loraloop").strip().splitlines())


def _rows(kind: type) -> list[str]:
    """A row of a table for each field of a class of settings."""
    fields = settings.fields_of(kind).items()
    return [f"| `{name}` | `{_shown(kind, name, default)}` | {_description(kind, name)} |" for name, (_, default) in fields]


def _shown(kind: type, name: str, default: object) -> str:
    """The default of a setting; one scenario is there unless the file has others, and what is counted is another on each machine."""
    if getattr(getattr(kind, "model_fields", {}).get(name), "default_factory", None) is count_processors:
        return "all processors"
    return "one scenario" if default == (settings.ScenarioSettings(),) else repr(default)


def _description(kind: type, name: str) -> str:
    found = re.search(rf"^    {name}: [^\n]*\n    \"\"\"(.*?)\"\"\"", inspect.getsource(kind), re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"wrote {path.name}\n")
