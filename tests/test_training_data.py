from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from loraloop.episode import EpisodeId, FunctionCall, Message, ToolCall
from loraloop.training_data import METHODS, ConversationRole, TrainingData, is_held_out, split_by_task

EPISODE = str(EpisodeId.from_content("0123456789abcdef" * 2))


def sft(key: str | None = None, **fields) -> TrainingData:
    return TrainingData.sft_simple("Q", "A").model_copy(update={"split_key": key, **fields})


# --- builders ---------------------------------------------------------------------------------------------------------------


def test_an_sft_sample_is_a_question_and_its_answer():
    sample = TrainingData.sft("Be brief.", "Why?", "Because.")
    assert (sample.kind, sample.is_sft, sample.system, sample.prompt, sample.chosen, sample.rejected) == (
        "sft",
        True,
        "Be brief.",
        "Why?",
        "Because.",
        None,
    )
    assert [message.role for message in sample.messages] == ["system", "user", "assistant"]


def test_a_simple_sft_sample_has_no_system_turn():
    sample = TrainingData.sft_simple("Why?", "Because.")
    assert sample.system is None
    assert [message.role for message in sample.messages] == ["user", "assistant"]
    assert TrainingData.sft("", "Why?", "Because.").system == ""


def test_a_dpo_sample_has_a_better_and_a_worse_answer():
    sample = TrainingData.dpo("Why?", "Because.", "No idea.")
    assert (sample.kind, sample.is_sft, sample.system, sample.chosen, sample.rejected) == ("dpo", False, None, "Because.", "No idea.")
    assert TrainingData.dpo_with_system("Be brief.", "Why?", "Because.", "No idea.").system == "Be brief."


def test_a_sample_is_not_changed_but_copied():
    sample = TrainingData.sft_simple("Why?", "Because.")
    traced = sample.with_episode_id(EPISODE).with_outcome_score(1).with_model("m-1")
    assert (str(traced.episode_id), traced.outcome_score, traced.model) == (EPISODE, 1.0, "m-1")
    assert (sample.episode_id, sample.outcome_score, sample.model) == (None, None, None)
    with pytest.raises(ValidationError):
        sample.weight = 2.0


def test_an_id_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no episode id"):
        TrainingData.sft_simple("Why?", "Because.").with_episode_id("../etc/passwd")


def test_a_sample_is_a_conversation_too():
    conversation = TrainingData.sft("Be brief.", "Why?", "Because.").to_conversation()
    assert len(conversation) == 3
    assert [turn.role for turn in conversation.turns] == [ConversationRole.SYSTEM, ConversationRole.USER, ConversationRole.ASSISTANT]
    assert [turn.content for turn in conversation.conversations] == ["Be brief.", "Why?", "Because."]


@pytest.mark.parametrize("fields", [{"messages": []}, {"weight": -1}, {"weight": float("nan")}, {"kind": "kto"}, {"extra": 1}])
def test_a_sample_that_cannot_be_trained_is_not_made(fields):
    with pytest.raises(ValidationError):
        TrainingData.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})


# --- lines of a training file -----------------------------------------------------------------------------------------------


def test_a_line_is_the_conversation_in_the_openai_shape():
    assert TrainingData.sft("Be brief.", "Why?", "Because.").to_line() == {
        "conversations": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Because."},
        ],
        "kind": "sft",
    }


