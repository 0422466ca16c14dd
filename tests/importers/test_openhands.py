from __future__ import annotations

import json

import pytest

from loraloop.episode import Failure, Success, Timeout, Unknown
from loraloop.importers.ingest import detect, ingest_file, iter_files
from loraloop.importers.openhands import OpenHandsImporter


@pytest.fixture
def episodes(fixtures):
    return {entry.task_id: entry for entry in OpenHandsImporter().read(fixtures / "openhands" / "output.jsonl")}


def test_a_run_is_told_by_the_responses_of_its_model(episodes):
    episode = episodes["kitchen__egg-1"]
    assert [(message.role, message.content) for message in episode.messages] == [
        ("system", "You code."),
        ("user", "Fix it."),
        ("assistant", "I look."),
        ("tool", "[ok] a.c\n[exit 0]"),
        ("tool", "no pwd"),
        ("user", "no such command"),
        ("assistant", None),
    ]
    turn = episode.messages[2]
    assert [(call.id, call.function.arguments) for call in turn.tool_calls] == [("c1", '{"command":  "ls"}'), ("c2", '{"command": "pwd"}')]
    assert turn.reasoning == "Where am I?"
    assert [message.tool_call_id for message in episode.messages[3:5]] == ["c1", "c2"]
    assert episode.messages[5].author == "environment"
    assert episode.messages[6].tool_calls[0].function.name == "finish"
    assert episode.tools[0]["function"]["name"] == "bash"


def test_what_is_left_out_is_named(episodes):
    assert json.loads(episodes["kitchen__egg-1"].metadata.tags["ignored_keys"]) == ["events.recall"]
    assert json.loads(episodes["kitchen__egg-3"].metadata.tags["ignored_keys"]) == ["mine"]


def test_how_a_run_ended(episodes):
    assert {task: episode.outcome for task, episode in episodes.items()} == {
        "kitchen__egg-1": Unknown(),
        "kitchen__egg-2": Timeout(),
        "kitchen__egg-3": Success(1.0),
        "kitchen__egg-4": Failure("stuck in a loop"),
        "kitchen__egg-5": Unknown(),
    }
    assert "disk full" in episodes["kitchen__egg-5"].metadata.tags["error"]


def test_model_agent_and_times(episodes):
    metadata = episodes["kitchen__egg-1"].metadata
    assert (metadata.tags["model"], metadata.tags["agent"], metadata.duration_ms) == ("m-1", "CodeActAgent", 60_000)


def test_a_list_of_events_is_one_run_without_a_task(fixtures):
    (episode,) = OpenHandsImporter().read(fixtures / "openhands" / "events.json")
    assert [(message.role, message.content) for message in episode.messages] == [("user", "Fix it."), ("assistant", "Done.")]
    assert episode.task_id is None


def test_real_runs_are_taken_over_whole(shared_data, store):
    reports = [ingest_file(store, path) for path in iter_files([shared_data / "openhands"])]
    assert [(report.format, report.read, report.stored) for report in reports] == [
        *[("openhands", 1, 1)] * 3,
        ("openhands", 3, 3),
        ("openhands", 1, 1),
    ]
    outcomes = {episode.task_id: episode.outcome for episode in store.query() if episode.task_id}
    assert outcomes == {"ponylang__ponyc-4595": Unknown(), "ponylang__ponyc-4593": Unknown(), "ponylang__ponyc-4588": Timeout()}


def test_real_responses_are_turns_word_for_word_and_once(shared_data):
    for path in iter_files([shared_data / "openhands"]):
        assert detect(path).name == "openhands"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else [json.loads(path.read_text())]
        for row, episode in zip(rows, OpenHandsImporter().read(path), strict=True):
            events = row["history"] if isinstance(row, dict) else row
            responses = {
                event["tool_call_metadata"]["model_response"]["id"]: event["tool_call_metadata"]["model_response"]["choices"][0]["message"]
                for event in events
                if event.get("action") and event.get("tool_call_metadata")
            }
            called = [message for message in episode.messages if message.tool_calls]
            assert [message.content for message in called] == [said["content"] for said in responses.values()]
            arguments = [call["function"]["arguments"] for said in responses.values() for call in said["tool_calls"]]
            assert [call.function.arguments for message in called for call in message.tool_calls] == arguments
            assert "FAIL_TO_PASS" not in episode.model_dump_json()
