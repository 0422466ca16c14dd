"""What an evaluation is and what came of it: two sides, the same tasks, the difference with its interval.

The plan says what is measured on what, by hashes; the evaluation's id is a hash of the plan, so that the same question has one answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Self

from pydantic import Field

from loraloop.episode import Frozen
from loraloop.errors import EvaluationError
from loraloop.evaluate.interval import estimate_difference
from loraloop.evaluate.verdict import Policy, Verdict, paired_verdict
from loraloop.files import content_hash

SideName = Literal["candidate", "opponent"]
SIDES: tuple[SideName, ...] = ("candidate", "opponent")


class Side(Frozen):
    """One of the two that are compared, by what makes it what it is."""

    name: str
    """`base`, the id of a model, or `MODEL@URL` for one that is served."""
    base_model: str | None = None
    base_sha256: str | None = None
    adapter_sha256: str | None = None
    url: str | None = None


class EvaluationPlan(Frozen):
    """What is measured on what."""

    candidate: Side
    opponent: Side
    environment: str | None = None
    options: dict[str, str] = Field(default_factory=dict)
    n_tasks: int = 0
    tasks_hash: str | None = None
    """Over ids and data of the tasks, in order."""
    seeds: int = 1
    """Plays of each task by each side."""
    temperature: float = 0.0
    dataset: str | None = None
    """The dataset whose held-out samples are measured."""
    n_samples: int = 0
    samples_hash: str | None = None
    command: str | None = None
    early: Policy | None = None
    """Plays end as soon as they decide by this policy; without it all are played."""
    again: int = 0
    """Tells apart measurements of the same, made again on purpose."""

    @property
    def id(self) -> str:
        """`eval-` and 16 hex digits of the hash of all this."""
        return f"eval-{content_hash(self.model_dump(mode='json'), 16)}"


class TaskScore(Frozen):
    """What both sides made of one task, the mean over its seeds."""

    task: str
    candidate: float
    opponent: float


class Comparison(Frozen):
    """One figure of both sides, paired by task."""

    name: str
    """Such as `textcraft: success`."""
    higher_is_better: bool = True
    scores: tuple[TaskScore, ...]
    candidate: float
    """The mean over the tasks."""
    opponent: float
    wins: int
    """Tasks of which the candidate made more."""
    losses: int
    ties: int
    difference: float
    """Candidate minus opponent."""
    lower: float | None
    """Of the difference's interval; None for a single task."""
    upper: float | None
    confidence: float
    p_value: float
    """Of the exact sign test over the tasks that differ (McNemar's where a task is won or lost), two-sided."""

    @classmethod
    def of(cls, name: str, scores: Iterable[TaskScore], *, higher_is_better: bool = True) -> Self:
        """The comparison of these scores. Raises EvaluationError when there are none, or one is no finite number."""
        scores = tuple(scores)
        if not scores:
            raise EvaluationError(f"{name}: there are no tasks to compare on")
        found = estimate_difference([one.candidate for one in scores], [one.opponent for one in scores])
        wins, losses = (found.higher, found.lower_n) if higher_is_better else (found.lower_n, found.higher)
        return cls(
            name=name,
            higher_is_better=higher_is_better,
            scores=scores,
            candidate=found.first,
            opponent=found.second,
            wins=wins,
            losses=losses,
            ties=found.n - wins - losses,
            difference=found.difference,
            lower=found.low,
            upper=found.high,
            confidence=found.confidence,
            p_value=found.p_value,
        )

    @property
    def n(self) -> int:
        """How many tasks."""
        return len(self.scores)

    @property
    def regressions(self) -> list[TaskScore]:
        """The tasks of which the candidate made less, the worst first."""
        sign = 1 if self.higher_is_better else -1
        worse = [one for one in self.scores if sign * (one.candidate - one.opponent) < 0]
        return sorted(worse, key=lambda one: (sign * (one.candidate - one.opponent), one.task))


class Evaluation(Frozen):
    """What was measured, and what came of it. The first comparison is the one to decide by, the others are to guard."""

    id: str
    plan: EvaluationPlan
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...] = ()
    """What whoever reads this must know, such as tasks that were left out."""
    verdict: Verdict | None = None
    """What the first comparison says by itself; None where its scores are not from 0 to 1, or less of it is better. The gate looks at
    more than that. Where plays could end early it is the one that is valid however often one looks."""
    stopped_early: bool = False
    """Not all tasks were played, because those that were decided."""

    @property
    def primary(self) -> Comparison:
        """The comparison to decide by."""
        return self.comparisons[0]

    def get_comparison(self, name: str) -> Comparison:
        """The comparison of this name. Raises EvaluationError naming those that there are."""
        for comparison in self.comparisons:
            if comparison.name == name:
                return comparison
        known = ", ".join(repr(comparison.name) for comparison in self.comparisons)
        raise EvaluationError(f"{self.id} has no comparison {name!r}; known: {known}")

    def scores(self) -> tuple[list[float], list[float]]:
        """(candidate, opponent) of the primary comparison, for `paired_verdict`; negated where less is better."""
        sign = 1.0 if self.primary.higher_is_better else -1.0
        return [sign * one.candidate for one in self.primary.scores], [sign * one.opponent for one in self.primary.scores]


def judge(comparison: Comparison, policy: Policy | None = None) -> Verdict | None:
    """The verdict on the scores of one comparison, None where they are not from 0 to 1, or less is better."""
    candidate, opponent = ([getattr(one, side) for one in comparison.scores] for side in SIDES)
    if not comparison.higher_is_better or not all(0 <= score <= 1 for score in (*candidate, *opponent)):
        return None
    return paired_verdict(candidate, opponent, policy)


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return sum(values) / len(values)
