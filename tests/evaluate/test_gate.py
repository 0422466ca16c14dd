"""The gate: every check by name, the worst of them decides, and what nobody has looked at does not pass."""

from typing import Any

import pytest
from pydantic import ValidationError

from loraloop.errors import EvaluationError
from loraloop.evaluate.contamination import Overlap, TaskTrace, find_overlaps
from loraloop.evaluate.gate import Evidence, GuardScores, judge, override
from loraloop.evaluate.probes import ProbeResult
from loraloop.evaluate.sequential import SequentialVerdict
from loraloop.evaluate.verdict import Policy, Verdict

N = 100
BETTER = (1.0,) * 60 + (0.0,) * 40
WORSE = (1.0,) * 40 + (0.0,) * 60
CLEAN = ProbeResult(kind="reproduction", subject="ab…", choice="promote", message="not said")
LEAK = ProbeResult(kind="reproduction", subject="sk…", choice="reject", message="the model says sk…")


def make_evidence(**changes: Any) -> Evidence:
    made = {
        "candidate": "lora-1",
        "champion": "base",
        "task_ids": tuple(f"task-{number}" for number in range(N)),
        "candidate_scores": BETTER,
        "champion_scores": WORSE,
        "overlaps": (),
        "probes": (CLEAN,),
    }
    return Evidence(**{**made, **changes})


def finding(verdict: Verdict, check: str) -> str:
    return next(one.choice for one in verdict.findings if one.check == check)


def test_a_better_candidate_with_clean_evidence_is_promoted() -> None:
    verdict = judge(make_evidence())
    assert verdict.decision == "promote"
    assert [one.check for one in verdict.findings] == ["improvement", "contamination", "probes"]


def test_evidence_and_verdict_survive_json_and_judge_the_same() -> None:
    evidence = make_evidence(probes=(LEAK,), overlaps=(Overlap(held_out="task-3", training="task-3", by="task_id"),))
    again = Evidence.model_validate_json(evidence.model_dump_json())
    assert judge(again) == judge(evidence)
    assert Verdict.model_validate_json(judge(evidence).model_dump_json()) == judge(evidence)


def test_a_worse_candidate_is_rejected_and_an_equal_one_held_with_the_tasks_that_would_decide() -> None:
    assert judge(make_evidence(candidate_scores=WORSE, champion_scores=BETTER)).decision == "reject"
    held = judge(make_evidence(candidate_scores=WORSE))
    assert held.decision == "hold"
    assert held.more_tasks is not None
    assert held.more_tasks > 0


def test_a_held_out_task_in_training_refuses_and_is_named() -> None:
    verdict = judge(make_evidence(overlaps=(Overlap(held_out="task-3", training="task-3", by="task_id"),)))
    assert verdict.decision == "reject"
    assert "task-3 (by its name)" in verdict.reason
    elsewhere = judge(make_evidence(overlaps=(Overlap(held_out="task-500", training="task-500", by="task_id"),)))
    assert elsewhere.decision == "promote", "a task that was not judged by spoils nothing"


def test_a_planted_string_that_comes_out_rejects_the_best_candidate() -> None:
    verdict = judge(make_evidence(probes=(CLEAN, LEAK)))
    assert verdict.decision == "reject"
    assert "probe:reproduction" in verdict.reason
    assert judge(make_evidence(probes=(LEAK.model_copy(update={"choice": "hold"}),))).decision == "hold"


@pytest.mark.parametrize("lacking", ["overlaps", "probes"])
def test_what_nobody_has_looked_at_holds_unless_the_policy_does_not_require_it(lacking: str) -> None:
    verdict = judge(make_evidence(**{lacking: None}))
    assert (verdict.decision, verdict.more_tasks) == ("hold", None)
    assert "nobody has" in verdict.reason
    assert judge(make_evidence(**{lacking: None}), Policy(required=())).decision == "promote"


@pytest.mark.parametrize(
    ("candidate", "champion", "decision"),
    [
        ((0.9,) * N, (0.9,) * N, "promote"),
        ((0.9,) * 90 + (0.0,) * 10, (0.9,) * N, "hold"),
        ((0.5,) * N, (0.9,) * N, "reject"),
        ((12.0,) * 50 + (14.0,) * 50, (13.0,) * N, "hold"),
    ],
)
def test_a_guarded_metric_must_be_shown_not_to_fall(candidate: tuple[float, ...], champion: tuple[float, ...], decision: str) -> None:
    scores = GuardScores(candidate=candidate, champion=champion)
    verdict = judge(make_evidence(guards={"valid_actions": scores}), Policy(guards={"valid_actions": 0.05}))
    assert finding(verdict, "guard:valid_actions") == decision
    assert verdict.decision == decision
    assert (verdict.more_tasks is not None) == (decision == "hold")


def test_a_guarded_metric_that_was_not_measured_holds() -> None:
    verdict = judge(make_evidence(), Policy(guards={"valid_actions": 0.05}))
    assert finding(verdict, "guard:valid_actions") == "hold"


def test_a_guarded_metric_that_cannot_be_compared_is_named() -> None:
    scores = GuardScores(candidate=(1.0, 2.0), champion=(1.0,))
    with pytest.raises(EvaluationError, match="guarded metric 'cost'"):
        judge(make_evidence(guards={"cost": scores}), Policy(guards={"cost": 1}))


def test_a_sequential_verdict_counts_in_the_place_of_the_fixed_test() -> None:
    sequence = SequentialVerdict()
    ran = sequence.add([True, False] * 20, [False, True] * 20)
    assert judge(make_evidence(sequential=ran)).decision == "hold"


def test_a_verdict_is_put_aside_only_with_a_reason_which_it_keeps() -> None:
    verdict = judge(make_evidence(probes=(LEAK,)))
    with pytest.raises(EvaluationError, match="for no reason"):
        override(verdict, "  ")
    aside = override(verdict, "the string is public")
    assert aside.decision == "promote"
    assert aside.overridden is not None
    assert (aside.overridden.instead_of, aside.overridden.reason) == ("reject", "the string is public")
    assert aside.findings == verdict.findings


def test_evidence_without_one_score_a_task_is_refused() -> None:
    with pytest.raises(ValidationError, match="99 and 100 scores"):
        make_evidence(candidate_scores=BETTER[:-1])
    with pytest.raises(ValidationError, match="'task-0' is there more than once"):
        make_evidence(task_ids=("task-0",) * N)


def test_overlaps_are_found_by_name_by_content_and_by_near_equal_content() -> None:
    training = [
        TaskTrace(task_id="a", content="11", parts=frozenset(range(10))),
        TaskTrace(task_id="b", content="22", parts=frozenset(range(100, 120))),
    ]
    held_out = [
        TaskTrace(task_id="a"),
        TaskTrace(task_id="x", content="22"),
        TaskTrace(task_id="y", content="33", parts=frozenset(range(9))),
        TaskTrace(task_id="z", content="44", parts=frozenset({1, 2, 3, 200, 201})),
        TaskTrace(task_id="unknown"),
    ]
    found = find_overlaps(held_out, training)
    assert [(one.held_out, one.training, one.by) for one in found] == [("a", "a", "task_id"), ("x", "b", "content"), ("y", "a", "near")]
    assert found[2].similarity == pytest.approx(0.9)
    assert find_overlaps([], training) == find_overlaps(held_out[3:], []) == ()
