"""An evaluation as one HTML file: everything is in it, nothing is fetched, and nothing in it runs.

Every text is escaped, and the page forbids scripts and all requests by itself, so that what a model said stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from loraloop.evaluate.result import SIDES, Comparison, Evaluation
from loraloop.evaluate.suite import Play, Plays
from loraloop.svg import BLUE, GREEN, GREY, ORANGE, TEXT, new_figure, to_svg

MAX_SHOWN = 10
"""Tasks that got worse, whose plays are shown whole."""
MAX_CHARACTERS = 8_000
"""Of a message; more is cut in the middle."""
MAX_LABEL = 40


@dataclass(frozen=True)
class ShownTask:
    """A task with what each side did."""

    task: str
    plays: Sequence[tuple[str, Play]]
    """(the side's name, its play), seed by seed."""


def to_html(evaluation: Evaluation, folder: Path | None = None) -> str:
    """The page; with the evaluation's folder also what was said in the tasks that got worse."""
    environment = Environment(
        loader=PackageLoader("loraloop.evaluate", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["short"] = _shorten
    shown = _lost_plays(evaluation, Plays(folder)) if folder is not None else []
    bounded = [one for one in evaluation.comparisons if one.higher_is_better and one.lower is not None]
    plots = [("Differences, with their 95 % intervals", _plot_differences(bounded))] if bounded else []
    plots.append((f"Task by task: {evaluation.primary.name}", _plot_tasks(evaluation.primary)))
    drawn = [(heading, Markup(svg)) for heading, svg in plots]  # noqa: S704  matplotlib escapes what it writes
    return environment.get_template("page.html").render(e=evaluation, plan=evaluation.plan, plots=drawn, shown=shown)


def _lost_plays(evaluation: Evaluation, plays: Plays) -> list[ShownTask]:
    names = {"candidate": evaluation.plan.candidate.name, "opponent": evaluation.plan.opponent.name}
    shown = []
    for lost in evaluation.primary.regressions[:MAX_SHOWN]:
        seeds = range(evaluation.plan.seeds)
        found = [(names[side], plays.find(side, lost.task, seed)) for seed in seeds for side in SIDES]
        kept = [(name, play) for name, play in found if play is not None]
        if kept:
            shown.append(ShownTask(lost.task, kept))
    return shown


def _plot_differences(comparisons: Sequence[Comparison]) -> str:
    """A point and its interval for each comparison in which more is better; what is on the right speaks for the candidate."""
    figure, axes = new_figure("candidate - opponent", "", height=0.7 + 0.35 * len(comparisons))
    for place, one in enumerate(reversed(comparisons)):
        assert one.lower is not None  # noqa: S101  chosen so
        assert one.upper is not None  # noqa: S101
        colour = GREEN if one.lower > 0 else ORANGE if one.upper < 0 else GREY
        axes.plot([one.lower, one.upper], [place, place], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot([one.difference], [place], "o", color=colour)
    axes.axvline(0, color=TEXT, linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(comparisons)), [_label(one.name) for one in reversed(comparisons)])
    axes.set_ylim(-0.6, len(comparisons) - 0.4)
    return to_svg(figure, "differences")


def _plot_tasks(comparison: Comparison) -> str:
    """The difference of each task, in order of size: how many were won and lost, and by how much."""
    sign = 1 if comparison.higher_is_better else -1
    differences = sorted((sign * (one.candidate - one.opponent) for one in comparison.scores), reverse=True)
    figure, axes = new_figure("tasks, the most improved first", "better by")
    colours = [BLUE if difference > 0 else ORANGE for difference in differences]
    axes.bar(range(len(differences)), differences, width=1.0, color=colours)
    axes.axhline(0, color=TEXT, linewidth=0.8)
    return to_svg(figure, "tasks")


def _label(text: str) -> str:
    return text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"


def _shorten(text: str | None) -> str:
    text = text or ""
    half = MAX_CHARACTERS // 2
    return text if len(text) <= MAX_CHARACTERS else f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"
