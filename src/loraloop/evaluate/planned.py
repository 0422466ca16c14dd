"""A verdict that is looked at after every block of a number of tasks that was fixed before: it costs little power to look.

The chance of a false promotion is spent over the looks, level x (share of the planned tasks that are played) squared (Kim and DeMets,
"Design and analysis of group sequential tests based on the type I error spending rate function", Biometrika 74, 1987). The test is the
sign-flip test of all looks together: the path of the sum of differences is compared with the paths that random signs give, and at each
look those with the largest sums leave, as many as are spent. That is exact, for won and lost tasks and for graded scores, where candidate
and champion are exchangeable on each task when neither is better; for skewed differences see `sequential`. The bounds are those of the
fixed test at the part of the level that a look spends, except that 0 is refuted by the paths: flips about another mean would take for
granted that won and lost tasks are symmetric about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from loraloop.errors import EvaluationError
from loraloop.evaluate.paired import paired_difference
from loraloop.evaluate.sequential import SequentialVerdict
from loraloop.evaluate.verdict import Policy, Verdict

N_PATHS = 4999
"""Random paths besides the one that was seen."""
TINY = 1e-9
"""Sums of equal differences in another order are equal."""
NEXT_TO_ZERO = float(np.nextafter(0.0, 1.0))
"""A bound where 0 is refuted and nothing beyond it."""


class PlannedVerdict(SequentialVerdict):
    """Takes in scores block by block, of `tasks` tasks in all; each look gives the verdict so far. What is once decided stays decided."""

    def __init__(self, tasks: int, policy: Policy | None = None) -> None:
        """Raises EvaluationError for a plan with fewer tasks than the policy's least: nothing could be decided."""
        super().__init__(policy, max_tasks=tasks)
        if tasks < self.policy.min_tasks:
            raise EvaluationError(f"a plan of {tasks} tasks decides nothing, as {self.policy.min_tasks} are the least; plan more of them")
        self.tasks = tasks
        random = np.random.default_rng([self.policy.seed, tasks])
        self._signs = random.integers(0, 2, (N_PATHS + 1, tasks), dtype=np.int8) * 2.0 - 1  # (paths, tasks)
        self._signs[0] = 1  # the path that was seen
        self._looks: list[int] = []

    def add(self, candidate: Sequence[float], champion: Sequence[float]) -> Verdict:
        """As `SequentialVerdict.add`. Raises EvaluationError for more tasks than were planned: the level was spent on those."""
        if len(self._candidate) + len(candidate) > self.tasks:
            raise EvaluationError(f"{len(self._candidate)} of {self.tasks} planned tasks are in, and {len(candidate)} more are too many")
        return super().add(candidate, champion)

    def _weigh(self, differences: Any) -> None:
        n = len(differences)
        if n < self.policy.min_tasks:
            return  # a look that cannot decide spends nothing
        self._looks.append(n)
        ends = pairwise([0, *self._looks])
        sums = np.cumsum([self._signs[:, start:end] @ differences[start:end] for start, end in ends], axis=0)  # (looks, paths)
        better, self._p_value = self._test(sums)
        worse, _ = self._test(-sums)
        before = self._spent(self._looks[-2]) if len(self._looks) > 1 else 0.0
        level = self._spent(n) - before
        found = paired_difference(self._candidate, self._champion, level, seed=self.policy.seed)
        self._lower = max(self._lower, found.lower, NEXT_TO_ZERO) if better else min(0.0, max(self._lower, found.lower))
        self._upper = min(self._upper, found.upper, -NEXT_TO_ZERO) if worse else max(0.0, min(self._upper, found.upper))

    def _spent(self, n: int) -> float:
        """The part of the level that is spent when `n` tasks are in."""
        return self.policy.level * (n / self.tasks) ** 2

    def _test(self, sums: Any) -> tuple[bool, float]:
        """(whether the path that was seen leaves at one of the looks, its p-value at the last look or where it leaves)."""
        alive = np.ones(N_PATHS + 1, dtype=bool)
        n_left, p_value = 0, 1.0
        for n, now in zip(self._looks, sums, strict=True):
            spent = int(self._spent(n) * (N_PATHS + 1) + TINY)
            as_high = now >= now[0] - TINY
            p_value = (n_left + int((alive & as_high).sum())) / (N_PATHS + 1)
            room = spent - n_left
            if room > 0:
                standing = np.sort(now[alive])[::-1]
                limit = standing[room] if room < len(standing) else -np.inf  # the first that must stay, and all equal to it
                leaving = alive & (now > limit + TINY)
                if leaving[0]:
                    return True, p_value
                n_left += int(leaving.sum())
                alive &= ~leaving
        return False, p_value
