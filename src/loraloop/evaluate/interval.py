"""Success rates with exact intervals, and an exact test for two players on the same tasks (all from scipy)."""

from __future__ import annotations

from collections.abc import Sequence

from loraloop.episode import Frozen
from loraloop.errors import EvaluationError


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
