"""The difference of two players on the same tasks, with bounds that are inverted tests: a bound above 0 is a rejected "no better".

Won or lost tasks: the exact McNemar test, which is a sign test of the tasks that only one has won. Its bounds are the exact
(Clopper-Pearson) bound of the share of those that the candidate has won, times a bound of how many such tasks there are.

Graded scores: the sign-flip test of the differences, inverted. A flip moves the mean past δ exactly if the mean over the flipped tasks is
at most δ, so the bounds are quantiles of the means over random subsets of the tasks (Hartigan, "Using subsample values as typical
values", JASA 64, 1969). Exact where candidate and champion are exchangeable on each task when neither is better; for differences whose
distribution is skewed it is approximate, and with fewer than 30 tasks it can be far too hopeful: there look at `sequential`, which assumes
nothing but the range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from loraloop.episode import Frozen
from loraloop.errors import EvaluationError

N_SUBSETS = 4999
"""Random subsets of the tasks; the test is exact with any number, more make it repeat itself better."""
BLOCK_TASKS = 512
MAX_LISTED = 12
"""Up to so many tasks all subsets are looked at."""


class Difference(Frozen):
    """Candidate minus champion, in the unit of the scores."""

    difference: float
    """The mean over the tasks."""
    lower: float
    """One-sided: the true difference is below it with a chance of at most the level."""
    upper: float
    """One-sided likewise, from above."""
    p_value: float
    """The chance of so large a difference when the candidate is no better. At most the level exactly if `lower` is above 0."""
    p_value_worse: float
    """The same for the other side."""
    n: int
    """Tasks."""
    wins: int
    """Tasks on which the candidate's score is higher."""
    losses: int
    ties: int
    spread: float
    """The mean square of the differences: for won and lost tasks the share of those that only one has won."""
    graded: bool
    """False when every score is 0 or 1."""


def check_scores(name: str, scores: Sequence[float], *, bounded: bool = True) -> list[float]:
    """`scores` as floats. Raises EvaluationError naming the place of one that is no number, or when `bounded` not from 0 to 1."""
    checked = []
    for place, score in enumerate(scores):
        try:
            value = float(score)
        except (TypeError, ValueError) as error:
            raise EvaluationError(f"{name}[{place}] is {score!r}; expected a number from 0 to 1, or True or False") from error
        if not math.isfinite(value):
            raise EvaluationError(f"{name}[{place}] is {value}; leave out of both lists the tasks that have no score")
        if bounded and not 0 <= value <= 1:
            raise EvaluationError(f"{name}[{place}] is {value}; expected 0 to 1: divide the scores by the highest that there is")
        checked.append(value)
    return checked


def paired_difference(
    candidate: Sequence[float], champion: Sequence[float], level: float, *, bounded: bool = True, seed: int = 0
) -> Difference:
    """Compare two lists of scores, one of each a task, in the same order; each bound is wrong with a chance of at most `level`.

    The same scores and seed give the same figures. Raises EvaluationError for no tasks, lists of different lengths, and scores that are no
    finite numbers, or when `bounded` not from 0 to 1.
    """
    if len(candidate) != len(champion):
        raise EvaluationError(
            f"the candidate has {len(candidate)} scores and the champion {len(champion)}; expected one of each for every task, in one order"
        )
    if not len(candidate):  # an array has no truth of its own
        raise EvaluationError("there are no tasks to compare on; expected at least one score of each")
    first, second = check_scores("candidate", candidate, bounded=bounded), check_scores("champion", champion, bounded=bounded)
    differences = [a - b for a, b in zip(first, second, strict=True)]
    graded = not {*first, *second} <= {0.0, 1.0}
    counts = {"wins": sum(d > 0 for d in differences), "losses": sum(d < 0 for d in differences), "ties": differences.count(0.0)}
    span = 1.0 if bounded else max(*first, *second) - min(*first, *second)
    p, p_worse, lower, upper = (
        _graded(differences, level, span, seed) if graded else _binary(counts["wins"], counts["losses"], len(first), level)
    )
    n = len(differences)
    return Difference(
        difference=math.fsum(differences) / n,
        lower=lower,
        upper=upper,
        p_value=p,
        p_value_worse=p_worse,
        n=n,
        spread=math.fsum(d * d for d in differences) / n,
        graded=graded,
        **counts,
    )


