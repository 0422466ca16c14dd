from __future__ import annotations

import json

import pytest

from loraloop.episode import Unknown
from loraloop.importers.ingest import detect
from loraloop.importers.openai_calls import OpenAICallsImporter


@pytest.fixture
def episodes(fixtures):
    return list(OpenAICallsImporter().read(fixtures / "openai_calls" / "calls.jsonl"))


def test_a_chat_call_is_its_prompt_and_its_answer(episodes):
    assert [(message.role, message.content) for message in episodes[0].messages] == [
        ("system", "You cook."),
        ("user", "Two eggs."),
        ("assistant", None),
    ]
    turn = episodes[0].messages[-1]
    assert [(call.id, call.function.arguments) for call in turn.tool_calls] == [("a", '{"what":  "egg"}'), ("b", "{}")]
    assert turn.reasoning == "Both."
    assert "ignored_keys" not in episodes[0].metadata.tags


def test_no_turn_is_learned_twice(episodes):
    assert [message.weight for message in episodes[0].messages if message.is_agent] == [1.0]
    assert [message.weight for message in episodes[1].messages if message.is_agent] == [0.0, 1.0]


def test_every_choice_is_an_episode(episodes):
    assert [episode.messages[-1].content for episode in episodes[1:3]] == ["Done.", "Ready."]
    assert [episode.metadata.tags.get("choice") for episode in episodes[1:3]] == [None, "2"]
    assert [message.weight for message in episodes[2].messages if message.is_agent] == [0.0, 1.0]


def test_items_of_a_response_call(episodes):
    assert [(message.role, message.content) for message in episodes[3].messages] == [
        ("system", "You cook."),
        ("user", "Three."),
        ("assistant", None),
        ("tool", "3"),
        ("assistant", "Boiled"),
    ]
    assert [message.weight for message in episodes[3].messages if message.is_agent] == [1.0, 1.0]  # no call of the file told the first
    assert "SECRET" not in episodes[3].model_dump_json()
    assert episodes[3].tools == ({"type": "function", "function": {"name": "boil", "parameters": {"type": "object"}, "strict": True}},)


def test_a_batch_is_read_in_its_bodies(episodes):
    assert [message.content for message in episodes[4].messages] == ["Hi", "Hello"]


def test_task_model_time_and_why_it_stopped(episodes):
    tags = [episode.metadata.tags for episode in episodes]
    assert [tag.get("stop_reason") for tag in tags] == ["tool_calls", "length", "stop", "max_output_tokens", "completed"]
    assert [tag.get("model") for tag in tags] == ["m-1-1", "m-1", "m-1", "m-2", "m"]
    assert (episodes[0].task_id, episodes[0].group_id, episodes[0].metadata.started_at) == ("eggs", "eggs", 1740823200000)
    assert episodes[1].task_id == episodes[2].task_id != episodes[3].task_id
    assert {episode.outcome for episode in episodes} == {Unknown()}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [], "choices": [{"message": {}}]}, "openai-calls"),
        ({"messages": [], "response": {"choices": [{"message": {}}]}}, "openai-calls"),
        ({"request": {"messages": []}, "response": {"type": "message", "content": []}}, "anthropic"),
        ({"object": "response", "output": [], "input": "a"}, "openai-calls"),
        ({"messages": [{"role": "user", "content": "choices"}]}, "openai"),
    ],
)
def test_logs_are_told_apart(write, row, expected):
    assert detect(write(json.dumps(row))).name == expected
