from __future__ import annotations

import pytest

from loraloop.errors import SettingsError
from loraloop.learn.compose import DEFAULT_LEARN_MODELS, compose, learn_model_for
from loraloop.learn.kto import KtoLearn
from loraloop.learn.preference import PreferenceLearn
from loraloop.learn.worker_task import WorkerTaskLearn
from loraloop.plugins import find
from loraloop.training_data import METHODS


def test_each_method_has_a_learn_model_that_makes_its_samples():
    assert set(DEFAULT_LEARN_MODELS) == set(METHODS)
    for method in METHODS:
        assert find("learn_models", learn_model_for(method))().method == method
        assert compose(method).method == method


def test_what_to_learn_and_how_are_put_together():
    learn = compose("kto", "worker_task", {"min_actions": 5, "min_score": 0.5, "include_timeouts": True})
    assert isinstance(learn, KtoLearn)
    assert isinstance(learn.form, WorkerTaskLearn)
    assert (learn.name, learn.form.min_actions) == ("worker_task.kto", 5)
    assert (learn.outcomes.min_score, learn.outcomes.include_timeouts) == (0.5, True)


def test_a_learn_model_of_the_method_is_taken_as_it_is():
    assert isinstance(compose("sft", "worker_task", {"min_actions": 1}), WorkerTaskLearn)
    assert compose("dpo", "preference", {"max_pairs": 3}).max_pairs == 3
    assert isinstance(compose("dpo", "conversation"), PreferenceLearn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ppo",), "method 'ppo': expected sft, weighted, dpo, kto"),
        (("sft", "convesation"), "Did you mean conversation"),
        (("dpo", "kto"), "'kto' makes samples of method kto, not dpo"),
        (("sft", "weighted"), "'weighted' makes samples of method weighted, not sft"),
        (("sft", None, {"min_sore": 1}), "conversation has no setting 'min_sore'; expected .*min_score.*Did you mean min_score"),
        (("kto", "worker_task", {"max_pairs": 1}), "worker_task by kto has no setting 'max_pairs'; expected include_timeouts, min_actions"),
        (("kto", None, {"of": "worker_task"}), "kto has no setting 'of'"),
        (("kto", "worker_task", {"min_actions": 0}), "min_actions=0"),
        (("dpo", "conversation", {"pairing": "random"}), "pairing='random'"),
        (("sft", None, {"min_score": "high"}), "min_score"),
    ],
)
def test_what_does_not_fit_is_told(arguments, message):
    with pytest.raises(SettingsError, match=message):
        compose(*arguments)


def test_a_learn_model_without_transcripts_goes_with_its_own_method_only(monkeypatch):
    class Plain:
        name, objective, method = "plain", "Plain.", "sft"

    from loraloop.learn import compose as module

    monkeypatch.setattr(module, "find", lambda kind, name: Plain if name == "plain" else find(kind, name))
    assert isinstance(compose("sft", "plain"), Plain)
    with pytest.raises(SettingsError, match=r"no transcripts\(\)"):
        compose("kto", "plain")
