from __future__ import annotations

import json

import pytest

from loraloop.episode import Unknown
from loraloop.importers.codex import CodexImporter
from loraloop.importers.ingest import detect, ingest_file
from loraloop.training_data import Refusal


@pytest.fixture
def episodes(fixtures):
    return list(CodexImporter().read(fixtures / "codex" / "rollout-1.jsonl"))


def test_items_become_turns_once(episodes):
    messages = episodes[0].messages
    assert [(message.role, message.content) for message in messages] == [
        ("system", "You code."),
        ("user", "<environment_context>\n</environment_context>"),
        ("user", "Two eggs."),
        ("assistant", "I look."),
        ("tool", "egg.py"),
        ("tool", "ok"),
        ("assistant", None),
        ("tool", "/kitchen"),
        ("assistant", "Done."),
    ]
    assert [(call.id, call.function.name, call.function.arguments) for message in messages for call in message.tool_calls] == [
        ("a", "shell", '{"cmd":  "ls"}'),
        ("b", "apply_patch", '{"input": "*** Begin\\n+egg"}'),
        ("c", "local_shell", '{"type": "exec", "command": ["pwd"]}'),
    ]


def test_thoughts_are_kept_apart_and_encrypted_ones_named(episodes):
    assert episodes[0].messages[3].reasoning == "Both."
    assert "SECRET" not in episodes[0].model_dump_json()
    tags = episodes[0].metadata.tags
    assert json.loads(tags["ignored_keys"]) == ["items.encrypted_content", "lines.future_record"]
    assert (tags["skipped_lines"], tags["custom_calls"], tags["session"], tags["model"]) == ("1", "1", "s1", "m-1")


def test_a_compaction_begins_another_episode_with_what_replaced_the_history(episodes):
    assert [[message.content for message in episode.messages] for episode in episodes[1:]] == [
        ["You code.", "Two eggs.", "Summary.", "What next?"],
        ["You code.", "All done.", "Well."],
    ]
    assert {(episode.outcome, episode.task_id) for episode in episodes} == {(Unknown(), None)}


def test_the_parents_history_in_a_sub_agents_file_is_never_trained_on(fixtures):
    (episode,) = CodexImporter().read(fixtures / "codex" / "rollout-2-sub-agent.jsonl")
    assert [message.is_agent for message in episode.messages] == [False, False, False, False, True]
    assert episode.metadata.tags["copied_context"] == "2"


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"type": "web_search_call", "action": {}}, "unsupported_content"),
        ({"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}, "unsupported_content"),
        ({"type": "compaction", "encrypted_content": "x"}, "history_rewritten"),
        ({"type": "function_call_output", "call_id": "z", "output": "x"}, "unpaired_tool_result"),
        ({"type": "function_call", "name": "f", "arguments": None, "call_id": "a"}, "bad_shape"),
        ({"type": "message", "role": "user", "content": "a\0"}, "bad_encoding"),
        ("x", "bad_shape"),
    ],
)
def test_items_that_cannot_be_told_refuse_the_stretch(write, item, reason):
    said = {"type": "message", "role": "assistant", "content": "b"}
    lines = [
        {"timestamp": "", "type": kind, "payload": payload}
        for kind, payload in (("session_meta", {}), ("response_item", said), ("response_item", item))
    ]
    (refusal,) = CodexImporter().read(write("\n".join(map(json.dumps, lines))))
    assert isinstance(refusal, Refusal)
    assert refusal.reason == reason


def test_a_half_written_last_line_spoils_itself_only(fixtures, write):
    text = (fixtures / "codex" / "rollout-1.jsonl").read_text()
    entries = list(CodexImporter().read(write(text + '{"timestamp": "2026')))
    assert [getattr(entry, "reason", "episode") for entry in entries] == ["episode", "episode", "bad_json", "episode"]


def test_the_real_fixture_is_taken_over_whole(shared_data, store):
    path = shared_data / "codex" / "rollout-fixture.jsonl"
    assert detect(path).name == "codex"
    report = ingest_file(store, path)
    assert (report.read, report.stored) == (1, 1)
    (episode,) = store.query()
    assert [message.role for message in episode.messages] == ["user", *["assistant", "tool"] * 3, "assistant"]
    assert "MUST_NOT_RENDER" not in episode.model_dump_json()
    assert episode.messages[-1].content == "The synthetic files are alpha.txt and beta.txt."
