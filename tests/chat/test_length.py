"""What is too long is cut into windows, shortened where others speak, or refused; nothing of it in silence."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import agent, call, result, sample, system, trained_texts, user
from templates import make_template

from loraloop.chat.length import MIN_KEPT, elide, most_kept
from loraloop.chat.render import check_row, render, render_sides
from loraloop.episode import Message
from loraloop.training_data import TrainingData

ROOM = 1_000_000
TASK = [system("Rules."), user("The task.")]


def steps(*lengths: int) -> list[Message]:
    turns: list[Message] = []
    for number, length in enumerate(lengths):
        turns += [agent(f"step {number}", call()), result(f"<{number}>" + "y" * length + f"</{number}>")]
    return turns


LONG = sample(*TASK, *steps(100, 4000, 1500, 100), agent("Done."), tools=True)


def test_a_sample_that_fits_is_the_same_under_every_policy():
    template = make_template("chatml")
    data = sample(*TASK, *steps(100, 300), agent("Done."))
    whole = render(template, data, 2000)
    assert len(whole[0]) == 1
    assert render(template, data, 2000, "elide") == render(template, data, 2000, "refuse") == whole


def test_refuse_leaves_out_the_whole_sample_with_the_limit_in_words():
    rows, refusals = render(make_template("chatml"), LONG, 3000, "refuse")
    assert rows == []
    assert [refusal.reason for refusal in refusals] == ["too_long"]
    assert "3000" in refusals[0].detail


@pytest.mark.parametrize("name", ["chatml", "qwen2.5", "qwen3", "lfm2.5", "llama3.1", "deepseek-v3.1"])
def test_elide_cuts_the_middle_of_the_longest_results_and_no_more_than_it_takes(name):
    template = make_template(name)
    whole, _ = render(template, LONG, ROOM)
    limit = len(whole[-1].ids) - 2000
    rows, refusals = render(template, LONG, limit, "elide")
    assert refusals == []
    assert not any(row.is_window for row in rows)
    last = rows[-1]
    assert limit - 60 <= len(last.ids) <= limit
    assert "characters left out …]" in last.text
    for kept in ("<0>", "<1>", "</1>", "<2>", "</2>", "<3>", "y" * 1500):
        assert kept in last.text  # the longest is cut first: the one of 1,500 stays whole
    assert sum(row.n_elided for row in rows) == rows[0].n_elided > 2000
    assert [text for row in rows for text in trained_texts(template, row)] == [
        text for row in whole for text in trained_texts(template, row)
    ]
    assert [finding for row in rows for finding in check_row(row)] == []


def test_elide_says_how_many_characters_are_left_out():
    (message,), n_left_out = elide([result("a" * 1000 + "b" * 1000)], [0], 500)
    assert message.content == "a" * 250 + "\n[… 1,500 characters left out …]\n" + "b" * 250
    assert n_left_out == 1500


def test_elide_never_makes_a_text_longer():
    messages = [result("x" * length) for length in range(480, 560)]
    made, n_left_out = elide(messages, range(len(messages)), 500)
    assert all(len(after.content) <= len(before.content) for before, after in zip(messages, made, strict=True))
    assert n_left_out > 0


def test_what_elide_cannot_make_fit_becomes_windows():
    template = make_template("chatml")
    data = sample(*TASK, *steps(*[210] * 20), agent("Done."))
    windows, refusals = render(template, data, 1000)
    assert refusals == []
    assert len(windows) > 2
    assert any(row.is_window for row in windows)
    assert render(template, data, 1000, "elide") == (windows, refusals)
    assert {row.n_elided for row in windows} == {0}


def test_the_agents_words_the_system_turn_and_the_task_are_never_cut():
    template = make_template("chatml")
    data = sample(system("S" * 600), user("T" * 600), agent("A" * 900, call()), result("r" * 3000), agent("B" * 900))
    rows, refusals = render(template, data, 4000, "elide")
    assert refusals == []
    assert len(rows) == 1
    for words in ("S" * 600, "T" * 600, "A" * 900, "B" * 900):
        assert words in rows[0].text
    assert rows[0].text.count("left out") == 1


def test_without_tool_results_the_environments_answers_are_cut():
    template = make_template("chatml")
    data = sample(user("T" * 500), agent("SELECT 1"), user("row " * 1000), agent("Done."))
    (row,), refusals = render(template, data, 2500, "elide")
    assert refusals == []
    assert "T" * 500 in row.text
    assert row.n_elided > 1500


def pair(better: list[Message], worse: list[Message]) -> TrainingData:
    prompt = [*TASK, *steps(3000)]
    return TrainingData(kind="dpo", messages=(*prompt, *better), rejected_messages=tuple(worse), n_prompt=len(prompt))


def test_both_sides_of_a_pair_are_cut_alike_so_that_their_prompt_is_one():
    template = make_template("qwen2.5")
    data = pair([agent("Better."), user("?"), agent("x" * 1500)], [agent("Worse.")])
    (better, _), (worse, _) = render_sides(template, data, 4000, "elide")
    prompt = better[0].text[: better[0].text.index("Better.")]
    assert worse[0].text[: worse[0].text.index("Worse.")] == prompt
    assert "left out" in prompt
    assert better[0].n_elided == worse[0].n_elided > 0
    (better, _), (worse, _) = render_sides(template, data, ROOM, "elide")
    assert better[0].n_elided == worse[0].n_elided == 0


def test_a_pair_of_which_one_side_is_too_long_is_refused_whole():
    data = pair([agent("x" * 1500)], [agent("Worse.")])
    rendered = render_sides(make_template("qwen2.5"), data, 4000, "refuse")
    assert [(rows, [refusal.reason for refusal in refusals]) for rows, refusals in rendered] == [([], ["too_long"])] * 2


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=6), st.integers(0, 8000))
def test_as_much_is_kept_as_fits(lengths, room):
    def fits(n_kept):
        return sum(min(length, n_kept) for length in lengths) <= room

    kept = most_kept(lengths, fits)
    if kept is None:
        assert max(lengths) <= MIN_KEPT or not fits(MIN_KEPT)
    else:
        assert MIN_KEPT <= kept < max(lengths)
        assert fits(kept)
        assert not fits(kept + 1) or kept + 1 == max(lengths)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 900), min_size=1, max_size=6), st.integers(700, 3500), st.sampled_from(["chatml", "qwen3", "lfm2.5"]))
def test_the_agents_weights_are_the_same_whatever_is_cut(lengths, max_length, name):
    template = make_template(name)
    data = sample(*TASK, *steps(*lengths), agent("Done.", weight=0.5))
    whole, _ = render(template, data, ROOM)
    for policy in ("window", "elide"):
        rows, refusals = render(template, data, max_length, policy)
        assert all(len(row.ids) <= max_length for row in rows)
        assert [refusal.reason for refusal in refusals if refusal.reason != "turn_too_long"] == []
        if not refusals:
            assert sum(sum(row.weights) for row in rows) == sum(sum(row.weights) for row in whole)
