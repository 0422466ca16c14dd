"""What came of a run, read from the project and from the agent's own notes: generations, stages and their times, requests, a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from demo.loop.plan import ALIAS, PLAYS, PROJECT
from loraloop.daemon.state import Stage, iter_moves
from loraloop.evaluate.interval import PairedDifference, SuccessRate, estimate_difference, success_rate
from loraloop.files import read_jsonl
from loraloop.project import Project


@dataclass(frozen=True)
class Generation:
    """One candidate, or the base model, on the goals that no dataset has."""

    number: int
    """0 is the base model."""
    model: str
    n_samples: int = 0
    n_own: int = 0
    """Of the samples those that the agent played itself."""
    wins: tuple[bool, ...] = ()
    """By goal that every generation was judged on, in one order."""
    decision: str = ""
    reason: str = ""
    champion: str = ""
    """What it was judged against."""

    @property
    def rate(self) -> SuccessRate:
        """How often it won."""
        return success_rate(self.wins)


@dataclass(frozen=True)
class Span:
    """One stage, from when it was entered to when it was left."""

    round: int
    stage: str
    began: float
    """Seconds after the run began."""
    seconds: float


def read_generations(directory: Path) -> list[Generation]:
    """The base model and every candidate that was judged, in order; nothing before the first was."""
    with Project(directory / PROJECT, create=False) as project:
        evaluations = {one.id: one for one in project.list_evaluations()}
        moves = [move for move in iter_moves(project.store.ledger, ALIAS) if move.data["from"] == Stage.EVALUATE]
        models = {str(move.data["model"]): project.get_model(str(move.data["model"])) for move in moves}
    judged = [(move.data, evaluations[str(move.data["evaluation"])]) for move in moves if move.data.get("evaluation") in evaluations]
    played = [{score.task for score in evaluation.primary.scores} for _, evaluation in judged]
    common = sorted(set.intersection(*played)) if played else []  # a goal that reads like one that was trained on is left out by the gate
    found: list[Generation] = []
    for told, evaluation in judged:
        scores = {score.task: score for score in evaluation.primary.scores}
        if not found:
            found.append(Generation(0, "base", wins=tuple(scores[task].opponent > 0 for task in common)))
        model = models[str(told["model"])]
        one = Generation(
            number=len(found),
            model=model.id,
            n_samples=model.sample_count,
            n_own=sum(str(episode).startswith("play-") for episode in model.episode_ids),
            wins=tuple(scores[task].candidate > 0 for task in common),
            decision=str(told["decision"]),
            reason=str(told["reason"]),
            champion=evaluation.plan.opponent.name,
        )
        found.append(one)
    return found


def read_spans(directory: Path, began: float) -> list[Span]:
    """What the loop did when; `began` in Unix seconds."""
    with Project(directory / PROJECT, create=False) as project:
        moves = list(iter_moves(project.store.ledger, ALIAS))
    spans = [Span(1, str(Stage.COLLECT), 0.0, moves[0].at / 1000 - began)] if moves else []
    for move, following in pairwise(moves):
        at, until = move.at / 1000, following.at / 1000
        spans.append(Span(int(str(move.data["round"])), str(move.data["to"]), at - began, until - at))
    return spans


def compare(generations: Sequence[Generation]) -> list[tuple[Generation, Generation, PairedDifference]]:
    """Each generation beside the one before, goal by goal."""
    return [(second, first, estimate_difference(second.wins, first.wins)) for first, second in pairwise(generations)]


def tabulate(generations: Sequence[Generation]) -> Table:
    """The table of generations."""
    table = Table(title="Goals that no dataset has, greedy play", title_justify="left")
    for column in ("generation", "learned from", "goals reached", "exact 95 % interval", "beside the one before", "the gate"):
        table.add_column(column)
    before = {second.number: difference for second, _, difference in compare(generations)}
    for one in generations:
        rate, told = one.rate, ""
        if (found := before.get(one.number)) is not None:
            told = f"{found.difference:+.1%}, {_interval(found)}; won {found.higher}, lost {found.lower_n}, p = {found.p_value:.2g}"
        learned = f"{one.n_samples - one.n_own} recorded, {one.n_own} of its own" if one.number else ""
        reached = f"{rate.wins} of {rate.n} = {rate.rate:.1%}"
        name = f"{one.number}: {one.model}" if one.number else "base model"
        table.add_row(name, learned, reached, f"{rate.low:.1%} to {rate.high:.1%}", told, one.decision)
    return table


def tabulate_spans(spans: Sequence[Span]) -> Table:
    """Where the time went."""
    table = Table(title="Where the time went", title_justify="left")
    for column in ("round", "stage", "began after", "took"):
        table.add_column(column, justify="right" if column != "stage" else "left")
    for span in spans:
        table.add_row(str(span.round), span.stage, f"{span.began:.0f} s", f"{span.seconds:.0f} s")
    return table


def read_plays(directory: Path) -> list[dict[str, Any]]:
    """The agent's notes of its finished plays."""
    path = directory / PLAYS
    return list(read_jsonl(path, skip_torn=True)) if path.exists() else []


