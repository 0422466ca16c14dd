import pytest

from loraloop.errors import EvaluationError
from loraloop.evaluate.interval import compare_paired, success_rate


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
