"""`loraloop status`: where the loops of a project stand, and why."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import typer

from loraloop.cli.screen import DEFAULT_PROJECT, JsonOption, ProjectOption, show_next, write_line, write_text
from loraloop.cli.watch import ScenarioOption
from loraloop.files import json_line

if TYPE_CHECKING:
    from loraloop.daemon.status import LoopStatus


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: loraloop status --json")(status)


def status(project: ProjectOption = DEFAULT_PROJECT, scenario: ScenarioOption = None, as_json: JsonOption = False) -> None:
    """Where each loop stands, what it waits for, and why the last verdict was what it was; a JSON object a line with --json."""
    from loraloop.daemon.watch import find_watcher
    from loraloop.project import Project

    with Project(project, create=False) as opened:
        found = opened.status(scenario or ())
        watcher = find_watcher(opened.directory)
    if as_json:
        for one in found:
            write_line(json_line({**one.model_dump(mode="json"), "watched_by": None if watcher is None else watcher.processes[0][0]}))
        return
    write_text(f"watched by {watcher.describe()}" if watcher else "not watched: no loop goes on")
    for one in found:
        for line in describe(one):
            write_text(line)
    show_next("loraloop models list" if watcher else "loraloop watch", project)


def describe(loop: LoopStatus) -> list[str]:
    """One loop in lines."""
    from loraloop.daemon.state import MEANINGS

    lines = [f"{loop.alias}: {loop.stage}, which {MEANINGS[loop.stage]}"]
    if loop.paused_at is not None:
        lines.append(f"  paused since {_time(loop.paused_at)}")
    applied = f", since {_time(loop.applied_at)}; before it {loop.previous or 'the base model'}" if loop.applied_at else ""
    lines.append(f"  live: {loop.live or 'the base model'}{applied}")
    if loop.training is not None:
        steps = f", step {loop.training.step} of {loop.training.steps}" if loop.training.steps else ""
        lines.append(f"  training: run {loop.run} is {loop.training.state}{steps}")
    look = f"; next look {_time(loop.next_look_at)}" if loop.next_look_at else ""
    lines.append(f"  trigger: {'fires: ' if loop.fires else ''}{'; '.join(loop.reasons)}{look}")
    if loop.verdict is not None:
        lines.append(f"  last verdict: {loop.verdict.decision} {loop.verdict.model} ({_time(loop.verdict.at)}): {loop.verdict.reason}")
    if loop.failure is not None:
        again = f"; tried again {_time(loop.retry_at)}" if loop.retry_at else ""
        count = f", {loop.attempts} times" if loop.attempts else ", given up"
        lines.append(f"  failed: {loop.failure.stage} ({_time(loop.failure.at)}{count}): {loop.failure.message}{again}")
    lines += [f"  nothing to take in: {source}" for source in loop.missing_sources]
    return lines


def _time(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