texts = st.text(max_size=20)
messages = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=st.none() | texts,
    name=st.none() | texts,
    tool_calls=st.lists(
        st.builds(ToolCall, id=st.none() | texts, function=st.builds(FunctionCall, name=texts, arguments=texts)), max_size=2
    ),
    tool_call_id=st.none() | texts,
    is_demo=st.booleans(),
    author=st.sampled_from([None, "agent", "simulated_user"]),
    weight=st.floats(min_value=0, max_value=1e6),
)
kinds = st.sampled_from(METHODS).flatmap(
    lambda kind: st.fixed_dictionaries(
        {
            "kind": st.just(kind),
            "rejected_messages": st.lists(messages, min_size=1, max_size=2) if kind == "dpo" else st.just([]),
            "n_prompt": st.integers(0, 1) if kind == "dpo" else st.just(0),
            "desirable": st.booleans() if kind == "kto" else st.none(),
            "rejected_episode_id": st.none() | st.just(EpisodeId.parse(EPISODE)),
        }
    )
)
samples = st.builds(
    lambda of_kind, **fields: TrainingData(**of_kind, **fields),
    kinds,
    messages=st.lists(messages, min_size=2, max_size=4),
    tools=st.lists(st.dictionaries(texts, st.none() | texts | st.integers() | st.lists(st.booleans(), max_size=2), max_size=2), max_size=2),
    weight=st.floats(min_value=1e-6, max_value=1e6),
    episode_id=st.none() | st.just(EpisodeId.parse(EPISODE)),
)


def test_the_sides_of_a_pair_are_two_conversations_of_which_only_what_follows_the_prompt_is_trained():
    turns = [
        Message(role=role, content=text) for role, text in (("user", "Q"), ("assistant", "both"), ("user", "R"), ("assistant", "good"))
    ]
    pair = TrainingData(
        kind="dpo", messages=turns, n_prompt=3, rejected_messages=[Message(role="assistant", content="bad")], episode_id=EPISODE, weight=2
    )
    better, worse = pair.sides
    assert [(m.content, m.weight) for m in better.messages] == [("Q", 0), ("both", 0), ("R", 0), ("good", 1)]
    assert [(m.content, m.weight) for m in worse.messages] == [("Q", 0), ("both", 0), ("R", 0), ("bad", 1)]
    assert (better.kind, better.weight, worse.weight, worse.episode_id) == ("sft", 1, 1, EPISODE)
    other = pair.model_copy(update={"rejected_episode_id": EpisodeId.parse("ep-2")})
    assert other.episode_ids == (EPISODE, "ep-2")
    assert other.sides[1].episode_id == "ep-2"
    assert TrainingData.dpo("Q", "good", "bad").sides[1].messages[-1].content == "bad"


def test_a_side_of_any_other_sample_is_the_sample():
    plain = TrainingData.sft_simple("Q", "A")
    kto = plain.model_copy(update={"kind": "kto", "desirable": False, "weight": 3.0})
    assert kto.sides == plain.sides == (plain,)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(samples)
def test_a_line_gives_the_sample_back(sample):
    assert TrainingData.from_line(json.loads(json.dumps(sample.to_line()))) == sample


