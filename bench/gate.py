"""How often the gate is wrong, and how often it is right: `python -m bench.gate [--candidates N]`.

Simulated candidates are judged by the very functions that judge real ones. Without a true difference a promotion is false; the rest of
each table tells what is found, and after how many tasks the sequential test ends. Seeds are fixed: the same machine or another prints
the same figures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from loraloop.episode import Frozen
from loraloop.evaluate.interval import success_rate
from loraloop.evaluate.sequential import SequentialVerdict
from loraloop.evaluate.verdict import Policy, paired_verdict

BLOCK_TASKS = 10
Scores = tuple[np.ndarray, np.ndarray]


class Case(Frozen):
    """One kind of candidate."""

    name: str
    n: int
    """Tasks."""
    won: float = 0.0
    """The chance that the candidate alone solves a task."""
    lost: float = 0.0
    graded: bool = False
    sequential: bool = False


class Rates(Frozen):
    """What became of the candidates of one kind."""

    case: Case
    promoted: int
    rejected: int
    candidates: int
    mean_tasks: float
    """Tasks that were looked at until the verdict."""


SHARES = (0.025, 0.1, 0.25, 0.45)
CHANCES = ((0.2, 0.1), (0.3, 0.1), (0.3, 0.0))
NO_DIFFERENCE = [Case(name=f"{2 * share:.0%} differ", n=n, won=share, lost=share) for n in (20, 50, 200, 1000) for share in SHARES]
BETTER = [Case(name=f"{won:.0%} won, {lost:.0%} lost", n=n, won=won, lost=lost) for n in (50, 100, 200, 400) for won, lost in CHANCES]
ALL_TIES = [Case(name="all ties", n=n) for n in (20, 200)]
GRADED = [Case(name="graded", n=n, graded=True) for n in (20, 50, 200)]
LOOKED_AT = (NO_DIFFERENCE[9], NO_DIFFERENCE[11], *BETTER[6:10])
SEQUENTIAL = [case.model_copy(update={"sequential": True}) for case in LOOKED_AT]


def simulate(case: Case, candidates: int, seed: int = 0) -> Rates:
    """Judge `candidates` of the kind."""
    random = np.random.default_rng([seed, case.n, int(1000 * case.won), int(1000 * case.lost)])
    judge = judge_in_blocks if case.sequential else judge_at_once
    ended = [judge(first, second) for first, second in draw(case, candidates, random)]
    decisions = [decision for decision, _ in ended]
    return Rates(
        case=case,
        promoted=decisions.count("promote"),
        rejected=decisions.count("reject"),
        candidates=candidates,
        mean_tasks=float(np.mean([n for _, n in ended])),
    )


def draw(case: Case, candidates: int, random: np.random.Generator) -> Iterator[Scores]:
    """The scores of each candidate and of the champion."""
    for _ in range(candidates):
        if case.graded:
            scores = random.beta(0.5, 0.7, (2, case.n)).round(2)
            yield scores[0], scores[1]
            continue
        told = random.choice(4, case.n, p=[case.won, case.lost, (1 - case.won - case.lost) / 2, (1 - case.won - case.lost) / 2])
        yield (told == 0) | (told == 2), (told == 1) | (told == 2)


def judge_at_once(candidate: np.ndarray, champion: np.ndarray) -> tuple[str, int]:
    """(decision, tasks) of the fixed test."""
    verdict = paired_verdict(candidate.tolist(), champion.tolist())
    return verdict.decision, verdict.n


def judge_in_blocks(candidate: np.ndarray, champion: np.ndarray) -> tuple[str, int]:
    """(decision, tasks) of a test that is looked at after every block, and stops when it is decided."""
    sequence = SequentialVerdict(max_tasks=len(candidate))
    for at in range(0, len(candidate), BLOCK_TASKS):
        verdict = sequence.add(candidate[at : at + BLOCK_TASKS].tolist(), champion[at : at + BLOCK_TASKS].tolist())
        if sequence.decided:
            break
    return verdict.decision, verdict.n


def to_markdown(title: str, rates: Sequence[Rates]) -> str:
    """A table, a row a kind of candidate, with the exact 95 % interval of the rate of promotion."""
    lines = [f"| {title} | tasks | promoted | 95 % interval | rejected | tasks looked at |", "|---|---:|---:|---|---:|---:|"]
    for one in rates:
        rate = success_rate([True] * one.promoted + [False] * (one.candidates - one.promoted))
        shown = f"{rate.rate:.1%} | {rate.low:.1%} to {rate.high:.1%} | {one.rejected / one.candidates:.1%} | {one.mean_tasks:.0f}"
        lines.append(f"| {one.case.name} | {one.case.n} | {shown} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description="Error rates of the gate, by simulation.")
    parser.add_argument("--candidates", type=int, default=2000, help="how many of each kind")
    parser.add_argument("--sequential", type=int, default=300, help="how many of each kind for the sequential test, which costs more")
    told = parser.parse_args(arguments)
    began = time.monotonic()
    print(f"{told.candidates} candidates of each kind, {told.sequential} in blocks of {BLOCK_TASKS} tasks; level {Policy().level:g}\n")
    tables = [
        ("no true difference", [*NO_DIFFERENCE, *ALL_TIES, *GRADED]),
        ("a true difference", BETTER),
        ("looked at after every block", SEQUENTIAL),
    ]
    for title, cases in tables:
        rates = [simulate(case, told.sequential if case.sequential else told.candidates) for case in cases]
        print(to_markdown(title, rates), flush=True)
        print()
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
