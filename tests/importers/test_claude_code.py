from __future__ import annotations

import json

import pytest

from loraloop.episode import Unknown
from loraloop.importers.claude_code import ClaudeCodeImporter
from loraloop.importers.ingest import detect, ingest_file, iter_files


@pytest.fixture
def episodes(fixtures):
    return list(ClaudeCodeImporter().read(fixtures / "claude_code" / "session.jsonl"))


def test_blocks_of_one_response_are_one_turn_and_rewound_turns_are_gone(episodes):
    before = episodes[0]
    assert [(message.role, message.content) for message in before.messages] == [
        ("user", "Two eggs."),
        ("assistant", None),
        ("tool", "egg.py"),
        ("tool", "/kitchen"),
        ("assistant", "Done."),
    ]
    turn = before.messages[1]
    assert [(call.id, call.function.arguments) for call in turn.tool_calls] == [
        ("c1", '{"command": "ls"}'),
        ("c2", '{"command": "pwd", "timeout": 1}'),
    ]
    assert turn.reasoning == "Both."


def test_a_compaction_begins_another_episode_with_what_the_agent_saw(episodes):
    assert [(message.role, message.content) for message in episodes[1].messages] == [
        ("user", "Summary: two eggs."),
        ("assistant", "What next?"),
    ]


def test_a_sub_agent_is_an_episode_of_its_own(episodes):
    assert len(episodes) == 3
    assert [message.content for message in episodes[2].messages] == ["Look at the pot.", "It boils."]
    assert episodes[2].metadata.tags["parent_session"] == "s1"
    assert [episode.metadata.tags.get("session") for episode in episodes] == ["s1", "s1", None]


def test_what_is_no_dialogue_is_named(episodes):
    assert json.loads(episodes[0].metadata.tags["ignored_keys"]) == ["lines.api_error", "lines.isMeta"]
    assert json.loads(episodes[1].metadata.tags["ignored_keys"]) == ["lines.compact_boundary"]


def test_nothing_says_how_it_ended_and_which_task_it_was(episodes):
    assert {(episode.outcome, episode.task_id, episode.group_id) for episode in episodes} == {(Unknown(), None, None)}
    assert episodes[0].metadata.tags["model"] == "m-1"
    assert episodes[0].metadata.duration_ms == 9_000


def test_a_broken_line_spoils_itself_only(fixtures, write):
    lines = (fixtures / "claude_code" / "session.jsonl").read_text()
    entries = list(ClaudeCodeImporter().read(write(lines + '{"type": "user", "sess')))
    assert [getattr(entry, "reason", "episode") for entry in entries] == ["bad_json", "episode", "episode", "episode"]


def test_states_of_the_program_at_the_end_are_no_end(fixtures, write, episodes):
    lines = (fixtures / "claude_code" / "session.jsonl").read_text().splitlines()
    state = json.dumps({"type": "queue-operation", "operation": "enqueue", "sessionId": "s1"})
    again = list(ClaudeCodeImporter().read(write("\n".join([*lines, state]))))
    assert [entry.id for entry in again] == [episode.id for episode in episodes]


def test_parents_in_a_circle_are_no_end(write):
    message = {"id": "m", "role": "assistant", "content": [{"type": "text", "text": "a"}]}
    lines = [{"type": "assistant", "uuid": a, "parentUuid": b, "sessionId": "s", "message": {**message, "id": a}} for a, b in ("xy", "yx")]
    (episode,) = ClaudeCodeImporter().read(write("\n".join(map(json.dumps, lines))))
    assert len(episode.messages) == 2


def test_real_logs_are_taken_over_whole(shared_data, store):
    paths = iter_files([shared_data / "claude_code"])
    assert {detect(path).name for path in paths} == {"claude-code"}
    reports = [ingest_file(store, path) for path in paths]
    assert [(report.read, report.stored) for report in reports] == [(1, 1)] * 3
    said = []
    for path in paths:
        for line in map(json.loads, path.read_text().splitlines()):
            content = line.get("message", {}).get("content", [])
            said += [content] if isinstance(content, str) else [block["text"] for block in content if block["type"] == "text"]
    kept = [message.content for path in paths for entry in ClaudeCodeImporter().read(path) for message in entry.messages]
    assert [text for text in said if text not in kept] == []