def tell_requests(plays: Sequence[dict[str, Any]]) -> list[str]:
    """What the agent met, in words: requests and failures, and how its plays of training goals went by what answered."""
    requests, failures = sum(play["requests"] for play in plays), [failure for play in plays for failure in play["failures"]]
    told = [f"{len(plays)} plays of training goals, {requests} requests, {len(failures)} failed"]
    told += [f"  {count} times {failure}" for failure, count in Counter(failures).most_common(5)]
    by_version: dict[str, list[bool]] = {}
    for play in plays:
        by_version.setdefault(play["version"], []).append(play["won"])
    for version, wins in by_version.items():
        told.append(f"  {version}: reached {sum(wins)} of {len(wins)}")
    return told


def draw(generations: Sequence[Generation], plays: Sequence[dict[str, Any]], began: float, path: Path) -> None:
    """Success on held-out goals by generation, and of the plays through the router over time; `path` and the same with .png."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    rates = [one.rate for one in generations]
    places = [one.number for one in generations]
    errors = [[rate.rate - rate.low for rate in rates], [rate.high - rate.rate for rate in rates]]
    left.errorbar(places, [rate.rate for rate in rates], yerr=errors, fmt="o-", color="#27518f", ecolor="#b9c6dd", elinewidth=4, capsize=0)
    left.set_xticks(places, ["base" if not one.number else f"{one.number}\n{one.decision}" for one in generations])
    left.set_xlabel("generation")
    left.set_ylabel("goals reached")
    left.set_title("goals that no dataset has, exact 95 % intervals", fontsize=10)
    left.set_ylim(0, 1)
    window = 40
    ordered = sorted(plays, key=lambda play: play["at"])
    recent = [ordered[max(0, number - window) : number] for number in range(1, len(ordered) + 1)]
    means = [sum(play["won"] for play in part) / len(part) for part in recent]
    right.plot([(play["at"] - began) / 60 for play in ordered], means, color="#27518f")
    for before, after in pairwise(ordered):
        if before["version"] != after["version"] and "," not in before["version"] + after["version"]:
            right.axvline((after["at"] - began) / 60, color="#c2571a", linewidth=0.8)
    right.set_xlabel("minutes (lines: what answers was switched)")
    right.set_title(f"plays of training goals through the router, mean of {window}", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)


def to_json(generations: Sequence[Generation], spans: Sequence[Span], plays: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All figures."""
    return {
        "generations": [{**vars(one), "reached": one.rate.rate, "low": one.rate.low, "high": one.rate.high} for one in generations],
        "compared": [
            {"generation": second.number, "with": first.number, **found.model_dump()} for second, first, found in compare(generations)
        ],
        "stages": [vars(span) for span in spans],
        "plays": len(plays),
        "requests": sum(play["requests"] for play in plays),
        "failures": [failure for play in plays for failure in play["failures"]],
    }


def _interval(found: PairedDifference) -> str:
    return "no interval" if found.low is None or found.high is None else f"{found.low:+.1%} to {found.high:+.1%}"
