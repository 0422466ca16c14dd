"""Conversations to render, and ways to look at what was rendered."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from loraloop.chat.render import Row
from loraloop.chat.template import ChatTemplate
from loraloop.episode import FunctionCall, Message, ToolCall
from loraloop.training_data import TrainingData

LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look into a box.",
        "parameters": {"type": "object", "properties": {"box": {"type": "string"}, "n": {"type": "integer"}}},
    },
}


def call(arguments: str = '{"box":"red","n":2}', name: str = "look", call_id: str | None = "call00001") -> ToolCall:
    return ToolCall(id=call_id, function=FunctionCall(name=name, arguments=arguments))


def system(content: str = "Be brief.") -> Message:
    return Message(role="system", content=content)


def user(content: str = "What is in the box?", **flags: Any) -> Message:
    return Message(role="user", content=content, **flags)


def agent(content: str | None = "A ball.", *calls: ToolCall, **flags: Any) -> Message:
    return Message(role="assistant", content=content, tool_calls=calls, **flags)


def result(content: str = "a ball", call_id: str | None = "call00001") -> Message:
    return Message(role="tool", content=content, tool_call_id=call_id, name="look")


def sample(*messages: Message, tools: bool = False, weight: float = 1.0) -> TrainingData:
    return TrainingData(messages=messages, tools=(LOOK,) if tools else (), weight=weight)


def trained_texts(template: ChatTemplate, row: Row) -> list[str]:
    """Each unbroken run of trained tokens, decoded from the tokens themselves."""
    runs = groupby(zip(row.ids, row.weights, strict=True), key=lambda pair: pair[1] > 0)
    return [template.tokenizer.decode([token for token, _ in run], skip_special_tokens=False) for trained, run in runs if trained]


def template_ids(template: ChatTemplate, data: TrainingData, n_messages: int | None = None) -> list[int]:
    """What the tokenizer itself makes of the first messages of a sample."""
    turns, tools = template.prepare(data.messages, data.tools)
    end = len(turns) if n_messages is None else len(turns) - len(data.messages) + n_messages
    ids = template.tokenizer.apply_chat_template(turns[:end], tools=tools or None, tokenize=True, return_dict=False)
    return list(ids)
