"""A training file becomes rows, or an error that names what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML, make_tokenizer

from loraloop.chat.render import Row
from loraloop.chat.template import ChatTemplate
from loraloop.episode import EpisodeId, Message
from loraloop.errors import EmptyData, RenderError
from loraloop.train.data import build_rows, read_samples, spread
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


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# --- reading ----------------------------------------------------------------------------------------------------------------

GOOD = {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_a_line_with_only_conversations_is_a_sample(tmp_path: Path) -> None:
    (read,) = read_samples(write_lines(tmp_path / "data.jsonl", GOOD))
    assert [(message.role, message.content) for message in read.messages] == [("user", "a"), ("assistant", "b")]
    assert (read.kind, read.weight, read.tools, read.episode_id) == ("sft", 1.0, (), None)


def test_a_line_that_is_not_json_is_named_by_its_number(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", GOOD, "", '{"conversations": [')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3: not JSON"):
        read_samples(path)


@pytest.mark.parametrize(
    "line",
    [
        [],
        {},
        {"conversations": []},
        {"conversations": "text"},
        {"conversations": [{"role": "robot", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
        {**GOOD, "kind": "ppo"},
        {**GOOD, "weight": -1},
        {**GOOD, "weight": "heavy"},
        {**GOOD, "tools": 5},
        {**GOOD, "rejected": 5},
        {**GOOD, "episode_id": "../x"},
    ],
    ids=lambda line: json.dumps(line)[:60],
)
def test_a_line_that_is_no_sample_is_named_by_its_number(tmp_path: Path, line: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.jsonl, sample 2: "):
        read_samples(write_lines(tmp_path / "data.jsonl", GOOD, line))


# --- rows -------------------------------------------------------------------------------------------------------------------


def test_report_counts_samples_rows_and_tokens() -> None:
    made = build_rows([sample(), sample(number=2), sample({"role": "user", "content": "?"}, number=3)], template(), 200)
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
    made = build_rows([sample({"role": "user", "content": "?"}), sample(*first, *turns, number=2), sample(number=3)], template(), 150)
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
    made = build_rows([sample(), long, pair], template(), 100)
    assert made.report.refused == {"kind_dpo": 1, "turn_too_long": 1}
    assert [refusal.reason for refusal in made.refusals] == ["turn_too_long", "kind_dpo"]


def test_a_sample_of_weight_0_is_refused_and_the_others_are_trained() -> None:
    made = build_rows([sample(), sample(number=2, weight=0)], template(), 100)
    assert (made.report.samples, made.report.samples_used, made.report.refused) == (2, 1, {"weight_zero": 1})
    assert [(refusal.episode_id, refusal.detail) for refusal in made.refusals] == [
        (sample(number=2).episode_id, "sample 2 has the weight 0")
    ]
    with pytest.raises(EmptyData, match="the first refusal: weight_zero, sample 1 has the weight 0"):
        build_rows([sample(weight=0)], template(), 100)


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
    made = build_rows([sample(), sample(*turns, number=2, weight=weight)], template(), 100)
    assert made.report.refused == ({} if trained else {"weight_out_of_range": 1})
    assert all("sample 2 has a turn of weight" in refusal.detail for refusal in made.refusals)


def test_a_turn_of_weight_0_is_context_whatever_the_sample_weighs() -> None:
    turns = ({"role": "assistant", "content": "x", "weight": 0}, {"role": "user", "content": "?"}, {"role": "assistant", "content": "y"})
    made = build_rows([sample(*turns, weight=1e6)], template(), 100)
    assert (made.report.refused, made.report.turns) == ({}, 1)


def test_nothing_but_refusals_is_empty_data_with_the_counts() -> None:
    with pytest.raises(EmptyData, match="none of 2 samples gave anything to train on") as failure:
        build_rows([sample({"role": "user", "content": "?"}), TrainingData.dpo("a", "b", "c")], template(), 100)
    assert failure.value.refused == {"kind_dpo": 1, "no_agent_turn": 1}
    assert f"the first refusal: no_agent_turn, no turn of the agent's own has a weight above 0 ({sample().episode_id})" in str(
        failure.value
    )


def test_a_template_that_takes_no_sample_is_told_with_its_own_words() -> None:
    raising = CHATML.replace("{% for", "{% if messages|length > 2 %}{{ raise_exception('two turns at most') }}{% endif %}{% for", 1)
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(EmptyData, match=r"the first refusal: template_error, .*two turns at most") as failure:
        build_rows([sample(*turns), sample(*turns, number=2)], template(raising), 100)
    assert failure.value.refused == {"template_error": 2}


def test_a_template_without_tools_trains_calls_through_the_fallback() -> None:
    turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]})
    made = build_rows([sample(*turns)], template(), 500)
    assert (made.report.calls_recorded, made.report.calls_rendered, made.report.tools_rendered_by) == (2, 2, "fallback")


def test_a_template_that_loses_tool_calls_stops_the_run_before_anything_is_trained() -> None:
    turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "I look.", "tool_calls": [CALL]})
    losing = template(LOSES_CALLS)
    assert losing.abilities.arguments is not None, "the template must pass the probes for this test to mean anything"
    with pytest.raises(RenderError, match=r"the data check failed: tool_calls_lost in 1 rows; .* Nothing was trained\.") as failure:
        build_rows([sample(), sample(*turns, number=2)], losing, 500)
    assert str(sample(number=2).episode_id) in str(failure.value)


# --- what is measured on ----------------------------------------------------------------------------------------------------


def rows_of(*counts: int, length: int = 10) -> list[Row]:
    """`counts[n]` rows of sample n + 1, every one different."""
    return [
        Row(ids=[number, turn, *[0] * (length - 2)], weights=[1.0] * length, text="", sample_number=number)
        for number, count in enumerate(counts, 1)
        for turn in range(count)
    ]


def test_what_is_measured_is_spread_over_the_samples() -> None:
    rows = rows_of(5, 1, 3, 1)
    four = spread(rows, 40)
    assert sorted(row.sample_number for row in four) == [1, 2, 3, 4]
    assert all(row.ids[1] == 0 for row in four), "the first row of each"
    six = spread(rows, 60)
    assert six[:4] == four
    assert [(row.sample_number, row.ids[1]) for row in sorted(six[4:], key=lambda row: row.sample_number)] == [(1, 1), (3, 1)]
    assert sorted(row.ids for row in spread(rows, 1000)) == [row.ids for row in rows]


def test_what_is_measured_stays_within_its_tokens_but_is_one_row_at_least() -> None:
    rows = rows_of(*[1] * 30)
    assert [len(spread(rows, limit)) for limit in (1, 10, 19, 20, 299, 300)] == [1, 1, 1, 2, 29, 30]
    assert spread([], 100) == []


def test_what_is_measured_does_not_depend_on_the_order_of_the_file() -> None:
    rows = rows_of(*[2] * 30)
    chosen = spread(rows, 100)
    renumbered = [replace(row, sample_number=100 - row.sample_number) for row in rows]
    backwards = sorted(renumbered, key=lambda row: row.sample_number)
    assert [row.ids for row in spread(backwards, 100)] == [row.ids for row in chosen]
    assert sorted(row.sample_number for row in chosen) != list(range(1, 11)), "the first of the file"


# --- progress ---------------------------------------------------------------------------------------------------------------


def test_progress_is_told_after_each_sample() -> None:
    heard: list[int] = []
    build_rows([sample(), sample(), sample()], template(), 100, heard.append)
    assert heard == [1, 2, 3]
