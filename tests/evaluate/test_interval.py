import pytest

from loraloop.errors import EvaluationError
from loraloop.evaluate.interval import compare_paired, estimate_difference, success_rate


def test_interval_is_clopper_pearson() -> None:
    rate = success_rate([True] * 7 + [False] * 23)
    assert (rate.wins, rate.n) == (7, 30)
    assert rate.rate == pytest.approx(7 / 30)
    assert rate.low == pytest.approx(0.09934, abs=1e-5)  # beta quantiles 0.025 of (7, 24) and 0.975 of (8, 23)
    assert rate.high == pytest.approx(0.42284, abs=1e-5)


def test_no_win_and_only_wins_have_one_sided_intervals() -> None:
    assert success_rate([False] * 30).low == 0
    assert success_rate([False] * 30).high == pytest.approx(1 - 0.025 ** (1 / 30))
    assert success_rate([True] * 30).high == 1


def test_no_plays_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="no plays"):
        success_rate([])


def test_paired_comparison_counts_tasks_and_tests_those_that_differ() -> None:
    first = [True] * 12 + [True] * 9 + [False] + [False] * 8
    second = [True] * 12 + [False] * 9 + [True] + [False] * 8
    paired = compare_paired(first, second)
    assert (paired.both, paired.only_first, paired.only_second, paired.neither) == (12, 9, 1, 8)
    assert paired.p_value == pytest.approx(2 * (1 + 10) / 2**10)  # two-sided sign test of 9 against 1


def test_equal_players_differ_by_chance_only() -> None:
    assert compare_paired([True, False], [True, False]).p_value == 1.0


def test_players_of_different_tasks_are_not_compared() -> None:
    with pytest.raises(EvaluationError, match="found 2 and 1"):
        compare_paired([True, False], [True])


def test_a_estimate_difference_has_the_exact_test_and_an_interval_around_it() -> None:
    first = [1] * 12 + [0] * 4 + [1] * 10 + [0] * 14
    second = [0] * 12 + [1] * 4 + [1] * 10 + [0] * 14
    found = estimate_difference(first, second)
    assert (found.n, found.higher, found.lower_n, found.difference) == (40, 12, 4, 0.2)
    assert found.p_value == compare_paired([bool(x) for x in first], [bool(x) for x in second]).p_value
    assert found.low is not None
    assert found.high is not None
    assert 0 < found.low < 0.2 < found.high
    normal = 1.96 * (((12 + 4) / 40 - 0.2**2) / 40) ** 0.5
    assert abs(found.high - (0.2 + normal)) < 0.03
    assert abs(found.low - (0.2 - normal)) < 0.03
    assert estimate_difference(first, second) == found


@pytest.mark.parametrize(("first", "second", "low", "high"), [([1, 0], [1, 0], -0.8419, 0.8419), ([1] * 10, [0] * 10, 0.6915, 1.0)])
def test_where_no_task_differs_from_the_others_the_interval_is_exact(first: list[int], second: list[int], low: float, high: float) -> None:
    found = estimate_difference(first, second)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))


def test_graded_scores_have_a_bootstrap_interval_and_one_task_none() -> None:
    found = estimate_difference([0.1 * k for k in range(10)], [0.1 * k - 0.05 - 0.01 * (k % 3) for k in range(10)])
    assert found.low is not None
    assert found.high is not None
    assert 0.05 < found.low < found.difference < found.high < 0.07
    assert estimate_difference([1.0], [0.0]).low is None


@pytest.mark.parametrize(("first", "second"), [([1.0], []), ([], []), ([float("nan")], [1.0])])
def test_scores_that_cannot_be_compared_are_an_error(first: list[float], second: list[float]) -> None:
    with pytest.raises(EvaluationError):
        estimate_difference(first, second)
