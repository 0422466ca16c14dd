"""`loraloop build`."""

from __future__ import annotations

from typing import Annotated

import typer

from loraloop.cli.screen import DEFAULT_PROJECT, JsonOption, ProjectOption, by_reason, show_next, show_table, write_line
from loraloop.errors import SettingsError
from loraloop.files import json_line


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: loraloop build --min-score 0.5 --held-out 0.2")(build)


def build(
    project: ProjectOption = DEFAULT_PROJECT,
    method: Annotated[str, typer.Option(help="What the data is for: sft.")] = "sft",
    learn_model: Annotated[str, typer.Option(help="How episodes become samples.")] = "conversation",
    min_score: Annotated[float, typer.Option(help="The least score of a success that is learned.")] = 0.0,
    held_out: Annotated[float, typer.Option(help="Share of the tasks kept from training, 0 or more and below 1.")] = 0.2,
    scenario: Annotated[str | None, typer.Option(help="Only episodes of this scenario.")] = None,
    outcome: Annotated[str | None, typer.Option(help="Only episodes that ended so: success, failure, timeout, unknown.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Freeze a dataset from the episodes that ended well, some tasks held out. Every episode is a sample or a counted refusal."""
    from pydantic import ValidationError

    from loraloop.episode import EpisodeFilter
    from loraloop.plugins import find
    from loraloop.project import Project

    if method != "sft":
        raise SettingsError(f"method {method!r}: expected sft")
    if not 0 <= held_out < 1:
        raise SettingsError(f"--held-out {held_out:g}: expected 0 <= share < 1")
    try:
        wanted = EpisodeFilter(scenario=scenario, outcome=outcome)
    except ValidationError as error:
        raise SettingsError(f"--outcome {outcome}: expected success, failure, timeout or unknown") from error
    model = find("learn_models", learn_model)(min_score=min_score)
    with Project(project, create=False) as opened:
        dataset = opened.build(model, episode_filter=wanted, held_out_fraction=held_out)
    manifest = dataset.manifest
    if as_json:
        keys = {"method", "episodes", "samples", "held_out", "refused", "learn_model", "tasks", "held_out_tasks"}
        write_line(json_line({"dataset": dataset.id, **manifest.model_dump(include=keys), "path": str(dataset.path)}))
    else:
        rows = [[dataset.id, str(manifest.episodes), str(manifest.samples), str(manifest.held_out), by_reason(manifest.refused)]]
        show_table("", ["dataset", "episodes", "samples to train on", "held out", "refused"], rows)
        write_line(f"{manifest.held_out_tasks} of {manifest.tasks} tasks are held out; the dataset is in {dataset.path}")
    show_next("loraloop train --base MODEL", project)
