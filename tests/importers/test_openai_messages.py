from __future__ import annotations

import pytest

from loraloop.chat.openai_messages import require_paired
from loraloop.chat.refused_entry import EntryRefused
from loraloop.episode import FunctionCall, Message, ToolCall


def agent(*ids):
    calls = tuple(ToolCall(id=call_id, function=FunctionCall(name="f", arguments="{}")) for call_id in ids)
    return Message(role="assistant", tool_calls=calls)


def result(call_id):
    return Message(role="tool", tool_call_id=call_id, content="x")


USER = Message(role="user", content="?")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [USER, agent()],
        [agent("a"), result("a"), agent("a"), result("a")],
        [agent("a", "b", "c"), result("c"), result("a"), result("b"), agent()],
        [agent("a", "a"), result("a"), result("a"), agent()],
        [agent(None, None), result(None), result(None), agent()],
        [agent("a", "b"), result(None), result("b"), agent()],
        [agent(None, "b"), result("b"), result("other"), agent()],
        [agent("a"), USER, result("a"), agent()],
        [agent("a", "b"), result("b")],
        [agent("a"), USER],
    ],
)
def test_results_that_answer_open_calls_pair(messages):
    require_paired(messages)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([result("a")], "unpaired_tool_result"),
        ([result(None)], "unpaired_tool_result"),
        ([agent("a"), result("b")], "unpaired_tool_result"),
        ([agent("a", "a"), result("a"), result("a"), result("a")], "unpaired_tool_result"),
        ([agent("a"), result("a"), agent("b"), result("a")], "unpaired_tool_result"),
        ([agent("a", "b"), result("b"), agent()], "unanswered_tool_call"),
        ([agent("a"), agent("b"), result("a"), result("b")], "unanswered_tool_call"),
    ],
)
def test_results_and_calls_that_do_not_pair_are_refused(messages, reason):
    with pytest.raises(EntryRefused) as refused:
        require_paired(messages)
    assert refused.value.reason == reason
