"""Conversations that are longer than a row may be."""

from __future__ import annotations

import json

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import agent, call, result, sample, system, trained_texts, user
from templates import make_template
from test_template import make_first_word_tokenizer

from loraloop.chat.render import check_row, render
from loraloop.chat.template import ChatTemplate
from loraloop.episode import Message
from loraloop.training_data import TrainingData

ROOM = 1_000_000
FAMILIES = ["chatml", "llama3.1", "qwen2.5", "qwen3", "lfm2-calls", "lfm2.5", "deepseek-v3.1", "deepseek-r1", "mistral", "gemma"]
_CALLS = ["call", "say and call", "two calls"]
STEPS = {"gemma": [], "mistral": ["call", "two calls"], "qwen3": _CALLS, "deepseek-v3.1": _CALLS, "deepseek-r1": _CALLS}
LAST = {"gemma": ["say"], "mistral": ["say"]}
OPENINGS = {
    "gemma": [[]],
    "mistral": [[]],
    "llama3.1": [[], ["system"]],
    "qwen3": [[], ["system"], ["system", "say"], ["system", "system"]],
    "deepseek-r1": [[], ["system"], ["system", "say"]],  # of several system turns it shows the last
}


def build(rounds: list[tuple[list[str], str]], words: list[str], *, opening: list[str], tools: bool) -> TrainingData:
    """A conversation: what the agent says or calls holds ¶ and the number of its turn, what others say § and theirs."""
    turns: list[Message] = []

    def add(kind: str) -> None:
        number = len(turns)
        filler = words[number % len(words)]
        own, other = f"¶{number}¶{filler}", f"§{number}§{filler}"
        one = call(json.dumps({"own": own}, ensure_ascii=False))
        made = {
            "system": [system(other)],
            "user": [user(other)],
            "say": [agent(own)],
            "half": [agent(own, weight=0.5)],
            "double": [agent(own, weight=2.0)],
            "unlearned": [agent(f"§{own}", weight=0.0)],
            "demo": [agent(other, is_demo=True)],
            "call": [agent(None, one), result(f"§{number + 1}§{filler}")],
            "say and call": [agent(own, call()), result(f"§{number + 1}§")],
            "two calls": [agent(None, one, call("{}", name="peek")), result(f"§{number + 1}§"), result(f"§{number + 2}§{filler}")],
        }
        turns.extend(made[kind])

    for kind in opening:
        add(kind)
    for steps, last in rounds:
        add("user")
        for kind in [*steps, last]:
            add(kind)
    return sample(*turns, tools=tools)


def conversations(family: str) -> st.SearchStrategy[TrainingData]:
    """Conversations of every shape that the template renders."""
    steps = STEPS.get(family, ["call", "say and call", "two calls", "say", "demo", "unlearned"])
    a_round = st.tuples(
        st.lists(st.sampled_from(steps), max_size=5) if steps else st.just([]),
        st.sampled_from(LAST.get(family, ["say", "half", "double", "call", "unlearned"])),
    )
    return st.builds(
        build,
        st.lists(a_round, min_size=1, max_size=5),
        st.lists(st.text(alphabet='a "é☕\n', max_size=80), min_size=1, max_size=4),
        opening=st.sampled_from(OPENINGS.get(family, [[], ["system"], ["system", "say"], ["system", "demo"], ["system", "system"]])),
        tools=st.just(False) if family == "gemma" else st.booleans(),
    )


