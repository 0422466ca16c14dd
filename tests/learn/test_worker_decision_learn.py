from __future__ import annotations

import pytest

from loraloop.episode import ActionRecord, EpisodeMetadata, Failure, Success
from loraloop.errors import SettingsError
from loraloop.learn.worker_decision import WorkerDecisionSequenceLearn
from loraloop.plugins import convert_all
from loraloop.testing import make_episode


def act(action: str, **fields) -> ActionRecord:
    return ActionRecord(action=action, worker_id="w", **fields)


RUN = [act("look", target="box", output="a ball"), act("tick"), act("take"), act("done")]


def run(*records: ActionRecord, **fields):
    return make_episode(messages=(), records=records or RUN, **{"task_id": None, "outcome": Success(), **fields})


def test_each_decision_is_asked_for_among_the_available_actions():
    sample = WorkerDecisionSequenceLearn(system="Decide.").convert(run())
    assert [(message.role, message.content) for message in sample.messages] == [
        ("system", "Decide."),
        ("user", "Available actions: done, look, take"),
        ("assistant", "look box"),
        ("user", "a ball"),
        ("assistant", "take"),
        ("user", "ok"),
        ("assistant", "done"),
    ]


def test_available_actions_are_those_of_all_episodes_of_a_scenario():
    other = run(act("push"), act("look"), act("done"), outcome=Failure("x"))
    elsewhere = run(act("fly"), act("land"), act("done"), metadata=EpisodeMetadata(scenario="sky"))
    told = [
        sample.messages[1].content
        for sample in convert_all(WorkerDecisionSequenceLearn(), [run(), other, elsewhere])
        if hasattr(sample, "kind")
    ]
    assert told == ["Available actions: done, look, push, take", "Available actions: done, fly, land"]


def test_available_actions_that_are_given_are_told():
    learn = WorkerDecisionSequenceLearn(available_actions=["wait", "look"])
    (sample,) = learn.convert_group([run(task_id="t-1")])
    assert sample.messages[1].content == "Available actions: wait, look\nTask: t-1"
    assert learn.available_actions == ("wait", "look")


def test_events_of_the_system_neither_count_nor_are_learned():
    assert WorkerDecisionSequenceLearn().convert(run(act("look"), act("tick"), act("done"))).reason == "too_few_actions"
    kept = WorkerDecisionSequenceLearn(system_events=[]).convert(run(act("look"), act("tick"), act("done")))
    assert "tick" in [message.content for message in kept.messages]
    assert WorkerDecisionSequenceLearn().convert(run(act("tick"))).reason == "too_few_actions"


def test_the_score_counts_decisions_only():
    assert WorkerDecisionSequenceLearn().evaluate([act("look"), act("tick", success=False), act("done")]) == Success(1.0)


@pytest.mark.parametrize("setting", ["available_actions", "system_events"])
@pytest.mark.parametrize("value", ["look", [""], [1]])
def test_names_must_be_a_list_of_names(setting, value):
    with pytest.raises(SettingsError, match=f"{setting}=.*expected a list of names"):
        WorkerDecisionSequenceLearn(**{setting: value})


def test_the_least_number_of_decisions_is_checked():
    with pytest.raises(SettingsError, match="min_actions=0"):
        WorkerDecisionSequenceLearn(min_actions=0)
