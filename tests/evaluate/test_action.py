"""What a turn does is read alike from a recording and from what a model writes."""

from __future__ import annotations

import pytest

from loraloop.episode import FunctionCall, Message, ToolCall
from loraloop.evaluate.action import REPLY, Action, actions_of, read_actions

WANTED = (Action("search", '{"limit":2,"query":"a \\"b\\""}'),)
RECORDED = Message(
    role="assistant", tool_calls=(ToolCall(function=FunctionCall(name="search", arguments='{"query": "a \\"b\\"", "limit": 2}')),)
)


@pytest.mark.parametrize(
    "text",
    [
        'I look.\n<tool_call>\n{"name": "search", "arguments": {"limit": 2, "query": "a \\"b\\""}}\n</tool_call>',
        '<tool_call>{"name": "search", "arguments": {"query": "a \\"b\\"", "limit": 2}}',
        '<tool_call>{"name": "search", "arguments": "{\\"query\\": \\"a \\\\\\"b\\\\\\"\\", \\"limit\\": 2}"}</tool_call>',
        '{"name": "search", "parameters": {"query": "a \\"b\\"", "limit": 2}}<|eot_id|>',
        '[TOOL_CALLS][{"name": "search", "arguments": {"query": "a \\"b\\"", "limit": 2}}]',
        """<|tool_call_start|>[search(query='a "b"', limit=2)]<|tool_call_end|>""",
    ],
)
def test_a_call_is_the_same_in_every_way_that_models_write_it(text: str) -> None:
    assert read_actions(text, has_tools=True) == WANTED == actions_of(RECORDED, has_tools=True)


def test_parallel_calls_keep_their_order() -> None:
    text = '<tool_call>{"name": "a", "arguments": {}}</tool_call>\n<tool_call>{"name": "b", "arguments": {"x": {"name": "c"}}}</tool_call>'
    assert [action.name for action in read_actions(text, has_tools=True)] == ["a", "b"]


def test_a_turn_without_a_call_is_a_reply_or_a_command() -> None:
    assert read_actions(" It is done. <|im_end|>", has_tools=True) == (Action(REPLY, "It is done."),)
    assert read_actions("I need logs.\nget 2 oak log", has_tools=False) == (Action("get", "get 2 oak log"),)
    assert actions_of(Message(role="assistant", content="think\nget 2 oak log"), has_tools=False) == (Action("get", "get 2 oak log"),)
    assert read_actions("", has_tools=False) == (Action("", ""),)


@pytest.mark.parametrize("text", ["{" * 5000, "<tool_call>{", "<|tool_call_start|>" + "[" * 3000, '{"name": 3, "arguments": {}}', "{}"])
def test_what_is_no_call_is_none(text: str) -> None:
    [action] = read_actions(text, has_tools=True)
    assert action.name == REPLY