def _binary(wins: int, losses: int, n: int, level: float) -> tuple[float, float, float, float]:
    """(p, p for worse, lower, upper) of the exact sign test."""
    differing = wins + losses
    fewest, most = _share_bounds(differing, n, level)
    share_low, share_high = _share_bounds(wins, differing, level)
    better, worse = _product(2 * share_low - 1, fewest, most), _product(1 - 2 * share_high, fewest, most)
    return _tail(wins, differing), _tail(losses, differing), better, -worse


def _tail(at_least: int, of: int) -> float:
    """The chance of `at_least` heads or more in so many throws of a fair coin."""
    from scipy.special import bdtrc

    return float(bdtrc(at_least - 1, of, 0.5)) if at_least else 1.0


def _share_bounds(count: int, of: int, level: float) -> tuple[float, float]:
    """The exact (Clopper-Pearson) one-sided bounds of a share, each wrong with a chance of at most `level`."""
    from scipy.special import betaincinv

    low = float(betaincinv(count, of - count + 1, level)) if count else 0.0
    high = float(betaincinv(count + 1, of - count, 1 - level)) if count < of else 1.0
    return low, high


def _product(excess: float, fewest: float, most: float) -> float:
    """The lower bound of excess x share: whichever share is less favourable."""
    return excess * (fewest if excess > 0 else most)


def _graded(differences: Sequence[float], level: float, span: float, seed: int) -> tuple[float, float, float, float]:
    """(p, p for worse, lower, upper) of the sign-flip test; bounds that so few tasks cannot give are the whole `span`."""
    values = np.asarray(differences)
    means = np.sort(_subset_means(values, seed))
    n_subsets = len(means)
    keep = math.floor(level * (n_subsets + 1) + 1e-9)
    tiny = 1e-12 * max(span, 1.0)  # sums of equal differences in another order are equal
    p = (1 + int((means <= tiny).sum())) / (n_subsets + 1)
    p_worse = (1 + int((means >= -tiny).sum())) / (n_subsets + 1)
    if keep == 0:
        return p, p_worse, -span, span
    lower, upper = float(means[keep - 1]), float(means[n_subsets - keep])
    return p, p_worse, max(lower if abs(lower) > tiny else 0.0, -span), min(upper if abs(upper) > tiny else 0.0, span)


def _subset_means(values: Any, seed: int) -> Any:
    """The means over all subsets with a task in them, or over N_SUBSETS random ones; (subsets,)."""
    n = len(values)
    if n <= MAX_LISTED:
        numbers = np.arange(1, 2**n, dtype=np.uint32)
        subsets = (numbers[:, None] >> np.arange(n, dtype=np.uint32)) & 1  # (subsets, tasks)
        return (subsets @ values) / subsets.sum(axis=1)
    sums, sizes = np.zeros(N_SUBSETS), np.zeros(N_SUBSETS)
    for at in range(0, n, BLOCK_TASKS):  # a block at a time, so that memory does not grow with the tasks
        part = values[at : at + BLOCK_TASKS]
        subsets = _random_subsets(len(part), seed, at)
        sums, sizes = sums + subsets @ part, sizes + subsets.sum(axis=1)
    return sums / np.maximum(sizes, 1)  # an empty subset, one in 2**n, counts as a mean of 0: against either side


@lru_cache(maxsize=4)
def _random_subsets(n: int, seed: int, at: int) -> Any:
    """Rows of 0 and 1, the same for the same arguments; (subsets, tasks)."""
    drawn = np.random.default_rng([seed, n, at]).bytes(N_SUBSETS * ((n + 7) // 8))
    bits = np.frombuffer(drawn, dtype=np.uint8).reshape(N_SUBSETS, -1)
    return np.unpackbits(bits, axis=1, count=n).astype(np.float64)
