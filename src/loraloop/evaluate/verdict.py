"""The verdict on a candidate: promote, hold or reject, with the interval that decided it.

Promoted is what is proven better, rejected what is proven worse; all else is held, with the number of tasks that would decide. The error
rates are those of the tests in `paired`, measured in docs/gate.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from loraloop.episode import Frozen
from loraloop.evaluate.paired import Difference, paired_difference

Choice = Literal["promote", "hold", "reject"]


class Policy(Frozen):
    """What has to be shown before a candidate goes live."""

    level: float = Field(default=0.04, gt=0, lt=0.5)
    """The chance, at most, that a candidate without a true difference is promoted; that one is rejected is as likely again.

    Below 0.05, so that among 2,000 such candidates chance does not carry the count beyond 5 %.
    """
    min_tasks: int = Field(default=20, ge=1)
    """With fewer tasks nothing is decided, whatever they show."""
    smallest_difference: float = Field(default=0.05, gt=0, le=1)
    """The least improvement that is worth measuring for; says how many tasks are still needed where less was seen."""
    power: float = Field(default=0.8, gt=0, lt=1)
    """The chance of a decision with the tasks that are said to be needed, if the difference is what is assumed."""
    guards: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Metrics that must not fall, each with the fall that is borne, in its own unit; higher is better."""
    required: tuple[Literal["contamination", "probes"], ...] = ("contamination", "probes")
    """What must have been looked at: otherwise a candidate is held."""
    seed: int = Field(default=0, ge=0)
    """Of the random subsets of tasks for graded scores."""


class Finding(Frozen):
    """One thing that was looked at."""

    check: str
    """`improvement`, `min_tasks`, `guard:<metric>`, `contamination`, `probe:<kind>`."""
    choice: Choice
    """What the candidate would become by this alone."""
    message: str
    """What was found, and the way out where there is one."""
    more_tasks: int | None = None
    """With hold: so many more tasks are likely to decide it; None where tasks do not help."""


class Override(Frozen):
    """A verdict that a person has put aside."""

    reason: str
    instead_of: Choice


class Verdict(Frozen):
    """What becomes of a candidate, and why."""

    decision: Choice
    difference: float
    """Candidate minus champion, the mean over the tasks."""
    lower: float
    """One-sided bound of the true difference at the policy's level; above 0 exactly if the candidate is proven better."""
    upper: float
    """The same from above; below 0 exactly if it is proven worse."""
    n: int
    """Tasks."""
    p_value: float
    """One-sided: the chance of so large an improvement without a true one."""
    wins: int
    losses: int
    ties: int
    reason: str
    """One sentence: what decided."""
    more_tasks: int | None = None
    """With hold: so many more tasks are likely to decide, if the difference is as `reason` assumes. None where tasks do not help."""
    findings: tuple[Finding, ...] = ()
    """Every check by name, when more than the scores was looked at."""
    overridden: Override | None = None


def paired_verdict(candidate: Sequence[float], champion: Sequence[float], policy: Policy | None = None) -> Verdict:
    """Judge a candidate by its scores and the champion's on the same tasks, in the same order: True and False, or 0 to 1.

    Raises EvaluationError for no tasks, lists of different lengths, and a score that is not from 0 to 1, naming its place.
    """
    policy = policy or Policy()
    found = paired_difference(candidate, champion, policy.level, seed=policy.seed)
    decision, reason, more = _decide(found, policy)
    told = found.model_dump(include={"difference", "lower", "upper", "n", "p_value", "wins", "losses", "ties"})
    return Verdict(decision=decision, reason=reason, more_tasks=more, **told)


def tasks_needed(difference: float, spread: float, policy: Policy) -> int:
    """How many tasks decide with the policy's power, when the true difference and mean square of the differences are these.

    Connor, "Sample size for testing differences in proportions for the paired-sample design", Biometrics 43, 1987; for graded scores
    the same formula of the normal approximation.
    """
    from scipy.stats import norm

    spread = max(spread, abs(difference))  # wins alone make the difference: no fewer tasks than that can differ
    deviation = math.sqrt(max(spread - difference**2, 0.0))
    reach = float(norm.isf(policy.level)) * math.sqrt(spread) + float(norm.ppf(policy.power)) * deviation
    exact = 1 / abs(difference)  # the exact test needs about one differing task more than the approximation
    return max(policy.min_tasks, math.ceil((reach / difference) ** 2 + exact))


def _decide(found: Difference, policy: Policy) -> tuple[Choice, str, int | None]:
    seen = f"better on {found.wins} tasks, worse on {found.losses}, equal on {found.ties} of {found.n}: {found.difference:+.3f}"
    if found.n < policy.min_tasks:
        more = policy.min_tasks - found.n
        return "hold", f"{found.n} tasks are too few to decide on, {policy.min_tasks} are the least; {seen}", more
    if found.p_value <= policy.level:
        return "promote", f"{seen}, at least {found.lower:+.3f} at level {policy.level:g}", None
    if found.p_value_worse <= policy.level:
        return "reject", f"{seen}, at most {found.upper:+.3f} at level {policy.level:g}", None
    assumed, spread, more = _look_ahead(found, policy)
    between = f"the true difference may be from {found.lower:+.3f} to {found.upper:+.3f}"
    ahead = f"{more} more tasks are likely to decide if it is {assumed:+.3f} and the mean square of differences {spread:.3f}"
    return "hold", f"{seen}; {between}; {ahead}", more


def _look_ahead(found: Difference, policy: Policy) -> tuple[float, float, int]:
    """(assumed difference, assumed spread, more tasks): what was seen, but no less than is worth measuring for."""
    sign = -1.0 if found.difference < 0 else 1.0
    assumed = sign * max(abs(found.difference), policy.smallest_difference)
    spread = max(found.spread, (found.spread * found.n + 1) / (found.n + 1) if found.wins + found.losses == 0 else 0.0, abs(assumed))
    if found.graded:
        spread = max(found.spread, assumed**2)
    return assumed, spread, max(1, tasks_needed(assumed, spread, policy) - found.n)
