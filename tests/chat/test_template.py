from __future__ import annotations

import json

import pytest
import tiny
from samples import LOOK, agent, call, result, sample, system, user
from templates import FAMILIES, NAMES, make_template

from loraloop.chat.template import Abilities, ChatTemplate
from loraloop.errors import RenderError

ABLE = {
    #             tools, tool_role, arguments, parallel_calls, content_with_calls, users_in_a_row, agent_opens (bare, with tools)
    "smollm2": Abilities(False, True, None, False, False, True, True, True),
    "chatml": Abilities(False, True, None, False, False, True, True, True),
    "llama3": Abilities(False, True, None, False, False, True, True, True),
    "llama3.1": Abilities(True, True, "object", False, False, True, True, False),
    "qwen2.5": Abilities(True, True, "object", True, True, True, True, True),
    "qwen3": Abilities(True, True, "object", True, True, True, True, True),
    "lfm2": Abilities(True, True, None, False, False, True, True, True),
    "lfm2-calls": Abilities(True, True, "object", True, True, True, True, True),
    "mistral": Abilities(True, True, "object", True, False, False, False, False),
    "gemma": Abilities(False, False, None, False, False, False, False, False),
    "lfm2.5": Abilities(True, True, "object", True, True, True, True, True),
    "gemma3": Abilities(False, False, None, False, False, False, False, False),
    "mistral-small": Abilities(True, True, "object", True, False, False, False, False),
    "deepseek-v3.1": Abilities(False, True, "text", True, True, True, True, True),
    # its template gives a turn of calls a second, empty turn, so that calls take the fallback
    "deepseek-r1": Abilities(False, True, None, False, False, True, True, True),
}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_template_keeps_is_found_out(name):
    assert make_template(name).abilities == ABLE[name]


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(RenderError, match="no chat template"):
        ChatTemplate(tiny.make_tokenizer(None))


def test_a_slow_tokenizer_is_refused():
    class Slow:
        chat_template = "x"
        is_fast = False

    with pytest.raises(RenderError, match="fast tokenizer"):
        ChatTemplate(Slow())


def test_a_template_that_wants_arguments_as_text_gets_what_the_agent_wrote():
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ '<call>' + c.function.name + ' ' + c.function.arguments }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    )
    template = ChatTemplate(tiny.make_tokenizer(text))
    assert template.abilities.arguments == "text"
    turns, _ = template.prepare([user(), agent(None, call('{"box" :\n1}'))])
    assert '<call>look {"box" :\n1}<|im_end|>' in template.text(turns)


def test_tools_go_into_the_system_turn_where_the_template_has_no_place_for_them():
    template = make_template("chatml")
    turns, tools = template.prepare([system("Be brief."), user()], [LOOK])
    assert tools == []
    assert turns[0]["content"].startswith("Be brief.\n\n")
    assert f"<tools>\n{json.dumps(LOOK)}\n</tools>" in turns[0]["content"]
    turns, tools = template.prepare([user()], [LOOK])
    assert [turn["role"] for turn in turns] == ["system", "user"]


def test_tools_are_the_templates_own_where_it_has_a_place_for_them():
    turns, tools = make_template("qwen2.5").prepare([user()], [LOOK])
    assert tools == [LOOK]
    assert len(turns) == 1


def test_a_result_is_a_user_turn_where_there_is_no_tool_role():
    turns, _ = make_template("gemma").prepare([user(), agent(None, call()), result("a ball")])
    assert turns[-1] == {"role": "user", "content": "<tool_response>\na ball\n</tool_response>"}


def test_a_call_is_text_where_the_template_would_drop_it():
    turns, _ = make_template("chatml").prepare([agent("Look.", call('{"a": 1}'), call('{"a": 2}', name="peek"))])
    assert turns[0]["content"] == (
        'Look.\n<tool_call>{"name": "look", "arguments": {"a": 1}}</tool_call>\n<tool_call>{"name": "peek", "arguments": {"a": 2}}</tool_call>'
    )


def test_a_call_without_arguments_has_none():
    for name in ("chatml", "qwen2.5", "lfm2-calls"):
        template = make_template(name)
        turns, _ = template.prepare([user(), agent(None, call(""))])
        assert any(text in template.text(turns) for text in ('"arguments": {}', "look()"))


def test_the_templates_complaint_is_in_the_error():
    with pytest.raises(RenderError, match="System role not supported"):
        make_template("gemma").text([{"role": "system", "content": ""}])


@pytest.mark.parametrize("name", NAMES)
def test_pieces_have_as_many_tokens_as_the_whole(name):
    template = make_template(name)
    turns, tools = template.prepare(sample(user(" a\n"), agent("  ☕ "), user(), agent("b")).messages)
    text = template.text(turns, tools)
    pieces = template.pieces(text)
    assert "".join(pieces) == text
    assert len(pieces) > len(turns)
    assert sum(len(template.encode(piece)[0]) for piece in pieces) == len(template.encode(text)[0])


def test_a_text_is_left_whole_where_pieces_would_be_tokenised_otherwise():
    assert make_first_word_tokenizer().pieces("a<|im_end|>b") == ["a<|im_end|>b"]


def test_special_tokens_in_words_are_found():
    template = make_template("llama3.1")
    assert template.special_text_in({"role": "assistant", "content": "a <|eot_id|> b"}) == "<|eot_id|>"
    assert template.special_text_in({"role": "assistant", "content": "a eot_id b"}) is None


def test_families_are_complete():
    assert set(ABLE) == set(FAMILIES)


def make_first_word_tokenizer() -> ChatTemplate:
    """A tokenizer that treats the beginning of a text otherwise than what follows a special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"])
    fast.chat_template = "Start: " + tiny.CHATML
    return ChatTemplate(fast)
