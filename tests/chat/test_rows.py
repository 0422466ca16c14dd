"""Samples become units of rows, or a refusal or error that names what is wrong with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny import CHATML, make_tokenizer

from loraloop.chat.render import Row
from loraloop.chat.rows import Unit, build_units, spread
from loraloop.chat.template import ChatTemplate
from loraloop.episode import EpisodeId, Message
from loraloop.errors import EmptyData, RenderError
from loraloop.training_data import TrainingData

CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"what": "egg"}'}}
LOSES_CALLS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}{% if call.function.name.startswith('probe') or loop.index > 1 %}"
    "{{ '<call>' + call.function.name + ' ' + call.function.arguments|tojson + '</call>' }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Keeps the calls of a probe, and loses the first of every other turn."""


def template(text: str = CHATML) -> ChatTemplate:
    return ChatTemplate(make_tokenizer(text))


def sample(*turns: dict[str, Any], number: int = 1, **fields: Any) -> TrainingData:
    default = ({"role": "user", "content": "Say hello"}, {"role": "assistant", "content": "hello"})
    messages = tuple(Message.model_validate(turn) for turn in turns or default)
    return TrainingData(messages=messages, episode_id=EpisodeId.from_content(f"{number:032x}"), **fields)


# --- rows -------------------------------------------------------------------------------------------------------------------


def test_report_counts_samples_rows_and_tokens() -> None:
    made = build_units([sample(), sample(number=2), sample({"role": "user", "content": "?"}, number=3)], template(), 200)
    text = "<|im_start|>user\nSay hello<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    n_tokens = len(text) - 2 * len("im_start||<>") - 2 * len("im_end||<>") + 4  # single bytes, and four special tokens
    report = made.report
    assert (report.samples, report.samples_used, report.rows) == (3, 2, 2)
    assert report.n_tokens == 2 * n_tokens
    assert report.n_supervised_tokens == 2 * (len("hello") + 1)
    assert report.trained_by_role == {"system": 0, "user": 0, "assistant": 12, "tool": 0}
    assert (report.turns, report.stops_trained, report.calls_recorded, report.calls_rendered) == (2, 2, 0, 0)
    assert report.refused == {"no_agent_turn": 1}
    assert report.tools_rendered_by == "none"


def test_rows_tell_the_samples_and_episodes_that_they_are_of() -> None:
    first = [{"role": "user", "content": "Go"}]
    turns = [{"role": role, "content": f"{letter * 40}"} for letter in "abcd" for role in ("assistant", "user")]
    made = build_units([sample({"role": "user", "content": "?"}), sample(*first, *turns, number=2), sample(number=3)], template(), 150)
    numbers = [row.sample_number for row in made.rows]
    assert len(numbers) > 2, "the long sample must have become several rows for this test to mean anything"
    assert numbers == [2] * (len(numbers) - 1) + [3]
    long, short = sample(number=2).episode_id, sample(number=3).episode_id
    assert made.used_episode_ids({len(numbers) - 1, 1, 0}) == [long, short]
    assert made.used_episode_ids({1}) == [long]
    assert [made.count_samples(used) for used in ({0, 1}, {0, len(numbers) - 1}, set())] == [1, 2, 0]


def test_samples_that_cannot_be_trained_are_refused_by_reason() -> None:
    long = sample({"role": "user", "content": "?"}, {"role": "assistant", "content": "y" * 300}, number=2)
    pair = TrainingData.dpo("a", "b", "c")
    made = build_units([sample(), long, pair], template(), 100)
    assert made.report.refused == {"kind_dpo": 1, "turn_too_long": 1}
    assert [refusal.reason for refusal in made.refusals] == ["turn_too_long", "kind_dpo"]


def test_a_sample_of_weight_0_is_refused_and_the_others_are_trained() -> None:
    made = build_units([sample(), sample(number=2, weight=0)], template(), 100)
    assert (made.report.samples, made.report.samples_used, made.report.refused) == (2, 1, {"weight_zero": 1})
    assert [(refusal.episode_id, refusal.detail) for refusal in made.refusals] == [
        (sample(number=2).episode_id, "sample 2 has the weight 0")
    ]
    with pytest.raises(EmptyData, match="the first refusal: weight_zero, sample 1 has the weight 0"):
        build_units([sample(weight=0)], template(), 100)