def turn_of(refusal) -> int:
    return int(refusal.detail.split()[1].rstrip(":"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_agent_turn_is_trained_once_or_refused(family):
    template = make_template(family)

    @settings(max_examples=10 if family in {"qwen3", "deepseek-v3.1", "deepseek-r1", "lfm2.5"} else 25, deadline=None, derandomize=True)
    @given(conversations(family), st.integers(40, 1500))
    def holds(data, max_length):
        own = [index for index, message in enumerate(data.messages) if message.is_agent and message.weight > 0]
        whole, refusals = render(template, data, ROOM)
        if not own:
            assert [refusal.reason for refusal in refusals] == ["no_agent_turn"]
            return
        assert refusals == []
        words = dict(zip(own, (text for row in whole for text in trained_texts(template, row)), strict=True))
        rows, refusals = render(template, data, max_length)
        refused = [turn_of(refusal) for refusal in refusals if refusal.reason == "turn_too_long"]
        assert len(refused) == len(refusals)
        trained = [text for row in rows for text in trained_texts(template, row)]
        assert trained == [text for index, text in words.items() if index not in refused]
        if not refused:
            assert sum(sum(row.weights) for row in rows) == sum(sum(row.weights) for row in whole)
        assert "§" not in "".join(trained)
        for row in rows:
            assert len(row.ids) <= max_length
            assert check_row(row) == []
            check_context(data, row.text)

    holds()


def check_context(data: TrainingData, text: str) -> None:
    """The head is there, and every tool result stands behind its call."""
    assert data.messages[0].role != "system" or "§0§" in text
    first_user = next(index for index, message in enumerate(data.messages) if message.role == "user")
    assert first_user > 1 or f"§{first_user}§" in text
    assert not data.tools or "Look into a box." in text
    for index, message in enumerate(data.messages):
        if message.tool_calls and f"§{index + 1}§" in text:
            assert f"¶{index}¶" in text


def steps(n_steps: int, length: int = 20) -> list[Message]:
    turns = []
    for number in range(n_steps):
        turns += [agent(f"step {number} " + "x" * length, call()), result(f"result {number} " + "y" * length)]
    return turns


TASK = [system("Rules."), user("The task.")]


@pytest.mark.parametrize("head", [TASK, TASK[1:]])
def test_a_window_keeps_the_system_turn_the_tools_and_the_task(head):
    template = make_template("chatml")
    rows, refusals = render(template, sample(*head, *steps(20), agent("Done."), tools=True), 1200)
    assert refusals == []
    assert len(rows) > 2
    parts = [*(message.content for message in head), "Look into a box."]
    head = rows[0].text[: rows[0].text.index("<|im_start|>assistant")]
    for part in parts:
        assert part in head
    for row in rows:
        assert row.text.startswith(head + "<|im_start|>assistant\nstep ")


def test_a_window_shows_the_first_of_its_turns_half_of_the_room_as_context():
    template = make_template("chatml")
    rows, _ = render(template, sample(*TASK, *steps(40)), 1500)
    for row in rows[1:-1]:
        trained = [number for number, weight in enumerate(row.weights) if weight]
        assert 500 < trained[0] < 1000
        assert len(row.ids) > 1300


def test_the_last_window_is_filled_with_context():
    template = make_template("chatml")
    rows, _ = render(template, sample(*TASK, *steps(11)), 1500)
    assert len(rows) == 2
    assert rows[1].n_turns < rows[0].n_turns
    assert len(rows[1].ids) > 1300


def test_every_turn_is_shown_all_that_fits_where_each_is_a_row_of_its_own():
    template = make_template("qwen3")
    data = sample(*TASK, *steps(6))
    whole, _ = render(template, data, ROOM)
    longest = len(whole[-1].ids)
    rows, _ = render(template, data, longest)
    assert [row.ids for row in rows] == [row.ids for row in whole]
    rows, _ = render(template, data, longest - 1)
    assert [row.ids for row in rows[:-1]] == [row.ids for row in whole[:-1]]
    assert longest - 200 < len(rows[-1].ids) < longest


def test_a_turn_that_fits_nowhere_is_refused_and_those_round_it_are_trained():
    template = make_template("chatml")
    rows, refusals = render(template, sample(*TASK, agent("one"), user(), agent("x" * 500), user(), agent("three")), 300)
    assert [refusal.reason for refusal in refusals] == ["turn_too_long"]
    assert refusals[0].detail == "turn 4: right behind the system turn, tools and task it needs 546 tokens, allowed are 300"
    assert [text for row in rows for text in trained_texts(template, row)] == ["one<|im_end|>", "three<|im_end|>"]


def test_a_turn_that_just_fits_is_trained():
    template = make_template("chatml")
    data = sample(*TASK, agent("one"), user("?"), agent("x" * 100))
    (row,), _ = render(template, data, ROOM)
    assert len(render(template, data, len(row.ids))[0]) == 1
    rows, refusals = render(template, data, len(row.ids) - 1)
    assert ([len(row.ids) for row in rows[:1]], refusals) != ([len(row.ids)], [])
    assert sum(row.n_turns for row in rows) + len(refusals) == 2


@pytest.mark.parametrize("max_length", [0, 1, 10])
def test_no_room_at_all_refuses_every_turn(max_length):
    rows, refusals = render(make_template("chatml"), sample(*TASK, *steps(5)), max_length)
    assert rows == []
    assert [refusal.reason for refusal in refusals] == ["turn_too_long"] * 5


def test_a_window_of_a_template_that_demands_alternation_begins_with_the_agent():
    template = make_template("gemma")
    turns = [turn for number in range(20) for turn in (user(f"§{number}§" + "y" * 20), agent(f"¶{number}¶" + "x" * 20))]
    rows, refusals = render(template, sample(*turns), 500)
    assert refusals == []
    assert sum(row.n_turns for row in rows) == 20
    assert all("§0§" in row.text for row in rows)


def test_a_template_that_needs_a_question_has_one_in_every_window():
    asks = "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}{{ raise_exception('No user query') }}{% endif %}"
    template = ChatTemplate(tiny.make_tokenizer(asks + tiny.CHATML))
    rows, refusals = render(template, sample(*TASK, *steps(20)), 1000)
    assert refusals == []
    assert sum(row.n_turns for row in rows) == 20


def test_lengths_are_kept_by_a_tokenizer_whose_pieces_do_not_add_up():
    template = make_first_word_tokenizer()
    data = sample(*TASK, *steps(12), agent("Done."))
    for max_length in range(250, 700, 50):
        rows, refusals = render(template, data, max_length)
        assert refusals == []
        assert sum(row.n_turns for row in rows) == 13
        assert all(len(row.ids) <= max_length and check_row(row) == [] for row in rows)


class Undercounting(ChatTemplate):
    """A mistake: half of each text is not counted."""

    def pieces(self, text):
        return [text[: len(text) // 2]]


def test_a_row_is_never_too_long_even_where_it_was_counted_too_short():
    template = Undercounting(make_template("chatml").tokenizer)
    rows, refusals = render(template, sample(*TASK, *steps(12)), 800)
    assert rows
    assert all(len(row.ids) <= 800 for row in rows)
    assert sum(row.n_turns for row in rows) + len(refusals) == 12


class Counting(ChatTemplate):
    """Counts the turns that are rendered and the characters that are tokenised."""

    n_turns = 0
    n_characters = 0

    def text(self, turns, tools=(), *, generation_prompt=False):
        self.n_turns += len(turns)
        return super().text(turns, tools, generation_prompt=generation_prompt)

    def encode(self, text):
        self.n_characters += len(text)
        return super().encode(text)


def test_the_work_grows_with_the_conversation_not_with_its_square():
    work = []
    for n_steps in (60, 120):
        template = Counting(make_template("chatml").tokenizer)
        rows, _ = render(template, sample(*TASK, *steps(n_steps)), 1500)
        assert sum(row.n_turns for row in rows) == n_steps
        work.append((template.n_turns, template.n_characters))
    (turns, characters), (more_turns, more_characters) = work
    assert more_turns < 2.3 * turns
    assert more_characters < 2.3 * characters


def test_real_episodes_are_trained_whole(shared_data):
    episodes = json.loads((shared_data / "tau_bench" / "gpt-4o-airline.json").read_bytes())[:3]
    template = make_template("qwen2.5")
    for episode in episodes:
        keys = ("role", "content", "tool_call_id", "name")
        messages = [
            Message(
                **{key: turn.get(key) for key in keys},
                tool_calls=[{"id": one["id"], "function": one["function"]} for one in turn.get("tool_calls") or ()],
            )
            for turn in episode["traj"]
        ]
        data = sample(*messages)
        (whole,), refusals = render(template, data, ROOM)
        rows, more_refusals = render(template, data, 16_000)
        assert refusals == more_refusals == []
        assert whole.n_turns == sum(row.n_turns for row in rows) == sum(message.is_agent for message in messages)
        assert trained_texts(template, whole) == [text for row in rows for text in trained_texts(template, row)]
        assert [finding for row in [whole, *rows] for finding in check_row(row)] == []
