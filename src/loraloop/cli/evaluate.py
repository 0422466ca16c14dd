"""`loraloop evaluate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraloop.cli.screen import DEFAULT_PROJECT, JsonOption, ProjectOption, err, show_next, show_table, write_line, write_text
from loraloop.errors import SettingsError

if TYPE_CHECKING:
    from loraloop.evaluate.result import Comparison, Evaluation
    from loraloop.evaluate.suite import Progress

EXAMPLES = """Examples:

loraloop evaluate latest --against base --environment textcraft --limit 40

loraloop evaluate latest --held-out --dataset 3f9c

loraloop evaluate latest --against base --command "pytest -rA tests/agent"

loraloop evaluate latest --environment textcraft --option depths=1,2 --seeds 3

loraloop evaluate agent@http://127.0.0.1:8080 --against base@http://127.0.0.1:8080 --environment textcraft --json"""
MAX_REGRESSIONS = 10
"""How many are shown; the JSON has every task."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog=EXAMPLES)(evaluate)


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Its id, `latest`, or NAME@URL.", show_default=False)],
    project: ProjectOption = DEFAULT_PROJECT,
    against: Annotated[str, typer.Option(help="The other side: live, base, another model, or NAME@URL.")] = "live",
    environment: Annotated[str | None, typer.Option(help="Play the tasks of this suite.")] = None,
    tasks: Annotated[Path | None, typer.Option(help="Tasks to play, as JSON; without it the suite's own.")] = None,
    option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the suite; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many tasks, chosen by hash.")] = None,
    seeds: Annotated[int, typer.Option(help="Plays of each task by each side.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token; 0.7 with several seeds.")] = None,
    early: Annotated[bool, typer.Option("--early", help="End the plays as soon as they decide, by a sequential test.")] = False,
    command: Annotated[str | None, typer.Option(help="Run this for each side; it prints a score for each task.")] = None,
    command_timeout: Annotated[float, typer.Option(metavar="MINUTES", help="Of the command, for one side.")] = 60.0,
    held_out: Annotated[bool, typer.Option("--held-out", help="Measure held-out samples, too; alone where nothing else is named.")] = False,
    dataset: Annotated[str | None, typer.Option(help="Whose held-out samples; else of the candidate's training.")] = None,
    samples: Annotated[int, typer.Option(help="At most so many held-out samples of each ending.")] = 40,
    base: Annotated[str | None, typer.Option(help="Where the base model is; else where the training had it.")] = None,
    token: Annotated[str | None, typer.Option(envvar="LORALOOP_TOKEN", help="Of the server of NAME@URL.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as a page of HTML, too.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure afresh what is measured already.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a model against another on the same tasks. What was cut off goes on when the same is asked again."""
    from loraloop.base_model import tune_process
    from loraloop.evaluation import EvaluationOptions
    from loraloop.project import Project

    tune_process()
    options = EvaluationOptions(
        environment=environment,
        tasks=tasks,
        options=_to_options(option or []),
        limit=limit,
        seeds=seeds,
        temperature=temperature,
        early=early,
        command=command,
        command_timeout_s=60 * command_timeout,
        held_out=held_out,
        dataset=dataset,
        n_samples=samples,
        base=base,
        token=token,
        again=again,
        on_progress=ProgressLines().show,
    )
    if report is not None and report.is_dir():
        raise SettingsError(f"--report {report}: is a directory; expected the name of a file, such as {report / 'evaluation.html'}")
    with Project(project, create=False) as opened:
        found = opened.evaluate(model, against, options)
        if report is not None:
            opened.report_evaluation(found, report)
            err().print(f"the report is in {report}", markup=False)
    if as_json:
        write_line(found.model_dump_json())
    else:
        show_evaluation(found)
    show_next(f"loraloop models show {found.plan.candidate.name}", project)


def show_evaluation(evaluation: Evaluation) -> None:
    """The table of both sides, and the tasks of which the candidate made less."""
    plan = evaluation.plan
    columns = ["", "tasks", plan.candidate.name, plan.opponent.name, "difference", "interval", "won / lost / same", "p"]
    show_table(f"{evaluation.id}", columns, [_row(comparison) for comparison in evaluation.comparisons])
    lost = evaluation.primary.regressions
    if lost:
        rows = [[one.task, f"{one.candidate:g}", f"{one.opponent:g}"] for one in lost[:MAX_REGRESSIONS]]
        title = f"{len(lost)} tasks got worse" + (f", the first {MAX_REGRESSIONS}" if len(lost) > MAX_REGRESSIONS else "")
        show_table(title, ["task", plan.candidate.name, plan.opponent.name], rows)
    if evaluation.verdict is not None:
        write_text(f"by these scores alone: {evaluation.verdict.decision}; {evaluation.verdict.reason}")
    for note in evaluation.notes:
        write_text(f"note: {note}")


def _row(comparison: Comparison) -> list[str]:
    low, high = comparison.lower, comparison.upper
    return [
        comparison.name + ("" if comparison.higher_is_better else " (less is better)"),
        str(comparison.n),
        f"{comparison.candidate:.3f}",
        f"{comparison.opponent:.3f}",
        f"{comparison.difference:+.3f}",
        "-" if low is None or high is None else f"{low:+.3f} to {high:+.3f}",
        f"{comparison.wins} / {comparison.losses} / {comparison.ties}",
        f"{comparison.p_value:.2g}",
    ]


def _to_options(given: list[str]) -> dict[str, str]:
    pairs = [one.partition("=") for one in given]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise SettingsError(f"--option {name}: expected NAME=VALUE")
    return {name: value for name, _, value in pairs}


class ProgressLines:
    """Tells how far it is on standard error, at most once in a few seconds: a terminal's line over and over, a log's each anew."""

    def __init__(self, every_s: float = 5.0) -> None:
        self.every_s = every_s
        self.told = float("-inf")

    def show(self, progress: Progress) -> None:
        """One report."""
        now = time.monotonic()
        if now - self.told < self.every_s and progress.done < progress.total:
            return
        self.told = now
        left = "" if progress.eta_s is None else f", {progress.eta_s:.0f} s left"
        partial = ""
        if progress.partial:
            n = len(progress.partial)
            first, second = sum(one.candidate for one in progress.partial), sum(one.opponent for one in progress.partial)
            partial = f"; of {n} tasks so far: candidate {first:g}, opponent {second:g}"
        err().print(f"{progress.done} of {progress.total} {progress.what}{left}{partial}", markup=False)