@pytest.mark.parametrize(
    ("weight", "turn", "trained"),
    [
        (1e300, 1, False),
        (1e-300, 1, False),
        (1.01e6, 1, False),
        (0.99e-6, 1, False),
        (1e6, 1, True),
        (1e-6, 1, True),
        (1, 1e300, False),
        (1e5, 100, False),
        (1e300, 1e-300, True),
        (1e-300, 1e-300, False),
        (1e300, 1e300, False),
    ],
)
def test_weights_that_float32_cannot_sum_are_refused(weight: float, turn: float, trained: bool) -> None:
    turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "y", "weight": turn})
    made = build_units([sample(), sample(*turns, number=2, weight=weight)], template(), 100)
    assert made.report.refused == ({} if trained else {"weight_out_of_range": 1})
    assert all("sample 2 has a turn of weight" in refusal.detail for refusal in made.refusals)


def test_a_turn_of_weight_0_is_context_whatever_the_sample_weighs() -> None:
    turns = ({"role": "assistant", "content": "x", "weight": 0}, {"role": "user", "content": "?"}, {"role": "assistant", "content": "y"})
    made = build_units([sample(*turns, weight=1e6)], template(), 100)
    assert (made.report.refused, made.report.turns) == ({}, 1)


def test_nothing_but_refusals_is_empty_data_with_the_counts() -> None:
    with pytest.raises(EmptyData, match="none of 2 samples gave anything to train on") as failure:
        build_units([sample({"role": "user", "content": "?"}), TrainingData.dpo("a", "b", "c")], template(), 100)
    assert failure.value.refused == {"kind_dpo": 1, "no_agent_turn": 1}
    assert f"the first refusal: no_agent_turn, no turn of the agent's own has a weight above 0 ({sample().episode_id})" in str(
        failure.value
    )


def test_a_template_that_takes_no_sample_is_told_with_its_own_words() -> None:
    raising = CHATML.replace("{% for", "{% if messages|length > 2 %}{{ raise_exception('two turns at most') }}{% endif %}{% for", 1)
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(EmptyData, match=r"the first refusal: template_error, .*two turns at most") as failure:
        build_units([sample(*turns), sample(*turns, number=2)], template(raising), 100)
    assert failure.value.refused == {"template_error": 2}


def test_a_template_without_tools_trains_calls_through_the_fallback() -> None:
    turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]})
    made = build_units([sample(*turns)], template(), 500)
    assert (made.report.calls_recorded, made.report.calls_rendered, made.report.tools_rendered_by) == (2, 2, "fallback")


def test_a_template_that_loses_tool_calls_stops_the_run_before_anything_is_trained() -> None:
    turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "I look.", "tool_calls": [CALL]})
    losing = template(LOSES_CALLS)
    assert losing.abilities.arguments is not None, "the template must pass the probes for this test to mean anything"
    with pytest.raises(RenderError, match=r"the data check failed: tool_calls_lost in 1 rows; .* Nothing was trained\.") as failure:
        build_units([sample(), sample(*turns, number=2)], losing, 500)
    assert str(sample(number=2).episode_id) in str(failure.value)


# --- what is measured on ----------------------------------------------------------------------------------------------------


def units_of(*counts: int, length: int = 10) -> list[Unit]:
    """`counts[n]` units of sample n + 1, every one different."""
    return [
        Unit((Row(ids=[number, turn, *[0] * (length - 2)], weights=[1.0] * length, text=""),), 1, sample_number=number)
        for number, count in enumerate(counts, 1)
        for turn in range(count)
    ]


def test_what_is_measured_is_spread_over_the_samples() -> None:
    units = units_of(5, 1, 3, 1)
    four = spread(units, 40)
    assert sorted(unit.sample_number for unit in four) == [1, 2, 3, 4]
    assert all(unit.rows[0].ids[1] == 0 for unit in four), "the first unit of each"
    six = spread(units, 60)
    assert six[:4] == four
    assert [(unit.sample_number, unit.rows[0].ids[1]) for unit in sorted(six[4:], key=lambda unit: unit.sample_number)] == [(1, 1), (3, 1)]
    assert sorted(unit.rows[0].ids for unit in spread(units, 1000)) == [unit.rows[0].ids for unit in units]


def test_what_is_measured_stays_within_its_tokens_but_is_one_row_at_least() -> None:
    units = units_of(*[1] * 30)
    assert [len(spread(units, limit)) for limit in (1, 10, 19, 20, 299, 300)] == [1, 1, 1, 2, 29, 30]
    assert spread([], 100) == []


def test_what_is_measured_does_not_depend_on_the_order_of_the_file() -> None:
    units = units_of(*[2] * 30)
    chosen = spread(units, 100)
    renumbered = [replace(unit, sample_number=100 - unit.sample_number) for unit in units]
    backwards = sorted(renumbered, key=lambda unit: unit.sample_number)
    assert [unit.rows[0].ids for unit in spread(backwards, 100)] == [unit.rows[0].ids for unit in chosen]
    assert sorted(unit.sample_number for unit in chosen) != list(range(1, 11)), "the first of the file"


