"""Silent failures that users report of masks, templates, tools and lengths, put in on purpose: each is an error or a named refusal here.

| what went wrong in silence elsewhere | asks (numbers of the survey) | what happens here |
|---|---|---|
| every label is -100, and the loss is 0 or not a number | 5, 12, 13, 20, 45 | `no_agent_turn`, EmptyData with counts |
| the end of the turn is not trained, and the model never stops | 2, 6, 8, 18 | `template_error`; `stop_token_untrained` stops the run |
| a turn ends in the next role's marker, or twice | 7 | `template_error` |
| the first token of an answer is never trained (off by one) | 11 | the trained ids are those of the answer, to the first |
| tokens at the border of roles are trained | 7, 14 | `trained_border_token` stops the run |
| one tool turn drops the row | 17 | kept, by the fallback where the template has no such role |
| tool output, user or system turns are trained | 18, 19, 21 | `trained_…_token` stops the run |
| DPO scores tool output as the agent's | G3 | both sides of a pair have the agent's mask |
| tools never reach the template | 9, 35 | `tools_missing` stops the run; calls without tools are told |
| tool calls are dropped by the template | 6, 10 | the fallback, or `tool_calls_lost` stops the run |
| Arrow pads tool schemas with null keys | 30, 31 | `null_in_tools` |
| arguments are JSON within JSON | 31, 32 | `double_encoded_arguments` |
| traces of one text hold the observations | 39 | `observation_in_turn` |
| long conversations are cut, or dropped without a count | 40, 41, 42, 43, 44, 46 | windows, counted; `turn_too_long`, `too_long` |
| thoughts vanish from history | 10 | a row for each call, behind its very prompt |
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny

from loraloop.chat.render import check_row, render, render_sides
from loraloop.chat.rows import build_units
from loraloop.chat.template import ChatTemplate, Words
from loraloop.episode import FunctionCall, Message, ToolCall
from loraloop.errors import EmptyData, RenderError
from loraloop.training_data import TrainingData

ROOM = 100_000
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {"box": {"type": "string"}}}},
}
TOOLLESS = "{% for m in messages if m.role != 'tool' %}" + tiny.CHATML.removeprefix("{% for message in messages %}").replace("message", "m")
"""A template that leaves tool turns out, as some do."""


def turn(role: str, content: str | None = "words", **fields: Any) -> Message:
    return Message(role=role, content=content, **fields)


def calling(arguments: str = '{"box":"red"}', content: str | None = None) -> Message:
    return Message(role="assistant", content=content, tool_calls=(ToolCall(function=FunctionCall(name="look", arguments=arguments)),))


USE = (turn("system", "§s§"), turn("user", "§u§"), calling(), turn("tool", "§t§"), turn("assistant", "A ball."))


def sample(*messages: Message, tool: dict[str, Any] | None = None) -> TrainingData:
    return TrainingData(messages=messages, tools=(tool,) if tool else ())


def make(template: str = tiny.CHATML) -> ChatTemplate:
    return ChatTemplate(tiny.make_tokenizer(template))


def reasons(data: TrainingData, template: ChatTemplate | None = None, **options: Any) -> list[str]:
    return [refusal.reason for refusal in render(template or make(), data, options.pop("max_length", ROOM), **options)[1]]


# --- the mask ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [None, turn("assistant", weight=0), turn("assistant", is_demo=True), turn("assistant", author="user")])
def test_data_without_a_token_of_the_agent_is_an_error_with_the_counts(answer):
    data = sample(turn("user"), *([answer] if answer else []))
    assert reasons(data) == ["no_agent_turn"]
    with pytest.raises(EmptyData) as caught:
        build_units([data, data], make(), ROOM)
    assert caught.value.refused == {"no_agent_turn": 2}


@pytest.mark.parametrize(
    ("ending", "words"),
    [("'\n'", "never learn to stop"), ("'<|im_end|><|im_start|>user<|im_end|>\n'", "more than once"), ("'\n\nUser: '", "learn to stop")],
)
def test_a_template_that_does_not_end_a_turn_once_is_an_error_not_a_model_that_never_stops(ending, words):
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + " + ending + " }}{% endfor %}"
    with pytest.raises(EmptyData, match=words):
        build_units([sample(turn("user"), turn("assistant"))], make(template), ROOM)


class Shifted(ChatTemplate):
    """A mistake: the mask begins and ends elsewhere than the agent's words."""

    shift = (0, 0)

    def find_words(self, turns, tools=()):
        words = super().find_words(turns, tools)
        return words and Words(words.text, words.start + self.shift[0], words.end + self.shift[1])


