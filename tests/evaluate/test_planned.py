"""A planned number of tasks: looking on the way is wrong no more often, and finds nearly what the whole would."""

import numpy as np
import pytest
from scipy.stats import binom

from loraloop.errors import EvaluationError
from loraloop.evaluate.planned import N_PATHS, PlannedVerdict
from loraloop.evaluate.verdict import Policy, paired_verdict
from loraloop.evaluation.measured import Early

SIMULATED = 150
TASKS, BLOCK = 100, 20


def play(candidate: np.ndarray, champion: np.ndarray, seed: int = 0) -> tuple[str, int]:
    sequence = PlannedVerdict(TASKS, Policy(seed=seed))
    for at in range(0, TASKS, BLOCK):
        verdict = sequence.add(candidate[at : at + BLOCK].tolist(), champion[at : at + BLOCK].tolist())
        assert (verdict.lower > 0) == (verdict.decision == "promote")
        assert (verdict.upper < 0) == (verdict.decision == "reject")
        assert -1 <= verdict.lower <= verdict.upper <= 1
        if sequence.decided:
            break
    return verdict.decision, verdict.n


@pytest.mark.parametrize("graded", [False, True])
def test_no_true_difference_is_promoted_no_more_often_than_the_level(graded: bool) -> None:
    random = np.random.default_rng(1)
    drawn = random.beta(0.5, 0.7, (SIMULATED, 2, TASKS)) if graded else random.random((SIMULATED, 2, TASKS)) < 0.5
    ended = [play(first, second, seed) for seed, (first, second) in enumerate(drawn)]
    for decision in ("promote", "reject"):
        assert sum(one == decision for one, _ in ended) <= binom.isf(1e-3, SIMULATED, 0.04)


def test_it_finds_nearly_what_the_whole_finds_and_earlier() -> None:
    drawn = np.random.default_rng(2).choice(3, (SIMULATED, TASKS), p=[0.3, 0.1, 0.6])
    ended = [play(row == 0, row == 1, seed) for seed, row in enumerate(drawn)]
    whole = sum(paired_verdict((row == 0).tolist(), (row == 1).tolist()).decision == "promote" for row in drawn)
    found = sum(decision == "promote" for decision, _ in ended)
    assert found >= whole - 0.06 * SIMULATED
    assert np.mean([n for _, n in ended]) < 0.85 * TASKS


def test_the_last_look_alone_is_the_fixed_sign_flip_test() -> None:
    random = np.random.default_rng(3)
    candidate, champion = random.random(40).round(1), random.random(40).round(1)
    p_value = PlannedVerdict(40).add(candidate.tolist(), champion.tolist()).p_value
    fixed = paired_verdict(candidate.tolist(), champion.tolist()).p_value
    assert p_value == pytest.approx(fixed, abs=5 * np.sqrt(0.25 / N_PATHS))


def test_more_tasks_than_planned_are_refused_and_too_few_planned_too() -> None:
    sequence = PlannedVerdict(20)
    with pytest.raises(EvaluationError, match="0 of 20 planned tasks are in, and 21 more are too many"):
        sequence.add([1.0] * 21, [0.0] * 21)
    assert sequence.add([1.0] * 20, [0.0] * 20).decision == "promote"
    with pytest.raises(EvaluationError, match="a plan of 19 tasks decides nothing"):
        PlannedVerdict(19)


def test_taken_in_again_it_is_the_same() -> None:
    random = np.random.default_rng(4)
    scores = random.random((2, 60)).round(2)
    verdicts = []
    for _ in range(2):
        sequence = PlannedVerdict(60)
        verdicts.append([sequence.add(scores[0, at : at + 20].tolist(), scores[1, at : at + 20].tolist()) for at in (0, 20, 40)])
    assert verdicts[0] == verdicts[1]


def test_an_evaluation_that_may_end_early_looks_by_plan_and_takes_in_each_task_once() -> None:
    early = Early(Policy(), 100)
    candidate, champion = [1.0] * 100, [1.0, 0.0] * 50
    looks = [n for n in range(10, 101, 10) if early(candidate[:n], champion[:n])]
    assert isinstance(early.sequential, PlannedVerdict)
    assert early.verdict is not None
    assert (early.verdict.decision, early.stopped) == ("promote", True)
    assert looks[0] <= 50
    assert not isinstance(Early(Policy(), 10).sequential, PlannedVerdict), "too few tasks for a plan"
