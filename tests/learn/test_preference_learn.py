from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloop.episode import Episode, EpisodeMetadata, Failure, LlmCallRecord, Message, Success, Timeout, Unknown
from loraloop.errors import SettingsError
from loraloop.learn.preference import PreferenceLearn
from loraloop.plugins import convert_all
from loraloop.testing import make_episode
from loraloop.training_data import Refusal

SYSTEM, ASK = Message(role="system", content="S"), Message(role="user", content="Q")
MORE = Message(role="user", content="More?")


def say(text: str, **fields) -> Message:
    return Message(role="assistant", content=text, **fields)


def attempt(name: str, outcome, *turns: Message, **fields) -> Episode:
    messages = (SYSTEM, ASK, *(turns or (say(f"by {name}"),)))
    return make_episode(id=f"ep-{name}", task_id=fields.pop("task_id", "t"), messages=messages, outcome=outcome, **fields)


def convert(*episodes: Episode, **options) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """((better, worse) of each pair, reason of each refusal by name)."""
    pairs, refused = [], {}
    for one in convert_all(PreferenceLearn(**options), episodes):
        if isinstance(one, Refusal):
            assert one.episode_id.removeprefix("ep-") not in refused
            refused[one.episode_id.removeprefix("ep-")] = one.reason
        else:
            pairs.append((one.episode_id.removeprefix("ep-"), one.rejected_episode_id.removeprefix("ep-")))
    return pairs, refused


# --- who is paired with whom ------------------------------------------------------------------------------------------------


def test_the_best_is_paired_with_the_worst_and_each_is_used_once():
    group = [attempt(name, Success(score)) for name, score in (("a", 0.2), ("b", 0.9), ("c", 0.5), ("d", 0.7))]
    assert convert(*group) == ([("b", "a"), ("d", "c")], {})


def test_with_reuse_every_pair_that_is_far_enough_apart_is_taken():
    group = [attempt(name, Success(score)) for name, score in (("a", 0.2), ("b", 0.9), ("c", 0.5))]
    assert convert(*group, allow_reuse=True) == ([("b", "a"), ("b", "c"), ("c", "a")], {})
    assert convert(*group, allow_reuse=True, max_pairs=1) == ([("b", "a")], {"c": "max_pairs"})


def test_a_failure_is_rejected_and_never_chosen():
    assert convert(attempt("a", Success()), attempt("b", Failure("x"))) == ([("a", "b")], {})
    assert convert(attempt("a", Failure("x")), attempt("b", Failure("y"))) == ([], {"a": "no_partner", "b": "no_partner"})


def test_a_timeout_is_rejected_only_against_a_better_success():
    late = attempt("a", Timeout(0.6))
    assert convert(late, attempt("b", Success())) == ([("b", "a")], {})
    assert convert(late, attempt("b", Success(0.5))) == ([], {"a": "gap_too_small", "b": "gap_too_small"})
    assert convert(late, attempt("b", Failure("x"))) == ([], {"a": "no_partner", "b": "no_partner"})
    assert convert(attempt("a", Timeout()), attempt("b", Success(0.2))) == ([("b", "a")], {})


def test_what_nobody_judged_is_refused_as_such():
    assert convert(attempt("a", Success()), attempt("b", Unknown())) == ([], {"a": "no_partner", "b": "outcome_unknown"})


@pytest.mark.parametrize(("gap", "paired"), [(0.0, True), (0.1, True), (0.11, False), (1.0, False)])
def test_the_gap_decides_up_to_rounding(gap, paired):
    group = [attempt("a", Success(0.3)), attempt("b", Success(0.2))]  # 0.3 - 0.2 is a little less than 0.1
    expected = ([("a", "b")], {}) if paired else ([], {"a": "gap_too_small", "b": "gap_too_small"})
    assert convert(*group, min_quality_gap=gap) == expected


def test_equals_are_never_a_pair():
    group = [attempt("a", Success(0.5)), attempt("b", Success(0.5))]
    assert convert(*group, min_quality_gap=0.0) == ([], {"a": "gap_too_small", "b": "gap_too_small"})


def test_the_gap_is_a_share_of_the_scale():
    group = [attempt("a", Success(9.0)), attempt("b", Success(5.0))]
    assert convert(*group, score_range=(0, 10), min_quality_gap=0.4)[0] == [("a", "b")]
    assert convert(*group, score_range=(0, 10), min_quality_gap=0.5)[0] == []
    assert set(convert(*group)[1].values()) == {"score_outside_scale"}


def test_who_is_left_over_is_told_why():
    group = [attempt("a", Success()), attempt("b", Success()), attempt("c", Failure("x"))]
    assert convert(*group) == ([("a", "c")], {"b": "no_partner"})
    assert convert(*group, max_pairs=1) == ([("a", "c")], {"b": "max_pairs"})
    assert convert(*group, min_score=1.0, allow_reuse=True) == ([("a", "c"), ("b", "c")], {})