# --- progress ---------------------------------------------------------------------------------------------------------------


def test_progress_is_told_after_each_sample() -> None:
    heard: list[int] = []
    build_units([sample(), sample(), sample()], template(), 100, on_progress=heard.append)
    assert heard == [1, 2, 3]


# --- methods ----------------------------------------------------------------------------------------------------------------


def turns(*words: str) -> list[Message]:
    """User and agent in turn."""
    return [Message(role=role, content=word) for role, word in zip(["user", "assistant"] * len(words), words, strict=False)]


def trained_text(row: Row) -> str:
    tokenizer = template().tokenizer
    return str(tokenizer.decode([token for token, weight in zip(row.ids, row.weights, strict=True) if weight]))


def pair(*rejected: str, number: int = 1) -> TrainingData:
    ids = {"episode_id": EpisodeId.parse(f"good-{number}"), "rejected_episode_id": EpisodeId.parse(f"bad-{number}")}
    worse = [Message(role=role, content=word) for role, word in zip(["assistant", "user"] * len(rejected), rejected, strict=False)]
    return TrainingData(kind="dpo", messages=tuple(turns("Go", "on", "and", "yes")), n_prompt=3, rejected_messages=tuple(worse), **ids)


def test_a_pair_is_one_unit_in_which_only_the_agents_words_behind_the_prompt_are_trained() -> None:
    made = build_units([pair("no", "why?", "so")], template(), 500, method="dpo")
    (unit,) = made.units
    assert [trained_text(row) for row in unit.better] == ["yes<|im_end|>"]
    assert [trained_text(row) for row in unit.worse] == ["no<|im_end|>so<|im_end|>"]
    assert unit.episode_ids == ("good-1", "bad-1")
    assert made.used_episode_ids({0}) == ["good-1", "bad-1"]
    assert (made.report.samples, made.report.samples_used, made.report.rows, made.report.turns) == (1, 1, 2, 3)


def test_a_pair_of_which_a_turn_does_not_fit_is_refused_whole() -> None:
    made = build_units([pair("n" * 300), pair("no", number=2)], template(), 120, method="dpo")
    assert [unit.sample_number for unit in made.units] == [2]
    assert made.report.refused == {"turn_too_long": 1}
    assert [refusal.episode_id for refusal in made.refusals] == ["bad-1"]


def test_a_pair_whose_sides_are_the_same_tokens_is_refused() -> None:
    made = build_units([pair("yes"), pair("no", number=2)], template(), 120, method="dpo")
    assert [unit.sample_number for unit in made.units] == [2]
    assert [(refusal.reason, refusal.episode_id) for refusal in made.refusals] == [("pair_identical", "good-1")]


def test_a_long_kto_sample_is_one_unit_of_several_rows() -> None:
    words = [letter * 40 for letter in "abcdef"]
    good = TrainingData(kind="kto", desirable=True, messages=tuple(turns(*words)))
    bad = good.model_copy(update={"desirable": False})
    made = build_units([good, bad], template(), 150, method="kto")
    assert len(made.units[0].rows) > 1
    assert (made.units[0].better, made.units[0].worse) == (made.units[0].rows, ())
    assert (made.units[1].better, made.units[1].worse) == ((), made.units[1].rows)
    assert sum(row.n_turns for row in made.units[0].rows) == 3


@pytest.mark.parametrize(("method", "kinds"), [("sft", {"sft"}), ("weighted", {"sft", "weighted"}), ("dpo", {"dpo"}), ("kto", {"kto"})])
def test_a_method_trains_its_kinds_and_refuses_the_others_by_name(method: Any, kinds: set[str]) -> None:
    made = {
        "sft": sample(),
        "weighted": sample(kind="weighted", weight=-0.5),
        "dpo": pair("no"),
        "kto": sample(kind="kto", desirable=True),
    }
    built = build_units(list(made.values()), template(), 300, method=method)
    assert {kind for number, kind in enumerate(made, 1) if number in {unit.sample_number for unit in built.units}} == kinds
    assert set(built.report.refused) == {f"kind_{kind}" for kind in made if kind not in kinds}


def test_the_weight_of_a_sample_is_its_units_and_that_of_a_turn_its_tokens() -> None:
    heavy = sample({"role": "user", "content": "?"}, {"role": "assistant", "content": "y", "weight": 0.5}, kind="weighted", weight=-3)
    (unit,) = build_units([heavy], template(), 100, method="weighted").units
    assert unit.weight == -3
    assert {weight for weight in unit.rows[0].weights if weight} == {0.5}
    assert (unit.better, unit.worse) == ((), unit.rows)
