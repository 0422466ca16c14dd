"""The table of error rates comes from the functions that judge, and holds what the policy promises."""

from scipy.stats import binom

from bench.gate import ALL_TIES, BETTER, GRADED, NO_DIFFERENCE, SEQUENTIAL, simulate, to_markdown
from loraloop.evaluate.verdict import Policy

CANDIDATES = 300
AT_MOST = binom.isf(1e-4, CANDIDATES, Policy().level)


def test_no_kind_without_a_true_difference_is_promoted_more_often_than_the_level() -> None:
    for case in [*NO_DIFFERENCE[:12], *ALL_TIES, *GRADED[:2]]:
        rates = simulate(case, CANDIDATES)
        assert rates.promoted <= AT_MOST, case
        assert rates.rejected <= AT_MOST, case


def test_a_true_difference_is_found_and_more_tasks_find_more() -> None:
    found = [simulate(case, CANDIDATES).promoted for case in BETTER if case.won == 0.2]
    assert found == sorted(found)
    assert found[2] >= binom.ppf(1e-4, CANDIDATES, 0.75), "200 tasks"


def test_the_sequential_kinds_are_judged_in_blocks() -> None:
    rates = simulate(SEQUENTIAL[4], 40)
    assert rates.promoted == 40
    assert rates.mean_tasks < 60


def test_the_table_has_a_row_a_kind() -> None:
    rates = simulate(ALL_TIES[0], 10)
    assert to_markdown("kind", [rates]).splitlines()[2:] == ["| all ties | 20 | 0.0% | 0.0% to 30.8% | 0.0% | 20 |"]