def test_below_the_least_score_a_success_is_only_rejected():
    group = [attempt("a", Success(0.4)), attempt("b", Failure("x")), attempt("c", Success(0.9))]
    assert convert(*group, min_score=0.5, allow_reuse=True) == ([("c", "b"), ("c", "a")], {})


# --- groups -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ({}, {}, True),
        ({"task_id": "u"}, {}, False),
        ({"group_id": "g"}, {"group_id": "g"}, True),
        ({"group_id": "g"}, {"group_id": "h"}, False),
        ({"group_id": "g", "task_id": "u"}, {"group_id": "g"}, False),
        ({"group_id": "t"}, {}, False),
        ({"metadata": EpisodeMetadata(scenario="airline")}, {"metadata": EpisodeMetadata(scenario="retail")}, False),
        ({"task_id": None}, {"task_id": None}, False),
        ({"task_id": None, "group_id": "g"}, {"task_id": None, "group_id": "g"}, True),
    ],
)
def test_only_attempts_at_one_task_are_compared(one, other, together):
    pairs, refused = convert(attempt("a", Success(), **one), attempt("b", Failure("x"), **other))
    assert (pairs, refused) == (([("a", "b")], {}) if together else ([], {"a": "no_partner", "b": "no_partner"}))


def test_a_pair_stays_on_one_side_of_the_held_out_line():
    (sample,) = PreferenceLearn().convert_group([attempt("a", Success()), attempt("b", Failure("x"))])
    assert sample.split_key == "/t"


# --- the turns of a pair ----------------------------------------------------------------------------------------------------


def pair(better: list[Message], worse: list[Message], **options):
    return PreferenceLearn(**options).convert_group([attempt("a", Success(), *better), attempt("b", Failure("x"), *worse)])


def test_the_prompt_is_what_both_share():
    (sample,) = pair([say("one"), MORE, say("good"), MORE, say("end")], [say("one"), MORE, say("bad"), MORE, say("stop"), MORE])
    assert sample.n_prompt == 4
    assert [turn.content for turn in sample.messages] == ["S", "Q", "one", "More?", "good", "More?", "end"]
    assert [turn.content for turn in sample.rejected_messages] == ["bad", "More?", "stop"]
    assert all(side.messages[:4] == sample.sides[0].messages[:4] for side in sample.sides)


def test_by_divergence_only_the_turn_where_they_part_is_learned():
    (sample,) = pair([say("one"), MORE, say("good"), MORE, say("end")], [say("one"), MORE, say("bad")], pairing="divergence")
    assert [turn.content for turn in sample.messages] == ["S", "Q", "one", "More?", "good"]
    assert [turn.content for turn in sample.rejected_messages] == ["bad"]


def test_by_divergence_those_that_go_together_longest_are_paired():
    group = [
        attempt("a", Success(), say("one"), MORE, say("good")),
        attempt("b", Failure("x"), say("other"), MORE, say("bad")),
        attempt("c", Failure("x"), say("one"), MORE, say("bad")),
    ]
    assert convert(*group) == ([("a", "b")], {"c": "no_partner"})
    assert convert(*group, pairing="divergence") == ([("a", "c")], {"b": "no_partner"})


def test_by_divergence_attempts_that_part_at_somebody_elses_turn_are_no_pair():
    other = Message(role="user", content="Less?")
    refused = pair([say("one"), MORE, say("good")], [say("one"), other, say("bad")], pairing="divergence")
    assert [refusal.reason for refusal in refused] == ["no_divergence"] * 2
    (sample,) = pair([say("one"), MORE, say("good")], [say("one"), other, say("bad")])
    assert (sample.n_prompt, sample.rejected_messages) == (3, (other, say("bad")))


@pytest.mark.parametrize(
    ("better", "worse", "reason"),
    [
        ([say("one")], [say("one")], "pair_identical"),
        ([say("one"), MORE], [say("one")], "pair_identical"),
        ([say("one"), MORE, say("two")], [say("one"), ASK, say("two")], "pair_identical"),
        ([say("one"), MORE, say("two")], [say("one")], "pair_one_sided"),
        ([say("one")], [say("one"), MORE, say("two")], "pair_one_sided"),
        ([say("one")], [say("two", weight=0)], "no_agent_turn"),
    ],
)
def test_what_cannot_be_compared_is_no_pair(better, worse, reason):
    refused = {refusal.reason for refusal in pair(better, worse)}
    assert reason in refused
    assert refused <= {reason, "no_partner"}


def test_tools_must_be_the_same():
    tools = [{"type": "function", "function": {"name": "look"}}]
    pairs, refused = convert(attempt("a", Success(), tools=tools), attempt("b", Failure("x")))
    assert (pairs, refused) == ([], {"a": "tools_differ", "b": "tools_differ"})


