from __future__ import annotations

import pytest

from loraloop.episode import ActionRecord, EpisodeMetadata, Failure, LlmCallRecord, Message, Success, Timeout, Unknown
from loraloop.learn.conversation import ConversationLearn
from loraloop.learn.transcript import split_key
from loraloop.plugins import LearnModel, convert_all, find
from loraloop.testing import make_episode
from loraloop.training_data import Refusal, TrainingData

ASK = Message(role="user", content="How long?")
ANSWER = Message(role="assistant", content="Seven minutes.")


def llm_call(*history: Message, response: Message = ANSWER, **fields) -> LlmCallRecord:
    return LlmCallRecord(messages=history or (ASK,), response=response, **fields)


def test_it_is_found_by_its_name():
    assert isinstance(find("learn_models", "conversation")(), LearnModel)
    assert ConversationLearn().name == "conversation"
    assert ConversationLearn().objective.endswith(".")


# --- what each outcome means to sft: DESIGN section 5 -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "options", "reason"),
    [
        (Success(1.0), {}, None),
        (Success(0.0), {}, None),
        (Success(-1.0), {}, "score_outside_scale"),
        (Success(0.5), {"min_score": 0.5}, None),
        (Success(0.49), {"min_score": 0.5}, "score_below_minimum"),
        (Success(0.49), {"min_score": 0.5, "include_timeouts": True}, "score_below_minimum"),
        (Failure("wrong"), {}, "outcome_failure"),
        (Failure("wrong"), {"min_score": -9.0, "include_timeouts": True}, "outcome_failure"),
        (Timeout(), {}, "outcome_timeout"),
        (Timeout(1.0), {}, "outcome_timeout"),
        (Timeout(0.2), {"include_timeouts": True}, None),
        (Unknown(), {}, "outcome_unknown"),
        (Unknown(), {"min_score": -9.0, "include_timeouts": True}, "outcome_unknown"),
    ],
)
def test_the_outcome_decides_what_is_learned(outcome, options, reason):
    episode = make_episode(outcome=outcome)
    converted = ConversationLearn(**options).convert(episode)
    if reason is None:
        assert isinstance(converted, TrainingData)
        assert converted.kind == "sft"
    else:
        assert isinstance(converted, Refusal)
        assert (converted.reason, converted.episode_id) == (reason, episode.id)


def test_nothing_of_the_outcome_is_in_the_text():
    sample = ConversationLearn().convert(make_episode(outcome=Success(0.875)))
    assert "0.875" not in str(sample.to_line())
    assert sample.outcome_score == 0.875


# --- the sample -------------------------------------------------------------------------------------------------------------


def test_a_sample_is_the_conversation_with_its_tools_and_can_be_traced():
    tools = ({"type": "function", "function": {"name": "boil"}},)
    episode = make_episode(tools=tools, metadata=EpisodeMetadata(tags={"model": "m-1", "weight": "0.5"}))
    sample = ConversationLearn().convert(episode)
    assert sample.messages == episode.messages
    assert sample.tools == tools
    assert (sample.episode_id, sample.model, sample.weight) == (episode.id, "m-1", 0.5)


def test_what_follows_the_last_own_turn_is_cut_off():
    thanks = Message(role="user", content="Thanks.")
    messages = [ASK, ANSWER, thanks, ANSWER.model_copy(update={"weight": 0.0}), thanks]
    assert ConversationLearn().convert(make_episode(messages=messages)).messages == (ASK, ANSWER)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no_messages"),
        ([ASK], "no_agent_turn"),
        ([ASK, ANSWER.model_copy(update={"is_demo": True})], "no_agent_turn"),
        ([ASK, ANSWER.model_copy(update={"author": "simulated_user"})], "no_agent_turn"),
        ([ASK, ANSWER.model_copy(update={"weight": 0.0})], "no_agent_turn"),
    ],
)
def test_an_episode_without_own_words_is_refused(messages, reason):
    assert ConversationLearn().convert(make_episode(messages=messages)).reason == reason


def test_an_episode_that_its_recorder_weighs_zero_is_refused():
    refusal = ConversationLearn().convert(make_episode(metadata=EpisodeMetadata(tags={"weight": "0"})))
    assert refusal.reason == "weight_zero"


@pytest.mark.parametrize("weight", ["heavy", "nan", "inf", "-1"])
def test_a_weight_that_is_none_counts_as_one(weight):
    assert ConversationLearn().convert(make_episode(metadata=EpisodeMetadata(tags={"weight": weight}))).weight == 1.0


def test_attempts_at_a_task_share_a_split_key_and_scenarios_do_not():
    airline, retail = EpisodeMetadata(scenario="airline"), EpisodeMetadata(scenario="retail")
    first = split_key(make_episode(task_id="1", metadata=airline))
    assert first == split_key(make_episode(task_id="1", metadata=airline, messages=[ASK, ANSWER]))
    assert first != split_key(make_episode(task_id="1", metadata=retail))
    assert first == split_key(make_episode(task_id=None, group_id="1", metadata=airline))
    assert split_key(make_episode(task_id="")) == "/"  # an empty task id is one all the same


def test_without_a_task_the_first_question_decides_the_split():
    assert split_key(make_episode(task_id=None)) == "How long does an egg boil?"
    episode = make_episode(task_id=None, messages=[ANSWER])
    assert split_key(episode) == str(episode.id)


# --- episodes from records --------------------------------------------------------------------------------------------------


