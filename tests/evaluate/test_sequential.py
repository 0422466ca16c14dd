"""A verdict that is looked at all the time is wrong no more often than it says."""

import numpy as np
import pytest
from scipy.stats import binom

from loraloop.errors import EvaluationError
from loraloop.evaluate.sequential import SequentialVerdict
from loraloop.evaluate.verdict import Policy, paired_verdict

SIMULATED = 250
BLOCK = 10


def play(candidate: np.ndarray, champion: np.ndarray, max_tasks: int) -> tuple[str, int]:
    """(decision, tasks played), looking after every block and stopping when it is decided."""
    sequence = SequentialVerdict(max_tasks=max_tasks)
    for at in range(0, max_tasks, BLOCK):
        verdict = sequence.add(list(candidate[at : at + BLOCK]), list(champion[at : at + BLOCK]))
        if sequence.decided:
            break
    return verdict.decision, verdict.n


@pytest.mark.parametrize("success", [0.5, 0.9])
def test_stopping_at_the_best_moment_promotes_no_more_often_than_the_level(success: float) -> None:
    random = np.random.default_rng([1, int(10 * success)])
    drawn = random.random((SIMULATED, 2, 150)) < success
    promoted = sum(play(first, second, 150)[0] == "promote" for first, second in drawn)
    assert promoted <= binom.isf(1e-3, SIMULATED, 0.04)


def test_looking_again_and_again_at_the_fixed_verdict_would_be_wrong_far_more_often() -> None:
    drawn = np.random.default_rng(2).random((SIMULATED, 2, 150)) < 0.5
    looks = range(20, 151, BLOCK)
    promoted = sum(any(paired_verdict(list(a[:n]), list(b[:n])).decision == "promote" for n in looks) for a, b in drawn)
    assert promoted > binom.isf(1e-3, SIMULATED, 0.04)


def test_skewed_differences_without_a_true_one_are_not_promoted() -> None:
    lost = np.random.default_rng(3).random((SIMULATED, 60)) < 0.1  # nine times a little better, once far worse: 0 on average
    candidate, champion = np.where(lost, 0.0, 1.0), np.where(lost, 0.9, 0.9)
    promoted = sum(play(first, second, 60)[0] == "promote" for first, second in zip(candidate, champion, strict=True))
    assert promoted <= binom.isf(1e-3, SIMULATED, 0.04)


def test_a_large_difference_is_found_early_on_either_side() -> None:
    random = np.random.default_rng(4)
    ended = [play(random.random(200) < 0.8, random.random(200) < 0.4, 200) for _ in range(50)]
    assert sum(decision == "promote" for decision, _ in ended) >= 48
    assert np.mean([n for _, n in ended]) < 80
    assert play(random.random(200) < 0.2, random.random(200) < 0.8, 200)[0] == "reject"


def test_what_is_decided_stays_decided() -> None:
    sequence = SequentialVerdict()
    first = sequence.add([True] * 30, [False] * 30)
    later = sequence.add([False] * 30, [True] * 30)
    assert (first.decision, later.decision) == ("promote", "promote")
    assert later.lower >= first.lower > 0


def test_blocks_taken_in_again_after_a_restart_give_the_same_verdict() -> None:
    scores = np.random.default_rng(5).random((2, 60)).round(2)
    verdicts = []
    for _ in range(2):
        sequence = SequentialVerdict()
        for at in range(0, 60, 20):
            verdict = sequence.add(list(scores[0, at : at + 20]), list(scores[1, at : at + 20]))
        verdicts.append(verdict)
    assert verdicts[0] == verdicts[1]
    assert verdicts[0].n == 60


def test_undecided_says_what_is_needed_and_when_nothing_is_left() -> None:
    sequence = SequentialVerdict(Policy(min_tasks=20), max_tasks=30)
    verdict = sequence.add([True, False] * 5, [False, True] * 5)
    assert (verdict.decision, sequence.decided) == ("hold", False)
    assert verdict.more_tasks is not None
    verdict = sequence.add([True, False] * 10, [False, True] * 10)
    assert (verdict.decision, verdict.more_tasks, sequence.decided) == ("hold", None, True)
    assert "all 30 tasks are played" in verdict.reason


def test_a_block_that_cannot_be_compared_is_not_taken_in() -> None:
    sequence = SequentialVerdict()
    with pytest.raises(EvaluationError, match="expected one of each"):
        sequence.add([1.0], [])
    assert sequence.add([1.0], [0.0]).n == 1
