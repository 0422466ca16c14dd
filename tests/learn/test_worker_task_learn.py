from __future__ import annotations

import pytest

from loraloop.chat.render import check_row, render
from loraloop.chat.template import ChatTemplate
from loraloop.episode import ActionRecord, EpisodeMetadata, Failure, LlmCallRecord, Message, Success, Timeout, Unknown
from loraloop.errors import SettingsError
from loraloop.learn.worker_task import WorkerTaskLearn
from loraloop.plugins import LearnModel, find
from loraloop.testing import make_episode
from loraloop.training_data import Refusal, TrainingData


def act(action: str, task_id: str | None = "t1", **fields) -> ActionRecord:
    return ActionRecord(action=action, task_id=task_id, **fields)


DONE = act("done", timestamp_ms=200, duration_ms=50)
RUN = [act("look", target="box", output="a ball", timestamp_ms=100), act("take", success=False, error="too heavy"), DONE]


def test_it_is_found_by_its_name():
    assert isinstance(find("learn_models", "worker_task")(), LearnModel)
    assert WorkerTaskLearn().name == "worker_task"


# --- episodes from records --------------------------------------------------------------------------------------------------


def test_actions_are_grouped_by_task_in_order():
    records = [act("a1", "a"), act("b1", "b"), act("a2", "a"), act("done", "b"), act("done", "a")]
    episodes = WorkerTaskLearn().build_episodes(records)
    assert [episode.task_id for episode in episodes] == ["a", "b"]
    assert [[record.action for record in episode.records] for episode in episodes] == [["a1", "a2", "done"], ["b1", "done"]]
    assert all(episode.learn_model == "worker_task" for episode in episodes)


def test_a_task_without_done_stays_open():
    open_one, closed = WorkerTaskLearn().build_episodes([act("look"), act("take"), act("done", "another")])
    assert (open_one.is_open, open_one.outcome, len(open_one.records)) == (True, Unknown(), 2)
    assert (closed.task_id, closed.is_open) == ("another", False)
    assert WorkerTaskLearn().convert(open_one).reason == "episode_open"
    assert WorkerTaskLearn().build_episodes([]) == []


def test_what_comes_after_done_is_another_run_of_the_task():
    first, second = WorkerTaskLearn().build_episodes([*RUN, act("look", timestamp_ms=300)])
    assert (first.is_open, list(first.records)) == (False, RUN)
    assert (second.is_open, len(second.records)) == (True, 1)


def test_actions_of_no_task_and_other_records_are_left_out():
    call = LlmCallRecord(messages=(), response=Message(role="assistant", content="x"), task_id="t1")
    (episode,) = WorkerTaskLearn().build_episodes([act("stray", None), call, *RUN])
    assert list(episode.records) == RUN


def test_an_episode_knows_when_it_ran():
    (episode,) = WorkerTaskLearn().build_episodes(RUN)
    assert (episode.metadata.started_at, episode.metadata.ended_at, episode.metadata.duration_ms) == (100, 250, 150)


# --- how a task ended -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actions", "outcome"),
    [
        ([act("look"), act("done")], Success(1.0)),
        ([act("look"), act("take", success=False), act("done")], Success(2 / 3)),
        ([act("look"), act("done", success=False, error="wrong box")], Failure("wrong box")),
        ([act("look"), act("done", success=False)], Failure("the task ended without success")),
        ([act("look")], Unknown()),
        ([], Unknown()),
    ],
)
def test_done_says_how_a_task_ended(actions, outcome):
    assert WorkerTaskLearn().evaluate(actions) == outcome


def test_an_episode_whose_done_failed_is_a_failure():
    (episode,) = WorkerTaskLearn().build_episodes([act("look"), act("done", success=False, error="no")])
    assert episode.outcome == Failure("no")
    assert WorkerTaskLearn().convert(episode).reason == "outcome_failure"


@pytest.mark.parametrize(
    ("outcome", "min_score", "reason"),
    [
        (Success(1.0), 0.0, None),
        (Success(0.5), 0.5, None),
        (Success(0.4), 0.5, "score_below_minimum"),
        (Failure("no"), 0.0, "outcome_failure"),
        (Timeout(0.9), 0.0, "outcome_timeout"),
        (Unknown(), 0.0, "outcome_unknown"),
    ],
)
def test_the_outcome_decides_what_is_learned(outcome, min_score, reason):
    episode = make_episode(learn_model="worker_task", messages=[], records=RUN, outcome=outcome)
    converted = WorkerTaskLearn(min_score=min_score).convert(episode)
    assert isinstance(converted, TrainingData if reason is None else Refusal)
    assert reason is None or (converted.reason, converted.episode_id) == (reason, episode.id)


# --- the sample -------------------------------------------------------------------------------------------------------------


def test_each_action_is_asked_for_after_the_result_of_the_one_before():
    (episode,) = WorkerTaskLearn(system="Be quick.").build_episodes(RUN)
    sample = WorkerTaskLearn(system="Be quick.").convert(episode)
    assert [(message.role, message.content, message.weight) for message in sample.messages] == [
        ("system", "Be quick.", 1.0),
        ("user", "Task: t1", 1.0),
        ("assistant", "look box", 1.0),
        ("user", "a ball", 1.0),
        ("assistant", "take", 0.0),
        ("user", "failed: too heavy", 1.0),
        ("assistant", "done", 1.0),
    ]
    assert (sample.episode_id, sample.split_key, sample.outcome_score) == (episode.id, "/t1", 2 / 3)


def test_only_actions_that_succeeded_are_trained():
    import tiny

    (episode,) = WorkerTaskLearn().build_episodes(RUN)
    tokenizer = tiny.make_tokenizer()
    (row,), _ = render(ChatTemplate(tokenizer), WorkerTaskLearn().convert(episode), 10_000)
    trained = tokenizer.decode([token for token, weight in zip(row.ids, row.weights, strict=True) if weight])
    assert trained == "look box<|im_end|>done<|im_end|>"
    assert check_row(row) == []


@pytest.mark.parametrize(("min_actions", "refused"), [(1, False), (3, False), (4, True)])
def test_too_few_actions_are_refused(min_actions, refused):
    learn = WorkerTaskLearn(min_actions=min_actions)
    converted = learn.convert(learn.build_episodes(RUN)[0])
    assert isinstance(converted, Refusal) == refused
    assert not refused or (converted.reason, converted.detail) == ("too_few_actions", "3 actions, expected 4 or more")


def test_the_least_number_of_actions_is_checked():
    with pytest.raises(SettingsError, match="min_actions=0"):
        WorkerTaskLearn(min_actions=0)


def test_an_episode_without_anything_is_refused():
    assert WorkerTaskLearn().convert(make_episode(messages=())).reason == "no_actions"


def test_the_recorders_weight_is_kept_and_zero_refused():
    for weight, expected in (("0.5", 0.5), ("0", "weight_zero")):
        episode = make_episode(messages=[], records=RUN, metadata=EpisodeMetadata(tags={"weight": weight}))
        converted = WorkerTaskLearn().convert(episode)
        assert getattr(converted, "weight", None) == expected or getattr(converted, "reason", None) == expected


def test_attempts_at_a_task_share_a_split_key():
    keys = {WorkerTaskLearn().convert(WorkerTaskLearn().build_episodes([*RUN[:n], DONE])[0]).split_key for n in (1, 2)}
    assert keys == {"/t1"}
