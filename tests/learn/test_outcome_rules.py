"""Every cell of the table of DESIGN section 5, through the learn model that a method has by default."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from loraloop.episode import EpisodeMetadata, Failure, Success, Timeout, Unknown
from loraloop.errors import SettingsError
from loraloop.learn import outcome_rules
from loraloop.learn.compose import compose
from loraloop.learn.outcome_rules import RULES, LeftOut, Meaning, OutcomeSettings, judge, recorded_weight, to_markdown
from loraloop.testing import make_episode
from loraloop.training_data import METHODS, Refusal

LATE = {"include_timeouts": True}

CELLS = [
    # method, outcome, settings, what is expected: a reason, or fields of the meaning
    ("sft", Success(1.0), {}, {"quality": 1.0, "weight": 1.0, "is_good": True}),
    ("sft", Success(0.0), {}, {"quality": 0.0}),
    ("sft", Success(0.5), {"min_score": 0.5}, {"quality": 0.5}),
    ("sft", Success(0.49), {"min_score": 0.5}, "score_below_minimum"),
    ("sft", Failure("x"), LATE, "outcome_failure"),
    ("sft", Timeout(1.0), {}, "outcome_timeout"),
    ("sft", Timeout(0.2), LATE, {"quality": 0.2, "weight": 1.0, "is_good": True}),
    ("sft", Timeout(), LATE, {"quality": 0.0, "is_good": True}),
    ("sft", Timeout(0.2), {**LATE, "min_score": 0.3}, "score_below_minimum"),
    ("sft", Timeout(), {**LATE, "min_score": 0.3}, "score_below_minimum"),
    ("sft", Unknown(), LATE, "outcome_unknown"),
    ("weighted", Success(1.0), {}, {"weight": 1.0}),
    ("weighted", Success(0.25), {}, {"weight": 0.25}),
    ("weighted", Success(0.0), {}, "weight_zero"),
    ("weighted", Success(0.2), {"min_score": 0.5}, "score_below_minimum"),
    ("weighted", Success(3.0), {"score_range": (1, 5)}, {"weight": 0.5}),
    ("weighted", Failure("x"), {}, "outcome_failure"),
    ("weighted", Failure("x"), {"failure_weight": -0.2}, {"weight": -0.2, "is_good": False}),
    ("weighted", Timeout(0.4), {}, {"weight": 0.4}),
    ("weighted", Timeout(0.9), {}, {"weight": 0.5, "quality": 0.9}),
    ("weighted", Timeout(0.9), {"max_timeout_weight": 0.8}, {"weight": 0.8}),
    ("weighted", Timeout(0.0), {}, "weight_zero"),
    ("weighted", Timeout(), {}, "outcome_timeout"),
    ("weighted", Unknown(), {"failure_weight": -1}, "outcome_unknown"),
    ("dpo", Success(0.7), {}, {"quality": 0.7, "is_good": True, "weight": 1.0}),
    ("dpo", Success(0.4), {"min_score": 0.5}, {"quality": 0.4, "is_good": False}),
    ("dpo", Failure("x"), {}, {"quality": 0.0, "is_good": False}),
    ("dpo", Timeout(0.9), {}, {"quality": 0.9, "is_good": False}),
    ("dpo", Timeout(), {}, {"quality": 0.0, "is_good": False}),
    ("dpo", Unknown(), {}, "outcome_unknown"),
    ("kto", Success(0.0), {}, {"is_good": True, "weight": 1.0}),
    ("kto", Success(0.4), {"min_score": 0.5}, "score_below_minimum"),
    ("kto", Failure("x"), {}, {"is_good": False, "weight": 1.0}),
    ("kto", Timeout(0.9), {}, "outcome_timeout"),
    ("kto", Timeout(0.9), LATE, {"is_good": False, "weight": 1.0}),
    ("kto", Timeout(), LATE, {"is_good": False}),
    ("kto", Unknown(), LATE, "outcome_unknown"),
]


@pytest.mark.parametrize(("method", "outcome", "settings", "expected"), CELLS)
def test_each_outcome_means_its_own_to_each_method(method, outcome, settings, expected):
    episode = make_episode(outcome=outcome)
    found = judge(method, episode, OutcomeSettings(**settings))
    if isinstance(expected, str):
        assert isinstance(found, Refusal)
        assert (found.reason, found.episode_id) == (expected, episode.id)
        assert found.detail
    else:
        assert isinstance(found, Meaning)
        assert {name: getattr(found, name) for name in expected} == expected


def test_every_cell_is_tested():
    assert {(method, outcome.kind) for method, outcome, *_ in CELLS} == set(RULES)
    assert {method for method, _ in RULES} == set(METHODS)
    assert len(RULES) == 16


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("outcome", [Success(1.2), Success(-0.1), Timeout(6.0)])
def test_a_score_outside_the_scale_is_refused_until_the_scale_is_declared(method, outcome):
    refusal = judge(method, make_episode(outcome=outcome), OutcomeSettings(include_timeouts=True))
    assert refusal.reason == "score_outside_scale"
    assert "score_range=(" in refusal.detail
    declared = OutcomeSettings(include_timeouts=True, score_range=(-1.0, 6.0), min_score=-1.0)
    assert isinstance(judge(method, make_episode(outcome=outcome), declared), Meaning)


@pytest.mark.parametrize("method", ["weighted", "dpo", "kto", "sft"])
def test_a_learn_model_hands_its_settings_to_the_rules(method):
    settings = {"min_score": 1.5, "score_range": [0, 2]}
    assert compose(method, None, settings).outcomes == OutcomeSettings(min_score=1.5, score_range=(0.0, 2.0))


def test_every_learn_model_of_sft_takes_the_settings_that_all_share():
    for name in ("conversation", "worker_task", "worker_decision", "dependency_graph"):
        settings = {"min_score": 0.5, "include_timeouts": True, "score_range": (0, 2)}
        assert compose("sft", name, settings).outcomes == OutcomeSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_score": 1.5}, "min_score=1.5: expected a score within score_range, 0 to 1"),
        ({"score_range": (-5, -1)}, "min_score=0.0: .*; -5 takes every success"),
        ({"min_score": float("nan")}, "min_score=nan"),
        ({"score_range": (1, 1)}, r"score_range=\(1, 1\): expected a bottom below a top"),
        ({"score_range": (0, float("inf"))}, "score_range"),
        ({"score_range": (0,)}, "score_range"),
        ({"score_range": "0..2"}, "score_range"),
        ({"failure_weight": 0.1}, "failure_weight=0.1: expected a weight from -1 to 0"),
        ({"failure_weight": -1.1}, "failure_weight=-1.1"),
        ({"failure_weight": float("nan")}, "failure_weight=nan"),
        ({"max_timeout_weight": 0}, "max_timeout_weight=0"),
        ({"max_timeout_weight": 1.1}, "max_timeout_weight=1.1"),
    ],
)
def test_a_setting_out_of_its_range_is_told_with_value_and_range(settings, message):
    with pytest.raises(SettingsError, match=message):
        OutcomeSettings(**settings)


def test_the_recorders_weight_is_one_unless_it_is_a_weight():
    for text, weight in (("0.5", 0.5), ("0", 0.0), ("heavy", 1.0), ("-1", 1.0), ("nan", 1.0), ("inf", 1.0)):
        assert recorded_weight(make_episode(metadata=EpisodeMetadata(tags={"weight": text}))) == weight


def test_the_documents_show_every_reason_of_the_table():
    shown = to_markdown()
    for rule in RULES.values():
        assert rule.text in shown
        for place in (None, 0.0, 1.0):
            for settings in (OutcomeSettings(), OutcomeSettings(min_score=0.5)):
                if isinstance(decided := rule.decide(place, settings), LeftOut):
                    told = "as a success" in rule.text or f"`{decided.reason}`" in rule.text
                    assert told, (rule.text, decided.reason)


def test_only_the_table_looks_at_outcomes():
    kinds = {"Success", "Failure", "Timeout", "Unknown", "Outcome"}
    for path in Path(outcome_rules.__file__).parent.glob("*.py"):
        if path.name == "outcome_rules.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                named = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                assert not named & kinds, path.name
            asks = isinstance(node, ast.Attribute) and node.attr in {"is_success", "is_failure", "is_timeout"}
            assert not asks, path.name