@pytest.mark.parametrize(
    ("shift", "finding"), [((0, -10), "stop_token_untrained"), ((-40, 0), "trained_user_token"), ((-33, 0), "trained_border_token")]
)
def test_a_mask_that_is_shifted_stops_the_run(shift, finding):
    template = Shifted(make().tokenizer)
    template.shift = shift
    with pytest.raises(RenderError, match=finding):
        build_units([sample(turn("user", "A question."), turn("assistant"))], template, ROOM)


@pytest.mark.parametrize("answer", ["A ball.", " leading space", "\nleading line", "☕", "a"])
def test_an_answer_is_trained_from_its_first_token_through_the_stop_token(answer):
    template = make()
    (row,), _ = render(template, sample(turn("user"), turn("assistant", answer)), ROOM)
    trained = [token for token, weight in zip(row.ids, row.weights, strict=True) if weight]
    assert trained == template.encode(answer + "<|im_end|>")[0]
    first = next(number for number, weight in enumerate(row.weights) if weight)
    assert template.tokenizer.decode(row.ids[:first]).endswith("<|im_start|>assistant\n")
    assert template.tokenizer.decode(row.ids[first + len(trained) :]) == "\n"


class Whole(ChatTemplate):
    """A mistake of another trainer: everything behind the first user turn is taken for the agent's."""

    def find_words(self, turns, tools=()):
        words = super().find_words(turns, tools)
        start = words.text.find("§u§")
        return Words(words.text, start, words.end) if len(turns) > 4 and start >= 0 else None


def test_training_another_authors_words_stops_the_run():
    with pytest.raises(RenderError, match=r"trained_(user|tool)_token"):
        build_units([sample(*USE)], Whole(make().tokenizer), ROOM)


def test_tool_outputs_carry_no_loss_on_either_side_of_a_pair():
    worse = (calling('{"box":"blue"}'), turn("tool", "§wrong§"), turn("assistant", "A cube."))
    pair = TrainingData(kind="dpo", messages=USE, rejected_messages=worse, n_prompt=2)
    template = make()
    for (row,), refusals in render_sides(template, pair, ROOM):
        trained = template.tokenizer.decode([token for token, weight in zip(row.ids, row.weights, strict=True) if weight])
        assert refusals == []
        assert "§" not in trained
        assert trained.count("<|im_end|>") == 2
        assert check_row(row) == []


# --- tools --------------------------------------------------------------------------------------------------------------------


def test_a_tool_turn_stays_where_the_template_would_drop_it():
    template = make(TOOLLESS)
    assert not template.abilities.tool_role
    (row,), refusals = render(template, sample(*USE, tool=TOOL), ROOM)
    assert refusals == []
    assert "<|im_start|>user\n<tool_response>\n§t§\n</tool_response><|im_end|>" in row.text
    assert row.n_turns == 2


class Forgetful(ChatTemplate):
    """A mistake: the tools are lost on the way to the template."""

    def prepare(self, messages, tools=()):
        assert len(tools) < 2
        return super().prepare(messages)


def test_tools_that_do_not_reach_the_prompt_stop_the_run_though_the_agent_names_them():
    with pytest.raises(RenderError, match="tools_missing"):
        build_units([sample(turn("user", "Call look."), calling(), tool=TOOL)], Forgetful(make().tokenizer), ROOM)


class Dropping(ChatTemplate):
    """Another: calls are lost."""

    def prepare(self, messages, tools=()):
        return super().prepare([message.model_copy(update={"tool_calls": ()}) for message in messages], tools)


def test_calls_that_are_not_rendered_stop_the_run():
    with pytest.raises(RenderError, match="tool_calls_lost"):
        build_units([sample(*USE)], Dropping(make().tokenizer), ROOM)


