from __future__ import annotations

from loraloop.episode import Success
from loraloop.importers.ingest import ingest_file
from loraloop.importers.sharegpt import ShareGptImporter


def read(path):
    return list(ShareGptImporter().read(path))


def test_speakers_become_roles_and_calls_keep_their_arguments(fixtures):
    calls, parallel, plain = read(fixtures / "sharegpt" / "data.json")
    assert [message.role for message in calls.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert calls.messages[2].tool_calls[0].function.arguments == '{"where":"kitchen"}'
    assert calls.tools[0]["type"] == "function"
    assert [call.function.arguments for call in parallel.messages[1].tool_calls] == ['{"where":"a"}', '{"where":  "b"}']
    assert (plain.tools, plain.outcome, plain.metadata.tags["outcome_from"]) == ((), Success(1.0), "format")


def test_real_conversations_are_taken_over_and_copies_counted(shared_data, store):
    report = ingest_file(store, shared_data / "sharegpt" / "glaive_toolcall_en_demo.json")
    assert (report.read, report.stored, report.duplicates, report.refused) == (300, 265, 35, {})
    assert (
        sum(len(m.tool_calls) for entry in read(shared_data / "sharegpt" / "glaive_toolcall_en_demo.json") for m in entry.messages) == 211
    )
