"""A verdict that may be looked at after every block of tasks, and stops as soon as it is certain.

A fixed test that is looked at ten times is wrong several times as often as its level says. Here the evidence is the wealth of a gambler
who bets on each task that the candidate is better, with fair odds if it is not: whoever stops whenever, the wealth ever reaches 1 / level
with a chance of at most `level` (Ville's inequality). Nothing is assumed but scores from 0 to 1 and that, with no true difference, no task
is expected to favour the candidate given those before; the differences may be skewed, where `paired` is approximate.

The wealth is the mean over a range of stakes, and the bounds are the means that such a gambler does not refute: Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting", JRSS B 86, 2024. The tasks must come in an order that does not depend on
their scores. The price is power (docs/gate.md); where the number of tasks is fixed before the first look, `planned` pays less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from loraloop.evaluate.paired import paired_difference
from loraloop.evaluate.verdict import Choice, Policy, Verdict, tasks_needed

STAKES = np.concatenate([np.geomspace(0.02, 0.3, 8), np.linspace(0.35, 0.95, 10)])
"""Shares of the wealth that are bet, each by a gambler of its own with an equal part: small ones find small differences."""
BISECTIONS = 40


class SequentialVerdict:
    """Takes in scores block by block; each look gives the verdict so far. What is once decided stays decided."""

    def __init__(self, policy: Policy | None = None, *, max_tasks: int | None = None) -> None:
        """`max_tasks` are all that can be played: then a held verdict says so."""
        self.policy = policy or Policy()
        self.max_tasks = max_tasks
        self._candidate: list[float] = []
        self._champion: list[float] = []
        self._lower, self._upper = -1.0, 1.0
        self._p_value = 1.0
        self._decided: Choice | None = None

    @property
    def decided(self) -> bool:
        """Whether no further task is needed, or none is left."""
        return self._decided is not None or (self.max_tasks is not None and len(self._candidate) >= self.max_tasks)

    def add(self, candidate: Sequence[float], champion: Sequence[float]) -> Verdict:
        """Take in the scores of the next tasks, one of each a task, and look. Raises EvaluationError as `paired_verdict` does.

        Then nothing is taken in. The bounds are those of all looks together: each only ever gets closer.
        """
        longer = [*self._candidate, *candidate], [*self._champion, *champion]
        found = paired_difference(*longer, self.policy.level, seed=self.policy.seed)
        self._candidate, self._champion = longer
        self._weigh(np.subtract(*longer, dtype=float))
        if self._decided is None and found.n >= self.policy.min_tasks:
            self._decided = "promote" if self._lower > 0 else "reject" if self._upper < 0 else None
        more = None if self.decided else self._more(found.difference, found.spread, found.n)
        told = found.model_dump(include={"difference", "n", "wins", "losses", "ties"})
        return Verdict(
            decision=self._decided or "hold",
            lower=self._lower,
            upper=self._upper,
            p_value=self._p_value,
            reason=self._reason(found.difference, found.n, more),
            more_tasks=more,
            **told,
        )

    def _weigh(self, differences: Any) -> None:
        """Bring the bounds and the p-value up to date with all differences so far, (tasks,)."""
        values, counts = np.unique(differences, return_counts=True)
        self._lower = max(self._lower, _lower_bound(values, counts, self.policy.level))
        self._upper = min(self._upper, -_lower_bound(-values, counts, self.policy.level))
        self._p_value = min(self._p_value, math.exp(-max(0.0, _log_wealth(values, counts, 0.0))))

    def _more(self, difference: float, spread: float, n: int) -> int:
        """As for the fixed test, for want of a formula; at least a block's worth."""
        sign = -1.0 if difference < 0 else 1.0
        assumed = sign * max(abs(difference), self.policy.smallest_difference)
        return max(1, self.policy.min_tasks - n, tasks_needed(assumed, spread, self.policy) - n)

    def _reason(self, difference: float, n: int, more: int | None) -> str:
        seen = f"after {n} tasks {difference:+.3f}, between {self._lower:+.3f} and {self._upper:+.3f} whenever one looks"
        if self._decided:
            return f"{seen}, at level {self.policy.level:g} for either side"
        if more is None:
            return f"{seen}; all {self.max_tasks} tasks are played and decide nothing"
        return f"{seen}; at least {more} more tasks are likely to be needed"


def _log_wealth(values: Any, counts: Any, mean: float) -> float:
    """The logarithm of the wealth against "the true difference is at most `mean`"; `values` from -1 to 1, each seen `counts` times."""
    gain = (1 + values) / (1 + mean) - 1  # (values,), at least -1
    logs = np.log1p(STAKES[:, None] * gain) @ counts  # (stakes,)
    top = float(logs.max())
    return top + math.log(float(np.exp(logs - top).mean()))


def _lower_bound(values: Any, counts: Any, level: float) -> float:
    """The least true difference that is not refuted at `level`: the wealth falls as the mean that is bet against rises."""
    refuted, kept = -1.0, 1.0
    for _ in range(BISECTIONS):
        middle = (refuted + kept) / 2
        if _log_wealth(values, counts, middle) >= -math.log(level):
            refuted = middle
        else:
            kept = middle
    return refuted
