from __future__ import annotations

import json

import pytest

from loraloop.episode import Unknown
from loraloop.importers.anthropic import AnthropicImporter
from loraloop.importers.ingest import detect


@pytest.fixture
def episodes(fixtures):
    return list(AnthropicImporter().read(fixtures / "anthropic" / "calls.jsonl"))


def test_blocks_become_turns_calls_and_results(episodes):
    messages = episodes[1].messages
    assert [(message.role, message.content) for message in messages] == [
        ("system", "You cook."),
        ("user", "Two eggs."),
        ("assistant", "I boil."),
        ("tool", "2"),
        ("tool", "1"),
        ("user", "Hurry."),
        ("assistant", "Done."),
    ]
    assert [(call.id, call.function.arguments) for call in messages[2].tool_calls] == [("a", '{"what": "egg", "a": 1}'), ("b", "{}")]
    assert [message.tool_call_id for message in messages[3:5]] == ["b", "a"]


def test_thoughts_are_kept_apart_and_hidden_ones_named(episodes):
    assert episodes[0].messages[-1].reasoning == "Both."
    assert json.loads(episodes[0].metadata.tags["ignored_keys"]) == ["messages.redacted_thinking"]


def test_no_turn_is_learned_twice(episodes):
    assert [message.weight for message in episodes[0].messages if message.is_agent] == [1.0]
    assert [message.weight for message in episodes[1].messages if message.is_agent] == [0.0, 1.0]


def test_a_turn_that_no_call_of_the_file_answered_is_learned_where_it_stands(episodes):
    assert [message.weight for message in episodes[2].messages if message.is_agent] == [1.0, 1.0]
    assert [message.weight for message in episodes[3].messages if message.is_agent] == [1.0, 1.0]


def test_tools_model_task_and_why_it_stopped(episodes):
    parameters = {"type": "object", "properties": {"what": {"type": "string"}}}
    assert episodes[0].tools == ({"type": "function", "function": {"name": "boil", "description": "Boils.", "parameters": parameters}},)
    assert episodes[0].metadata.tags["model"] == "m-1-1"
    assert [episode.metadata.tags.get("stop_reason") for episode in episodes] == ["tool_use", "max_tokens", None, None]
    assert episodes[0].task_id == episodes[1].task_id == "eggs"
    assert episodes[2].task_id == episodes[3].task_id
    assert [episode.group_id for episode in episodes] == ["eggs", "eggs", None, None]
    assert {episode.outcome for episode in episodes} == {Unknown()}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "x"}]}]}, "anthropic"),
        ({"messages": [], "tools": [{"name": "f", "input_schema": {}}]}, "anthropic"),
        ({"messages": [{"role": "user", "content": 'say "type": "tool_use"'}]}, "openai"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "openai"),
    ],
)
def test_it_is_told_from_openai_messages(write, row, expected):
    assert detect(write(json.dumps(row))).name == expected
