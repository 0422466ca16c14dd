"""Success rates with exact intervals, and what tells two players on the same tasks apart (all from scipy)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from loraloop.episode import Frozen
from loraloop.errors import EvaluationError

RESAMPLES = 9_999


class SuccessRate(Frozen):
    """Wins out of n plays, with the exact (Clopper-Pearson) interval of the true rate."""

    wins: int
    n: int
    low: float
    high: float
    confidence: float

    @property
    def rate(self) -> float:
        """The share of wins."""
        return self.wins / self.n


class PairedComparison(Frozen):
    """Two players on the same tasks: who won where the other did not, and the exact McNemar test of that difference."""

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float
    """Two-sided: how likely a split of the differing tasks this uneven is when the players are equal."""


class PairedDifference(Frozen):
    """How far apart two players are on the same tasks: means, the mean difference with its interval, and an exact test of its sign."""

    n: int
    first: float
    second: float
    difference: float
    low: float | None
    """None for a single task."""
    high: float | None
    confidence: float
    higher: int
    """Tasks of which the first made more."""
    lower_n: int
    """Tasks of which the second made more."""
    p_value: float
    """Two-sided exact sign test over the tasks that differ: McNemar's where each task is won or lost."""


def success_rate(wins: Sequence[bool], confidence: float = 0.95) -> SuccessRate:
    """The rate of `wins` and its interval. Raises EvaluationError when there are no plays."""
    from scipy.stats import binomtest

    if not wins:
        raise EvaluationError("no plays to count")
    interval = binomtest(sum(wins), len(wins)).proportion_ci(confidence_level=confidence, method="exact")
    return SuccessRate(wins=sum(wins), n=len(wins), low=float(interval.low), high=float(interval.high), confidence=confidence)


def compare_paired(first: Sequence[bool], second: Sequence[bool]) -> PairedComparison:
    """Compare two players task by task. Raises EvaluationError when they did not play the same number of tasks."""
    from scipy.stats import binomtest

    if len(first) != len(second) or not first:
        raise EvaluationError(f"expected two equal, not empty lists of plays, found {len(first)} and {len(second)}")
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    differing = only_first + only_second
    return PairedComparison(
        both=sum(a and b for a, b in pairs),
        only_first=only_first,
        only_second=only_second,
        neither=sum(not a and not b for a, b in pairs),
        p_value=float(binomtest(only_first, differing).pvalue) if differing else 1.0,
    )


def estimate_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> PairedDifference:
    """The mean of first - second, paired by task.

    The interval is a paired bootstrap's (BCa, or percentile where that is not defined), the same for the same scores. Where each task
    is won or lost and none or all differ the same way, resampling would show no spread: there it is the exact (Clopper-Pearson)
    interval of the share that differs. Raises EvaluationError for lists of unequal length, none at all, and what is not finite.
    """
    from scipy.stats import binomtest

    if len(first) != len(second) or not first:
        raise EvaluationError(f"expected two equal, not empty lists of scores, found {len(first)} and {len(second)}")
    for place, pair in enumerate(zip(first, second, strict=True)):
        if not all(math.isfinite(value) for value in pair):
            raise EvaluationError(f"the scores of task number {place} are {pair[0]} and {pair[1]}; expected finite numbers")
    differences = [float(a) - float(b) for a, b in zip(first, second, strict=True)]
    higher, lower = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    low, high = _interval(differences, confidence, is_binary=all(value in {0, 1} for value in (*first, *second)))
    return PairedDifference(
        n=len(differences),
        first=math.fsum(first) / len(first),
        second=math.fsum(second) / len(second),
        difference=math.fsum(differences) / len(differences),
        low=low,
        high=high,
        confidence=confidence,
        higher=higher,
        lower_n=lower,
        p_value=float(binomtest(higher, higher + lower).pvalue) if higher + lower else 1.0,
    )


def _interval(differences: Sequence[float], confidence: float, *, is_binary: bool) -> tuple[float | None, float | None]:
    """(low, high) of the mean of `differences`."""
    from scipy.stats import binomtest, bootstrap

    n = len(differences)
    if n == 1:
        return None, None
    if len(set(differences)) == 1:
        if not is_binary:
            return differences[0], differences[0]
        share = binomtest(round(n * abs(differences[0])), n).proportion_ci(confidence_level=confidence, method="exact")
        if differences[0] == 0:
            return -float(share.high), float(share.high)
        bounds = sorted((math.copysign(share.low, differences[0]), math.copysign(share.high, differences[0])))
        return float(bounds[0]), float(bounds[1])
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a degenerate distribution, for which the next method is there
            told = bootstrap(
                (differences,),
                lambda sample, axis: sample.mean(axis=axis),
                confidence_level=confidence,
                n_resamples=RESAMPLES,
                method=method,
                rng=0,
                batch=500,
            )
        low, high = (float(bound) for bound in told.confidence_interval)
        if math.isfinite(low) and math.isfinite(high):
            return low, high
    raise EvaluationError("the bootstrap gives no interval for these differences")