def test_the_calls_of_a_task_are_one_episode_that_tells_the_longest_history():
    later = Message(role="user", content="And hard?")
    short = llm_call(task_id="egg")
    whole = llm_call(ASK, ANSWER, later, response=Message(role="assistant", content="Ten."), task_id="egg", group_id="g")
    (episode,) = ConversationLearn().build_episodes([whole, short])
    assert [message.content for message in episode.messages] == ["How long?", "Seven minutes.", "And hard?", "Ten."]
    assert episode.records == (whole, short)
    assert (episode.task_id, episode.group_id, episode.learn_model, episode.outcome) == ("egg", "g", "conversation", Unknown())


def test_of_a_call_that_was_tried_again_the_last_answer_counts():
    tries = [llm_call(response=Message(role="assistant", content=text), task_id="egg") for text in ("One.", "Two.")]
    (episode,) = ConversationLearn().build_episodes(tries)
    assert episode.messages[-1].content == "Two."


def test_tasks_do_not_mix_and_calls_without_one_stand_alone():
    records = [llm_call(task_id="a"), llm_call(), llm_call(task_id="b"), llm_call(task_id="a"), llm_call()]
    episodes = ConversationLearn().build_episodes(records)
    assert [(episode.task_id, len(episode.records)) for episode in episodes] == [("a", 2), (None, 1), ("b", 1), (None, 1)]


def test_failed_calls_and_other_records_give_no_episode():
    assert ConversationLearn().build_episodes([llm_call(error="503"), ActionRecord(action="done", task_id="a")]) == []
    assert ConversationLearn().build_episodes([]) == []


def test_an_episode_built_from_calls_is_not_learned_before_somebody_judges_it():
    (episode,) = ConversationLearn().build_episodes([llm_call(task_id="egg")])
    assert ConversationLearn().convert(episode).reason == "episode_open"
    closed = episode.model_copy(update={"is_open": False})
    assert ConversationLearn().convert(closed).reason == "outcome_unknown"
    assert ConversationLearn().convert(closed.model_copy(update={"outcome": Success()})).messages == (ASK, ANSWER)


# --- calls whose history was rewritten --------------------------------------------------------------------------------------

LATER, LAST = Message(role="user", content="And hard?"), Message(role="assistant", content="Ten.")
SUMMARY = Message(role="user", content="In short: an egg boils seven minutes. And hard?")


def from_calls(*calls: LlmCallRecord):
    (episode,) = ConversationLearn().build_episodes([call.model_copy(update={"task_id": "egg"}) for call in calls])
    return episode.model_copy(update={"is_open": False, "outcome": Success()})


def test_calls_that_continue_one_another_are_one_sample():
    episode = from_calls(llm_call(ASK), llm_call(ASK, ANSWER, LATER, response=LAST))
    (sample,) = ConversationLearn().convert_group([episode])
    assert sample.messages == (ASK, ANSWER, LATER, LAST)
    assert ConversationLearn().convert(episode) == sample


def test_a_compacted_history_gives_one_sample_a_call_and_every_answer_is_learned_once():
    episode = from_calls(llm_call(ASK), llm_call(SUMMARY, response=LAST), llm_call(SUMMARY, LAST, ASK))
    refusal = ConversationLearn().convert(episode)
    assert (refusal.reason, "3 samples, one a call" in refusal.detail) == ("history_rewritten", True)
    samples = ConversationLearn().convert_group([episode])
    assert [[turn.content for turn in sample.messages] for sample in samples] == [
        ["How long?", "Seven minutes."],
        [SUMMARY.content, "Ten."],
        [SUMMARY.content, "Ten.", "How long?", "Seven minutes."],
    ]
    learned = [[turn.content for turn in sample.messages if turn.is_agent and turn.weight] for sample in samples]
    assert learned == [["Seven minutes."], ["Ten."], ["Seven minutes."]]
    assert {(sample.episode_id, sample.split_key) for sample in samples} == {(episode.id, "/egg")}


@pytest.mark.parametrize(
    "changed",
    [
        ANSWER.model_copy(update={"content": "7 minutes."}),
        Message.model_validate({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}),
    ],
)
def test_an_answer_that_the_next_call_tells_otherwise_is_a_rewritten_history(changed):
    episode = from_calls(llm_call(ASK), llm_call(ASK, changed, LATER, response=LAST))
    assert len(ConversationLearn().convert_group([episode])) == 2


def test_an_empty_text_and_none_are_the_same_history():
    call = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
    asked, told = (Message.model_validate({**call, "content": content}) for content in (None, ""))
    result = Message(role="tool", content="7", tool_call_id="1")
    episode = from_calls(llm_call(ASK, response=asked), llm_call(ASK, told, result))
    assert len(ConversationLearn().convert_group([episode])) == 1


def test_an_answer_that_was_asked_for_again_is_no_rewritten_history():
    dropped = llm_call(ASK, response=Message(role="assistant", content="Two."))
    episode = from_calls(dropped, llm_call(ASK), llm_call(ASK, ANSWER, LATER, response=LAST))
    (sample,) = ConversationLearn().convert_group([episode])
    assert sample.messages == (ASK, ANSWER, LATER, LAST)


def test_a_convert_of_ones_own_is_asked_when_groups_are_converted():
    class Cautious(ConversationLearn):
        def convert(self, episode):
            return Refusal(episode_id=episode.id, reason="cautious")

    assert [converted.reason for converted in convert_all(Cautious(), [make_episode()])] == ["cautious"]
