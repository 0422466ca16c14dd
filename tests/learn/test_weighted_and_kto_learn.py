from __future__ import annotations

import pytest

from loraloop.episode import ActionRecord, EpisodeMetadata, Failure, LlmCallRecord, Message, Success, Timeout, Unknown
from loraloop.errors import SettingsError
from loraloop.learn.conversation import ConversationLearn
from loraloop.learn.kto import KtoLearn
from loraloop.learn.weighted import WeightedLearn
from loraloop.learn.worker_task import WorkerTaskLearn
from loraloop.plugins import convert_all
from loraloop.testing import make_episode
from loraloop.training_data import Refusal

ASK, ANSWER = Message(role="user", content="Q"), Message(role="assistant", content="A")
RUN = [
    ActionRecord(action="look", target="box", output="a ball"),
    ActionRecord(action="take", success=False, error="too heavy"),
    ActionRecord(action="done"),
]


# --- weighted ---------------------------------------------------------------------------------------------------------------


def test_a_sample_weighs_its_score_times_what_the_recorder_gave():
    episode = make_episode(outcome=Success(0.5), metadata=EpisodeMetadata(tags={"weight": "0.5"}))
    assert WeightedLearn().convert(episode).weight == 0.25
    assert WeightedLearn(score_range=(0, 0.5)).convert(episode).weight == 0.5


def test_what_is_fully_solved_is_the_sft_sample_to_the_bit():
    episode = make_episode(outcome=Success(1.0), metadata=EpisodeMetadata(tags={"weight": "0.3"}))
    one, other = WeightedLearn().convert(episode), ConversationLearn().convert(episode)
    assert one.model_copy(update={"kind": "sft"}) == other


def test_turns_keep_their_own_weights():
    messages = (ASK, ANSWER.model_copy(update={"weight": 0.25}), ASK, ANSWER)
    sample = WeightedLearn().convert(make_episode(messages=messages, outcome=Success(0.5)))
    assert [message.weight for message in sample.messages] == [1.0, 0.25, 1.0, 1.0]


def test_a_failure_weighs_less_than_nothing_only_when_asked():
    episode = make_episode(outcome=Failure("x"))
    assert WeightedLearn().convert(episode).reason == "outcome_failure"
    assert WeightedLearn(failure_weight=-0.2).convert(episode).weight == -0.2


# --- kto --------------------------------------------------------------------------------------------------------------------


def test_a_success_is_desirable_and_a_failure_is_not():
    assert KtoLearn().convert(make_episode(outcome=Success(0.0))).desirable is True
    assert KtoLearn().convert(make_episode(outcome=Failure("x"))).desirable is False


def test_only_undesirable_episodes_give_samples_all_the_same():
    converted = list(convert_all(KtoLearn(), [make_episode(outcome=Failure("x")) for _ in range(3)]))
    assert [sample.desirable for sample in converted] == [False] * 3


# --- what of an episode is learned ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KtoLearn, WeightedLearn])
def test_an_episode_is_told_by_its_messages_else_by_its_actions(kind):
    by_messages = kind().convert(make_episode(records=RUN))
    assert by_messages.messages == make_episode().messages
    by_actions = kind().convert(make_episode(messages=(), records=RUN, task_id="t"))
    assert by_actions.messages == WorkerTaskLearn().convert(make_episode(messages=(), records=RUN, task_id="t")).messages
    chosen = kind(of="worker_task").convert(make_episode(records=RUN, task_id="t"))
    assert chosen.messages == by_actions.messages
    assert kind(of=WorkerTaskLearn(system="Be quick.")).convert(make_episode(records=RUN)).messages[0].content == "Be quick."


def test_a_step_that_failed_counts_where_the_episode_is_to_become_less_likely():
    def weights(sample) -> list[float]:
        return [message.weight for message in sample.messages if message.role == "assistant"]

    good = make_episode(messages=(), records=RUN)
    bad = good.model_copy(update={"outcome": Failure("x")})
    assert weights(KtoLearn().convert(good)) == [1.0, 0.0, 1.0]
    assert weights(KtoLearn().convert(bad)) == [1.0, 1.0, 1.0]
    assert weights(WeightedLearn().convert(good)) == [1.0, 0.0, 1.0]
    assert weights(WeightedLearn(failure_weight=-1).convert(bad)) == [1.0, 1.0, 1.0]


def test_a_rewritten_history_gives_one_sample_a_call_to_these_too():
    calls = [LlmCallRecord(messages=(ASK,), response=ANSWER), LlmCallRecord(messages=(ANSWER, ASK), response=ANSWER)]
    episode = make_episode(records=calls, outcome=Failure("x"))
    assert [sample.desirable for sample in KtoLearn().convert_group([episode])] == [False, False]
    assert KtoLearn().convert(episode).reason == "history_rewritten"


@pytest.mark.parametrize("kind", [KtoLearn, WeightedLearn])
def test_a_form_must_be_one(kind):
    with pytest.raises(SettingsError, match="no learn model named 'taks'"):
        kind(of="taks")
    for of in ("kto", "preference", 7):
        with pytest.raises(SettingsError, match="expected a learn model of method sft"):
            kind(of=of)


@pytest.mark.parametrize(("kind", "name"), [(KtoLearn, "kto"), (WeightedLearn, "weighted")])
def test_the_name_tells_the_form_that_was_chosen(kind, name):
    assert (kind().name, kind(of="worker_task").name) == (name, f"worker_task.{name}")


def test_records_are_judged_by_the_form():
    assert KtoLearn().evaluate([RUN[0], RUN[2]]) == Success(1.0)
    assert KtoLearn().evaluate([LlmCallRecord(messages=(ASK,), response=ANSWER)]) == Unknown()
    assert isinstance(KtoLearn(include_timeouts=True).convert(make_episode(outcome=Timeout())).desirable, bool)
    assert isinstance(KtoLearn().convert(make_episode(outcome=Timeout())), Refusal)