def test_attempts_without_a_common_beginning_are_no_pair():
    one = attempt("a", Success()).model_copy(update={"messages": (Message(role="user", content="other"), say("x"))})
    assert convert(one, attempt("b", Failure("x"))) == ([], {"a": "no_shared_prompt", "b": "no_shared_prompt"})


def test_a_hindered_pair_leaves_both_free_for_others():
    group = [attempt("a", Success(), say("one")), attempt("b", Failure("x"), say("one")), attempt("c", Failure("y"), say("two"))]
    assert convert(*group) == ([("a", "c")], {"b": "pair_identical"})


def test_ids_of_calls_do_not_part_attempts_and_results_keep_with_their_calls():
    def call(call_id: str) -> Message:
        return Message.model_validate(
            {"role": "assistant", "tool_calls": [{"id": call_id, "function": {"name": "look", "arguments": "{}"}}]}
        )

    def result(call_id: str, text: str) -> Message:
        return Message(role="tool", content=text, tool_call_id=call_id)

    (sample,) = pair(
        [call("x1"), result("x1", "A"), say("good")], [call("y1"), result("y1", "B"), call("y2"), result("y2", "C"), say("bad")]
    )
    assert sample.n_prompt == 3
    assert [turn.tool_call_id for turn in sample.rejected_messages] == ["x1", None, "y2", None]
    assert sample.rejected_messages[1] == call("y2")


def test_an_attempt_with_a_rewritten_history_is_no_side_of_a_pair():
    calls = [LlmCallRecord(messages=(ASK,), response=say("x")), LlmCallRecord(messages=(MORE,), response=say("y"))]
    assert convert(attempt("a", Success(), records=calls), attempt("b", Failure("x"))) == (
        [],
        {"a": "history_rewritten", "b": "no_partner"},
    )


def test_the_recorders_weights_are_kept():
    half = EpisodeMetadata(tags={"weight": "0.5"})
    (sample,) = PreferenceLearn().convert_group([attempt("a", Success(), metadata=half), attempt("b", Failure("x"), metadata=half)])
    assert sample.weight == 0.25
    zero = EpisodeMetadata(tags={"weight": "0"})
    assert convert(attempt("a", Success()), attempt("b", Failure("x"), metadata=zero)) == ([], {"a": "no_partner", "b": "weight_zero"})


# --- whatever the group -----------------------------------------------------------------------------------------------------

outcomes = st.one_of(
    st.sampled_from([0.0, 0.25, 0.5, 1.0]).map(Success),
    st.just(Failure("x")),
    st.sampled_from([None, 0.5]).map(Timeout),
    st.just(Unknown()),
)
texts = st.sampled_from(["one", "two", "three"])
groups = st.lists(st.tuples(outcomes, st.lists(texts, min_size=1, max_size=3), st.sampled_from(["t", "u"])), max_size=9)


@settings(max_examples=300, deadline=None)
@given(
    group=groups,
    options=st.fixed_dictionaries(
        {
            "min_quality_gap": st.sampled_from([0.0, 0.1, 0.5]),
            "max_pairs": st.sampled_from([None, 1, 2]),
            "allow_reuse": st.booleans(),
            "pairing": st.sampled_from(["best_worst", "divergence"]),
        }
    ),
    seed=st.integers(0, 5),
)
def test_every_attempt_is_in_a_pair_or_refused_once_in_whatever_order(group, options, seed):
    episodes = []
    for number, (outcome, words, task) in enumerate(group):
        turns = list(itertools.chain.from_iterable((say(word), MORE) for word in words))
        episodes.append(attempt(f"{number}", outcome, *turns, task_id=task, group_id="g"))
    pairs, refused = convert(*episodes, **options)
    shuffled = random.Random(seed).sample(episodes, len(episodes))
    assert convert(*shuffled, **options) == (pairs, refused)
    paired = [name for two in pairs for name in two]
    assert set(paired) | set(refused) == {str(number) for number in range(len(group))}
    assert not set(paired) & set(refused)
    assert options["allow_reuse"] or len(paired) == len(set(paired))
    assert options["max_pairs"] is None or len(pairs) <= options["max_pairs"]
    for better, worse in pairs:
        assert group[int(better)][2] == group[int(worse)][2]
        assert group[int(better)][0].is_success


# --- settings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_quality_gap": -0.1}, "min_quality_gap=-0.1: expected a share of the scale, 0 to 1"),
        ({"min_quality_gap": float("nan")}, "min_quality_gap=nan"),
        ({"max_pairs": 0}, "max_pairs=0: expected a whole number >= 1"),
        ({"pairing": "random"}, "pairing='random': expected best_worst or divergence"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        PreferenceLearn(**options)
