"""The verdict: what it decides, what it refuses, and how often it is wrong."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from loraloop.errors import EvaluationError
from loraloop.evaluate import Policy, paired_verdict
from loraloop.evaluate.paired import paired_difference
from loraloop.evaluate.verdict import tasks_needed

SIMULATED = 2000


def scores(wins: int, losses: int, ties: int) -> tuple[list[bool], list[bool]]:
    return [True] * wins + [False] * losses + [True] * ties, [False] * wins + [True] * losses + [True] * ties


def test_better_is_promoted_with_a_lower_bound_above_zero() -> None:
    verdict = paired_verdict(*scores(40, 20, 140))
    assert verdict.decision == "promote"
    assert (verdict.n, verdict.wins, verdict.losses, verdict.ties) == (200, 40, 20, 140)
    assert verdict.difference == pytest.approx(0.1)
    assert 0 < verdict.lower < 0.1 < verdict.upper
    assert verdict.p_value == pytest.approx(binomtest(40, 60, alternative="greater").pvalue)
    assert "better on 40 tasks" in verdict.reason


def test_worse_is_rejected() -> None:
    verdict = paired_verdict(*scores(20, 40, 140))
    assert verdict.decision == "reject"
    assert verdict.upper < 0


def test_arrays_are_scores_too() -> None:
    candidate, champion = scores(40, 20, 140)
    assert paired_verdict(np.array(candidate), np.array(champion)) == paired_verdict(candidate, champion)  # type: ignore[arg-type]


def test_all_ties_are_held_and_tasks_are_asked_for() -> None:
    verdict = paired_verdict([1] * 50, [1] * 50)
    assert verdict.decision == "hold"
    assert verdict.p_value == 1
    assert verdict.lower < 0 < verdict.upper
    assert verdict.more_tasks is not None
    assert verdict.more_tasks > 0


def test_too_few_tasks_are_held_whatever_they_show() -> None:
    verdict = paired_verdict([True] * 19, [False] * 19)
    assert (verdict.decision, verdict.more_tasks) == ("hold", 1)
    assert paired_verdict([True] * 20, [False] * 20).decision == "promote"


@pytest.mark.parametrize(
    ("candidate", "champion", "says"),
    [
        ([], [], "no tasks"),
        ([1.0], [1.0, 0.0], "candidate has 1 scores and the champion 2"),
        ([0.5, math.nan], [1.0, 0.0], r"candidate\[1\] is nan"),
        ([0.5, 0.5], [math.inf, 0.0], r"champion\[0\] is inf"),
        ([0.5, 1.5], [1.0, 0.0], r"candidate\[1\] is 1.5; expected 0 to 1"),
        ([0.5, None], [1.0, 0.0], r"candidate\[1\] is None"),
    ],
)
def test_scores_that_cannot_be_compared_are_named(candidate: list[float], champion: list[float], says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        paired_verdict(candidate, champion)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, max_size=60))
@settings(max_examples=150, deadline=None)
def test_the_bounds_agree_with_the_tests_and_with_the_other_side(pairs: list[tuple[float, float]]) -> None:
    candidate, champion = [a for a, _ in pairs], [b for _, b in pairs]
    found = paired_difference(candidate, champion, 0.04)
    assert (found.lower > 0) == (found.p_value <= 0.04)
    assert (found.upper < 0) == (found.p_value_worse <= 0.04)
    assert -1 <= found.lower <= found.difference + 1e-9
    assert found.difference - 1e-9 <= found.upper <= 1
    turned = paired_difference(champion, candidate, 0.04)
    assert turned.lower == pytest.approx(-found.upper, abs=1e-9)
    assert paired_difference(candidate, champion, 0.04) == found, "the same scores give the same figures"


def test_graded_bounds_of_few_tasks_are_those_of_all_flips() -> None:
    differences = [0.4, 0.3, -0.1, 0.2, 0.5, 0.1]
    flips = [sum((-1 if number >> place & 1 else 1) * d for place, d in enumerate(differences)) for number in range(2**6)]
    expected = sum(flip >= sum(differences) - 1e-9 for flip in flips) / 2**6
    found = paired_difference([0.5 + d for d in differences], [0.5] * 6, 0.1)
    assert found.p_value == pytest.approx(expected)


def chance_of_promotion(n: int, won: float, lost: float) -> float:
    """Exactly, over all counts that can come out."""
    total = 0.0
    for differing in range(n + 1):
        needed = next(
            (k for k in range(differing + 1) if paired_difference(*scores(k, differing - k, n - differing), 0.04).p_value <= 0.04), None
        )
        if needed is not None:
            share = won / (won + lost)
            total += binom.pmf(differing, n, won + lost) * binom.sf(needed - 1, differing, share)
    return total


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_the_false_promotions_of_a_small_suite_are_at_most_the_level_exactly(share: float) -> None:
    assert chance_of_promotion(25, share, share) <= 0.04
    assert chance_of_promotion(25, share + 0.2, share) > 0.04, "it does promote"


@pytest.mark.parametrize(("n", "success"), [(20, 0.5), (50, 0.1), (200, 0.5), (200, 0.97)])
def test_candidates_without_a_true_difference_are_not_promoted(n: int, success: float) -> None:
    random = np.random.default_rng([7, n])
    promoted = sum(
        paired_verdict(list(random.random(n) < success), list(random.random(n) < success)).decision == "promote" for _ in range(SIMULATED)
    )
    assert promoted <= 0.05 * SIMULATED


@pytest.mark.parametrize("n", [20, 100])
def test_graded_candidates_without_a_true_difference_are_not_promoted(n: int) -> None:
    random = np.random.default_rng([8, n])
    draws = random.beta(0.4, 0.8, (SIMULATED, 2, n)).round(2)
    promoted = sum(paired_verdict(list(first), list(second)).decision == "promote" for first, second in draws)
    assert promoted <= 0.05 * SIMULATED
    assert promoted >= binom.ppf(1e-4, SIMULATED, 0.03), "nor is it so careful that it never would"


def test_a_fifth_won_and_a_tenth_lost_is_promoted() -> None:
    random = np.random.default_rng(9)
    drawn = random.choice(3, (SIMULATED, 200), p=[0.2, 0.1, 0.7])
    promoted = sum(paired_verdict(list(row == 0), list(row == 1)).decision == "promote" for row in drawn)
    assert promoted >= 0.75 * SIMULATED


@pytest.mark.parametrize(("won", "lost"), [(0.2, 0.1), (0.06, 0.0), (0.5, 0.05), (0.95, 0.0)])
def test_the_bounds_hold_the_true_difference(won: float, lost: float) -> None:
    random = np.random.default_rng([10, int(100 * won)])
    counts = random.multinomial(150, [won, lost, 1 - won - lost], SIMULATED)
    found = [paired_difference(*scores(*map(int, row)), 0.04) for row in counts]
    above = sum(one.lower > won - lost for one in found)
    below = sum(one.upper < won - lost for one in found)
    assert max(above, below) <= binom.isf(1e-4, SIMULATED, 0.04)


@pytest.mark.parametrize(("won", "lost"), [(0.2, 0.1), (0.1, 0.02), (0.35, 0.3)])
def test_so_many_tasks_as_are_asked_for_decide(won: float, lost: float) -> None:
    n = tasks_needed(won - lost, won + lost, Policy())
    counts = np.random.default_rng(11).multinomial(n, [won, lost, 1 - won - lost], 500)
    promoted = sum(paired_verdict(*scores(*map(int, row))).decision == "promote" for row in counts)
    assert binom.ppf(1e-4, 500, 0.78) <= promoted <= binom.isf(1e-4, 500, 0.86)
