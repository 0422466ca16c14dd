"""A canary: which conversations a version on trial gets, and when what it did is proof enough to take it back.

The trial is looked at when it has 20, 40, 80 … requests, so that looking often does not make a sound version fail by chance. It is taken
back when its error rate is higher, or its scores are lower, by more than a stated margin and with p <= 0.01 (one-sided; Fisher's exact
test of the errors, Mann-Whitney of the scores).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from loraloop.episode import Failure, Frozen, Outcome, Success, Timeout

KEPT_SCORES = 2_000


@dataclass(frozen=True)
class CanaryBounds:
    """When a canary is taken back."""

    first_look: int = 20
    """Requests to the canary, or scores of it, before it is judged by them at all; from then on at each doubling."""
    max_p: float = 0.01
    """How likely by chance a difference may be at most to count."""
    error_margin: float = 0.02
    """So much higher its error rate must be, 0 to 1."""
    score_margin: float = 0.02
    """So much lower its mean score must be."""


class ArmStatus(Frozen):
    """What one side of a trial did since it began."""

    requests: int
    failures: int
    scored: int
    """Episodes with a score."""
    mean_score: float | None


@dataclass
class Arm:
    """One side of a trial."""

    requests: int = 0
    """Requests that have ended."""
    failures: int = 0
    scored: int = 0
    scores: list[float] = field(default_factory=list)
    """The newest of them."""

    def add_score(self, score: float) -> None:
        """One episode more."""
        self.scored += 1
        self.scores.append(score)
        del self.scores[:-KEPT_SCORES]

    @property
    def error_rate(self) -> float:
        """The share of requests that failed; 0 without any."""
        return self.failures / self.requests if self.requests else 0.0

    @property
    def mean_score(self) -> float | None:
        """The mean of the scores that are kept; None without any."""
        return sum(self.scores) / len(self.scores) if self.scores else None

    def status(self) -> ArmStatus:
        """What it is now."""
        return ArmStatus(requests=self.requests, failures=self.failures, scored=self.scored, mean_score=self.mean_score)


class Trial:
    """The canary `of` (a version's name) beside its champion, from when it began; a restart of the service begins it anew."""

    def __init__(self, of: str, bounds: CanaryBounds) -> None:
        self.of = of
        self.bounds = bounds
        self.champion, self.canary = Arm(), Arm()
        self._next_errors = self._next_scores = bounds.first_look

    def arm(self, *, is_canary: bool) -> Arm:
        """The side that a request was on."""
        return self.canary if is_canary else self.champion

    def end_request(self, *, is_canary: bool, failed: bool) -> None:
        """One request has ended."""
        arm = self.arm(is_canary=is_canary)
        arm.requests += 1
        arm.failures += failed

    def judge(self) -> str | None:
        """Why the canary is taken back, in words with the figures; None when nothing speaks against it, or it is not yet looked at."""
        return self._judge_errors() or self._judge_scores()

    def _judge_errors(self) -> str | None:
        champion, canary = self.champion, self.canary
        if canary.requests < self._next_errors or not champion.requests:
            return None
        self._next_errors = 2 * canary.requests
        if canary.error_rate - champion.error_rate <= self.bounds.error_margin:
            return None
        from scipy.stats import fisher_exact

        table = [
            [canary.failures, canary.requests - canary.failures],
            [champion.failures, champion.requests - champion.failures],
        ]
        p_value = float(fisher_exact(table, alternative="greater").pvalue)
        if p_value > self.bounds.max_p:
            return None
        return (
            f"{canary.failures} of its {canary.requests} requests failed, of the champion's {champion.failures} of {champion.requests} "
            f"(p = {p_value:.1g})"
        )

    def _judge_scores(self) -> str | None:
        champion, canary = self.champion, self.canary
        if canary.scored < self._next_scores or len(champion.scores) < self.bounds.first_look:
            return None
        self._next_scores = 2 * canary.scored
        lower, higher = canary.mean_score or 0.0, champion.mean_score or 0.0
        if higher - lower <= self.bounds.score_margin:
            return None
        from scipy.stats import mannwhitneyu

        p_value = float(mannwhitneyu(canary.scores, champion.scores, alternative="less", method="asymptotic").pvalue)
        if p_value > self.bounds.max_p:
            return None
        return (
            f"its mean score is {lower:.3f} over {len(canary.scores)} episodes, the champion's {higher:.3f} over {len(champion.scores)} "
            f"(p = {p_value:.1g})"
        )


def is_in_canary(alias: str, conversation: str, share: float) -> bool:
    """Whether a conversation is among the `share` that a canary of `alias` gets: always the same answer, and kept when the share grows."""
    digest = hashlib.sha256(f"{alias}\0{conversation}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) < share * 2.0**64


def score_of(outcome: Outcome) -> float | None:
    """What an episode's outcome counts in a trial: a failure is 0, a timeout its partial score; None for what has none."""
    if isinstance(outcome, Success):
        return outcome.score
    if isinstance(outcome, Failure):
        return 0.0
    return outcome.partial_score if isinstance(outcome, Timeout) else None
