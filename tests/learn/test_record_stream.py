"""However a stream of records is cut, the same episodes come of it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloop.episode import (
    ActionRecord,
    DependencyGraphRecord,
    Episode,
    EpisodeId,
    EpisodeMetadata,
    Failure,
    LlmCallRecord,
    Message,
    Success,
    Unknown,
)
from loraloop.plugins import find, list_names
from loraloop.testing import make_records

NAMES = list_names("learn_models")
ASK, ANSWER = Message(role="user", content="Q"), Message(role="assistant", content="A")

task, worker = st.sampled_from([None, "a", "b"]), st.sampled_from([None, "w", "v"])
actions = st.builds(ActionRecord, action=st.sampled_from(["look", "tick", "done"]), success=st.booleans(), task_id=task, worker_id=worker)
histories = st.lists(st.sampled_from([ASK, ANSWER]), max_size=3).map(tuple)
calls = st.builds(LlmCallRecord, messages=histories, response=st.just(ANSWER), task_id=task, error=st.sampled_from([None, "503"]))
graphs = st.builds(DependencyGraphRecord, prompt=st.just("p"), response=st.just("a"), discover_order=st.just(("a",)), task_id=task)
streams = st.lists(st.one_of(actions, actions, calls, graphs), max_size=25).map(
    lambda records: [record.model_copy(update={"timestamp_ms": number}) for number, record in enumerate(records)]
)


def told(episode: Episode) -> Episode:
    return episode.model_copy(update={"metadata": episode.metadata.model_copy(update={"created_at": 0})})


def build_in_batches(name: str, batches: list[list]) -> dict[str, Episode]:
    kept: dict[str, Episode] = {}
    for batch in batches:
        still_open = [episode for episode in kept.values() if episode.is_open]
        for episode in find("learn_models", name)().build_episodes(batch, still_open):
            assert not (episode.id in kept and not kept[episode.id].is_open), "a closed episode is never touched again"
            kept[episode.id] = told(episode)
    return kept


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(records=streams, cuts=st.lists(st.integers(0, 25), max_size=6))
def test_any_cutting_into_batches_gives_the_same_episodes(name, records, cuts):
    edges = [0, *sorted(cuts), len(records)]
    batches = [records[start:end] for start, end in itertools.pairwise(edges)]
    whole = {episode.id: told(episode) for episode in find("learn_models", name)().build_episodes(records)}
    assert build_in_batches(name, batches) == whole


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50, deadline=None)
@given(records=streams)
def test_no_record_is_in_two_episodes(name, records):
    episodes = find("learn_models", name)().build_episodes(records)
    used = [record.timestamp_ms for episode in episodes for record in episode.records]
    assert len(used) == len(set(used))
    assert len({episode.id for episode in episodes}) == len(episodes)


def test_two_runs_that_begin_alike_to_the_millisecond_have_ids_of_their_own():
    look, done = (ActionRecord(action=action, task_id="a", timestamp_ms=0) for action in ("look", "done"))
    episodes = find("learn_models", "worker_task")().build_episodes([look, done, look, done])
    assert len({episode.id for episode in episodes}) == 2


def test_open_episodes_of_another_learn_model_are_left_alone():
    learn = find("learn_models", "worker_task")()
    (other,) = find("learn_models", "conversation")().build_episodes([LlmCallRecord(messages=(ASK,), response=ANSWER, task_id="a")])
    assert learn.build_episodes([], [other]) == []


def test_a_continued_episode_keeps_what_was_noted_on_it():
    learn = find("learn_models", "conversation")()
    (episode,) = learn.build_episodes([LlmCallRecord(messages=(ASK,), response=ANSWER, task_id="a")])
    noted = episode.model_copy(
        update={
            "id": EpisodeId.parse("of-the-router"),
            "outcome": Success(0.5),
            "metadata": EpisodeMetadata(created_at=7, scenario="s", tags={"k": "v"}),
        }
    )
    more = LlmCallRecord(messages=(ASK, ANSWER, ASK), response=ANSWER, task_id="a")
    (continued,) = learn.build_episodes([more], [noted])
    assert (continued.id, continued.is_open, continued.outcome, len(continued.records)) == ("of-the-router", True, Success(0.5), 2)
    assert (continued.metadata.created_at, continued.metadata.scenario, continued.metadata.tags) == (7, "s", {"k": "v"})
    assert len(continued.messages) == 4


def test_done_closes_a_conversation_and_says_how_it_ended():
    learn = find("learn_models", "conversation")()
    (episode,) = learn.build_episodes([LlmCallRecord(messages=(ASK,), response=ANSWER, task_id="a")])
    for success, outcome in ((True, Success()), (False, Failure("no"))):
        (closed,) = learn.build_episodes([ActionRecord(action="done", task_id="a", success=success, error="no")], [episode])
        assert (closed.id, closed.is_open, closed.outcome) == (episode.id, False, outcome)


def test_a_worker_that_turns_to_another_task_ends_its_sequence_without_an_outcome():
    learn = find("learn_models", "worker_decision")()
    records = [
        ActionRecord(action="tick", worker_id="w"),
        ActionRecord(action="look", worker_id="w", task_id="a"),
        ActionRecord(action="tick", worker_id="w"),
        ActionRecord(action="look", worker_id="w", task_id="b"),
        ActionRecord(action="done", worker_id="w", task_id="b"),
        ActionRecord(action="done"),
    ]
    first, second = learn.build_episodes(records)
    assert ([record.action for record in first.records], first.is_open, first.outcome) == (["look", "tick"], False, Unknown())
    assert (second.task_id, second.is_open, second.outcome) == ("b", False, Success())


def test_without_a_form_the_calls_and_actions_of_a_task_are_one_episode():
    look = ActionRecord(action="look", task_id="a", success=False)
    call = LlmCallRecord(messages=(ASK,), response=ANSWER, task_id="a")
    (episode,) = find("learn_models", "kto")().build_episodes([look, call, ActionRecord(action="done", task_id="a")])
    assert (episode.learn_model, len(episode.records), len(episode.messages), episode.outcome) == ("kto", 3, 2, Success(0.5))
    assert {e.learn_model for e in find("learn_models", "kto")(of="worker_task").build_episodes(make_records())} == {"worker_task"}