def padded(**parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": parameters}}


@pytest.mark.parametrize(
    ("tool", "place"),
    [
        (padded(type="object", properties={"box": {"type": "string"}, "city": None}), "function.parameters.properties.city"),
        (padded(type="object", properties={"box": {"type": "string", "enum": None}}), "function.parameters.properties.box.enum"),
        (padded(type="object", properties={}, required=None), "function.parameters.required"),
        ({**TOOL, "strict": None}, "strict"),
        (padded(type="object", anyOf=[{"type": "string"}, {"items": None}]), "function.parameters.anyOf.1.items"),
    ],
)
def test_nulls_that_arrow_leaves_in_a_tool_schema_are_refused_with_their_place(tool, place):
    data = sample(turn("user"), turn("assistant"), tool=tool)
    assert reasons(data) == ["null_in_tools"]
    assert f"null at {place}," in render(make(), data, ROOM)[1][0].detail


@pytest.mark.parametrize(
    "box", [{"default": None}, {"const": None}, {"enum": ["red", None]}, {"examples": [None]}, {"type": ["string", "null"]}]
)
def test_nulls_that_a_schema_means_are_kept(box):
    assert reasons(sample(turn("user"), turn("assistant"), tool=padded(type="object", properties={"box": box}))) == []


@pytest.mark.parametrize("times", [1, 2])
def test_arguments_that_are_json_within_json_are_refused(times):
    arguments = '{"box": "red"}'
    for _ in range(times):
        arguments = json.dumps(arguments)
    assert reasons(sample(turn("user"), calling(arguments))) == ["double_encoded_arguments"]


@pytest.mark.parametrize("arguments", ['{"json": "{\\"a\\": 1}"}', '"text"', "", '"{not json"'])
def test_arguments_that_only_look_so_are_kept(arguments):
    assert reasons(sample(turn("user"), calling(arguments))) == []


# --- traces of one text -----------------------------------------------------------------------------------------------------------

REACT = "Thought 1: I search.\nAction 1: Search[ball]\nObservation 1: A ball is round.\nThought 2: Done.\nAction 2: Finish[round]"


@pytest.mark.parametrize(
    "text", [REACT, REACT.replace(" 1", "").replace(" 2", ""), "Action: look\nAction Input: {}\nObservation:\n a ball"]
)
def test_an_observation_within_the_agents_words_is_refused(text):
    template = make()
    rows, refusals = render(template, sample(turn("user"), turn("assistant", text), turn("user"), turn("assistant", "Fine.")), ROOM)
    assert [refusal.reason for refusal in refusals] == ["observation_in_turn"]
    assert refusals[0].detail.startswith("turn 1: line ")
    assert [row.n_turns for row in rows] == [1]


@pytest.mark.parametrize(
    "text",
    [
        "Thought: I look.\nAction: look[box]",
        "Action: look[box]\nObservation:",  # where it was stopped while it was served
        "Observation: the sky is blue, as I said.",
        "My action: none. Observation: none.",
    ],
)
def test_words_that_only_look_like_an_observation_are_kept(text):
    assert reasons(sample(turn("user"), turn("assistant", text))) == []


# --- length and history -----------------------------------------------------------------------------------------------------------


def test_every_turn_of_a_conversation_that_is_too_long_is_trained_or_refused_by_name():
    turns = [
        one for number in range(12) for one in (turn("user", "u" * 80), turn("assistant", f"answer {number} " + "a" * 40 * (number % 3)))
    ]
    data = sample(turn("user", "Task."), turn("assistant", "Go."), *turns)
    for limit in (120, 200, 400, 800):
        rows, refusals = render(make(), data, limit)
        assert sum(row.n_turns for row in rows) + len(refusals) == 13
        assert {refusal.reason for refusal in refusals} <= {"turn_too_long"}
    units = build_units([data], make(), 400)
    assert units.report.windowed == 1
    assert reasons(data, max_length=400, long="refuse") == ["too_long"]


def test_no_length_leaves_nothing_to_train_on_without_an_error():
    with pytest.raises(EmptyData) as caught:
        build_units([sample(*USE)], make(), 16)
    assert caught.value.refused == {"turn_too_long": 2}


def test_thoughts_that_vanish_from_history_are_trained_behind_the_prompt_that_has_them_or_not():
    hides = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content if loop.last else m.content.split('</t>')[-1])"
        " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template = make(hides)
    turns = [turn("user", "a"), turn("assistant", "<t>one</t>1"), turn("user", "b"), turn("assistant", "<t>two</t>2")]
    rows, refusals = render(template, sample(*turns), ROOM)
    assert refusals == []
    assert [row.n_turns for row in rows] == [1, 1]
    assert "one" not in rows[1].text
    assert build_units([sample(*turns)], template, ROOM).report.prefix_broken_rows == 2