def test_a_line_of_conversations_alone_will_do():
    sample = TrainingData.from_line({"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]})
    assert sample == TrainingData.sft_simple("Q", "A")


def test_a_line_of_weight_0_is_a_sample_and_keeps_its_weight():
    line = {"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "kind": "sft", "weight": 0.0}
    assert TrainingData.from_line(line).to_line() == line


def test_a_key_of_ours_that_is_null_says_nothing():
    line = {"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    nothing = dict.fromkeys(("kind", "rejected", "tools", "weight", "episode_id"))
    assert TrainingData.from_line({**line, **nothing}) == TrainingData.from_line(line)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ([], "expected an object with `conversations`"),
        ("text", "expected an object with `conversations`"),
        ({}, "expected an object with `conversations`"),
        ({"conversations": "text"}, "a list of turns"),
        ({"conversations": []}, "conversations: .*at least 1"),
        (
            {"conversations": [{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}]},
            r"conversations\.1\.role: .*found 'robot'",
        ),
        ({"conversations": [{"from": "human", "value": "x"}]}, r"conversations\.0\.role: Field required"),
        ({"conversations": [{"role": "user", "content": "x"}], "weight": -1}, "weight -1: only a sample of kind weighted"),
        ({"conversations": [{"role": "user", "content": "x"}], "kind": "rl"}, "kind: .*found 'rl'"),
        ({"conversations": [{"role": "user", "content": "x"}], "kind": "dpo"}, "^a sample of kind dpo has rejected turns"),
        ({"conversations": [{"role": "user", "content": "x"}], "rejected": [{"role": "user", "content": "x"}]}, "no other kind has"),
        ({"conversations": [{"role": "user", "content": "x"}], "kind": "kto"}, "kto says whether it is desirable"),
        ({"conversations": [{"role": "user", "content": "x"}], "n_prompt": 1}, "n_prompt 1: only of kind dpo"),
        ({"conversations": [{"role": "user", "content": "x"}], "tools": 5}, "tools: .*found '5'"),
        ({"conversations": [{"role": "user", "content": "x"}], "rejected": [7]}, r"rejected\.0: .*found '7'"),
        ({"conversations": [{"role": "user", "content": "x"}], "episode_id": "../x"}, r"episode_id: .*found '\.\./x'"),
    ],
)
def test_a_line_that_is_no_sample_says_what_is_wrong_and_where(line, says):
    with pytest.raises(ValueError, match=says) as failure:
        TrainingData.from_line(line)
    assert "errors.pydantic.dev" not in str(failure.value)


# --- the split --------------------------------------------------------------------------------------------------------------

keys = st.lists(st.text(alphabet="abc", min_size=1, max_size=3), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(keys, st.floats(0, 1), st.integers(0, 8))
def test_a_task_is_never_on_both_sides_and_no_sample_is_lost(names, fraction, min_tasks):
    samples = [sft(name, model=str(number)) for number, name in enumerate(names)]
    training, held_out = split_by_task(samples, fraction, min_tasks)
    assert not {sample.split_key for sample in training} & {sample.split_key for sample in held_out}
    assert sorted(int(sample.model) for sample in [*training, *held_out]) == list(range(len(samples)))
    assert training


@settings(max_examples=50, deadline=None, derandomize=True)
@given(keys, keys)
def test_a_task_stays_on_its_side_when_others_come(names, others):
    side = {sample.split_key for sample in split_by_task([sft(name) for name in names], 0.5, 0)[1]}
    more = {sample.split_key for sample in split_by_task([sft(name) for name in [*others, *names]], 0.5, 0)[1]}
    assert side & set(names) == more & set(names) or all(is_held_out(name, 0.5) for name in names)


def test_the_side_of_a_task_is_the_same_on_every_machine_and_day():
    assert [name for name in map(str, range(30)) if is_held_out(name, 0.2)] == ["2", "6", "17", "18", "23", "29"]


def test_about_the_asked_fraction_is_held_out():
    assert 1900 < sum(is_held_out(f"task {number}", 0.2) for number in range(10_000)) < 2100
    assert not any(is_held_out(str(number), 0.0) for number in range(100))
    assert all(is_held_out(str(number), 1.0) for number in range(100))


def test_nothing_is_held_out_of_too_few_tasks():
    samples = [sft(str(number)) for number in range(4)] * 3
    assert split_by_task(samples, 0.9, 5) == (samples, [])
    assert split_by_task(samples, 1.0, 0) == (samples, [])
    assert split_by_task([], 0.2, 5) == ([], [])


def test_samples_without_a_key_are_divided_by_episode():
    ids = [EpisodeId.from_content(f"{number:032x}") for number in range(40)]
    samples = [sft(episode_id=one) for one in ids for _ in range(2)]
    training, held_out = split_by_task(samples, 0.5, 5)
    assert training
    assert held_out
    assert not {sample.episode_id for sample in training} & {sample.episode_id for sample in held_out}


@pytest.mark.parametrize("key", ["\ud800", "☕", "a" * 100_000])
def test_any_text_may_be_a_key(key):
    assert is_held_out(key, 1.0)
