"""What the commands share in showing things: two consoles, tables, the progress of a training, and the next command to type."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from loraloop.cli.defaults import from_settings
from loraloop.data_report.visible import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from loraloop.training_record import DataReport, TrainingEvent

DEFAULT_PROJECT = Path("loraloop-project")
PROJECT_VARIABLE = "LORALOOP_PROJECT"

ProjectOption = Annotated[
    Path,
    typer.Option(
        "--project",
        "-p",
        envvar=PROJECT_VARIABLE,
        help="The project directory; everything is kept in it.",
        is_eager=True,
        callback=from_settings,
    ),
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The id.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on standard output, nothing else there.")]


def err() -> Console:
    """The console for people: standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def ask(question: str) -> bool:
    """Whether the next line of standard input says yes; standard output stays for data, which Typer's own prompt writes to."""
    err().print(f"{question} [y/N] ", end="", markup=False)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def write_line(text: str) -> None:
    """One line of data on standard output."""
    sys.stdout.write(text + "\n")


def write_text(text: str) -> None:
    """Text for people on standard output: what a terminal would act on is shown as a sign, since a recording may hold anything."""
    write_line(visible(text))


def show_table(title: str, columns: list[str], rows: list[list[str]], *, console: Console | None = None) -> None:
    """A table on standard output, as wide as its content where that is not a terminal, or on `console`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))  # never as markup: a task may be called [/red]
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    (console or Console(highlight=False, width=width)).print(table)


def show_next(command: str, project: Path) -> None:
    """The next command to type, for the same project."""
    unless_told = Path(os.environ.get(PROJECT_VARIABLE) or DEFAULT_PROJECT)
    named = f" --project {shlex.quote(str(project))}" if project != unless_told else ""
    err().print(f"Next: {command}{named}", markup=False)


def by_reason(counts: Mapping[str, int]) -> str:
    """`reason 3, other 1`, or a dash."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items())) or "-"


def describe_data(report: DataReport) -> list[str]:
    """The data check in lines: what is trained, by whom it was written, what was lost."""
    roles = ", ".join(f"{role} {count}" for role, count in report.trained_by_role.items())
    by = {"template": " by the model's own template", "fallback": " by the documented fallback", "none": ""}[report.tools_rendered_by]
    return [
        (
            f"data: {report.samples_used} of {report.samples} samples in {report.rows} rows, {report.n_tokens:,} tokens, "
            f"{report.n_supervised_tokens:,} of them trained"
        ),
        f"trained tokens by role: {roles}",
        f"agent turns: {report.turns}, of which the stop token is trained: {report.stops_trained}",
        f"tool calls recorded: {report.calls_recorded}, rendered: {report.calls_rendered}{by}",
        f"left out: {by_reason(report.refused)}",
        *_describe_length(report),
    ]


def _describe_length(report: DataReport) -> list[str]:
    """What was done to samples that are no single row; nothing when all are."""
    told = [
        f"{report.windowed} in windows" if report.windowed else "",
        f"{report.elided} without {report.characters_elided:,} characters of tool outputs" if report.elided else "",
        f"{report.prefix_broken} a row for each call, as the template changes earlier turns" if report.prefix_broken else "",
    ]
    return [f"not whole samples: {', '.join(part for part in told if part)}"] if any(told) else []


class TrainingScreen:
    """Shows a training's events as they come: a bar with step, loss, tokens/s and time left; notes above it."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(),
            console=err(),
        )
        self.task: TaskID | None = None
        self.base_task: TaskID | None = None
        self.printed = 0

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, event: TrainingEvent) -> None:
        """One event of the training process."""
        say = self.progress.console.print
        if event.event == "data" and event.data is not None:
            for line in describe_data(event.data):
                say(line, markup=False)
        elif event.event == "held_out" and event.loss is not None:
            right = "" if event.accuracy is None else f", right about {event.accuracy:.0%}"
            say(f"held-out loss {event.message}: {event.loss:.4f}{right}", markup=False)
        elif event.event == "stopped":
            say(f"stopped; a checkpoint keeps step {event.step}" if event.step else "stopped before the first checkpoint", markup=False)
        elif event.event == "reference" and event.step is not None:
            self._reference(event)
        elif event.event == "step" and event.step is not None and event.steps is not None:
            self._step(event)
        elif event.message:
            say(f"{'warning: ' if event.event == 'warning' else ''}{event.message}", markup=False)

    def _reference(self, event: TrainingEvent) -> None:
        """The base model measures every row before a training by preference."""
        if self.base_task is None:
            self.base_task = self.progress.add_task("base model", total=event.steps, figures="rows measured")
        self.progress.update(self.base_task, completed=event.step)
        if not self.progress.console.is_terminal and event.step == event.steps:
            self.progress.console.print(f"the base model has measured {event.steps} rows", markup=False)

    def _step(self, event: TrainingEvent) -> None:
        """Shows what there is: a script of the user's own may tell no more than the step."""
        loss = "" if event.loss is None else f"loss {event.loss:.4f}"
        right = "" if event.accuracy is None else f"right {event.accuracy:.0%}"
        speed = "" if event.tokens_per_s is None else f"{event.tokens_per_s:.0f} tokens/s"
        figures = "  ".join(figure for figure in (loss, right, speed) if figure)
        if self.task is None:
            self.task = self.progress.add_task("training", total=event.steps, figures=figures)
        self.progress.update(self.task, completed=event.step, figures=figures)
        share = 10 * (event.step or 0) // (event.steps or 1)
        if not self.progress.console.is_terminal and share > self.printed:  # a log wants lines, not a moving bar
            self.printed = share
            left = "" if event.eta_s is None else f"{event.eta_s:.0f} s left"
            told = [f"step {event.step}/{event.steps}", figures, left]
            self.progress.console.print("  ".join(part for part in told if part), markup=False)
