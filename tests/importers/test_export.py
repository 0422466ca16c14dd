"""What is exported is whole for others, and comes back as the very episodes that it was made of."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from loraloop.episode import Episode, EpisodeMetadata, Failure, FunctionCall, Message, Timeout, ToolCall
from loraloop.errors import SettingsError
from loraloop.importers.entry import with_content_id
from loraloop.importers.export import export, export_file, to_atif, to_openai
from loraloop.importers.ingest import ingest_file, iter_files
from loraloop.store.memory import InMemoryEpisodeStore

FORMATS = ["openai", "atif"]


def call(arguments, call_id=None):
    return ToolCall(id=call_id, function=FunctionCall(name="f", arguments=arguments))


TRICKY = with_content_id(
    Episode(
        task_id="t",
        group_id="g",
        tools=({"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}},),
        outcome=Timeout(0.25),
        metadata=EpisodeMetadata(strategy="s", scenario="c", started_at=1_700_000_000_000, tags={"agent": "x", "model": "m"}),
        messages=(
            Message(role="system", content="p"),
            Message(role="user", content="u", name="n"),
            Message(role="assistant", content="example", is_demo=True),
            Message(
                role="assistant",
                content=None,
                reasoning="why",
                tool_calls=(call('{"a":1}', "same"), call('{"a": broken', "same"), call("{}")),
            ),
            Message(role="tool", content="1", tool_call_id="same"),
            Message(role="tool", content="", tool_call_id="same", name="f"),
            Message(role="tool", content=None),
            Message(role="user", content="seen", author="environment"),
            Message(role="assistant", content="a scripted turn", author="harness"),
            Message(role="assistant", content="", weight=0.0),
            Message(role="assistant", content="end"),
        ),
    )
)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_tricky_episode_comes_back_the_same(store, tmp_path, format_name):
    path = tmp_path / "out.jsonl"
    assert export_file([TRICKY], path, format_name) == {"timeout": 1}
    report = ingest_file(store, path)
    assert (report.format, report.stored, report.refused) == (format_name, 1, {})
    (again,) = store.query()
    assert again.messages == TRICKY.messages
    assert (again.tools, again.outcome, again.id) == (TRICKY.tools, TRICKY.outcome, TRICKY.id)


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_fixture_comes_back_the_same(store, tmp_path, fixtures, format_name):
    for path in iter_files([fixtures]):
        ingest_file(store, path)
    path = tmp_path / "out.jsonl"
    counts = export_file(store.iter_episodes(), path, format_name)
    left_out = {name: count for name, count in counts.items() if name.startswith("left out")}
    assert left_out == ({"left out: no turn of the agent": 1} if format_name == "atif" else {})
    other = InMemoryEpisodeStore()
    report = ingest_file(other, path)
    assert (report.format, report.refused, report.stored) == (format_name, {}, store.count() - sum(left_out.values()))
    written = {episode.id: episode.messages for episode in other.query()}
    assert written == {episode.id: episode.messages for episode in store.query() if episode.id in written}
    assert ingest_file(store, path).stored == 0


def test_others_train_on_nothing_that_is_not_the_agents():
    row = to_openai(TRICKY)
    assert [message.get("weight") for message in row["messages"] if message["role"] == "assistant"] == [0, None, 0, 0, None]
    assert row["messages"][3]["reasoning_content"] == "why"
    steps = to_atif(TRICKY)["steps"]
    assert [step["message"] for step in steps if step.get("is_copied_context")] == ["example"]
    assert [step["message"] for step in steps if step.get("llm_call_count") == 0] == ["a scripted turn"]
    assert [call["arguments"] for call in steps[3]["tool_calls"]] == [{"a": 1}, {}, {}]


def test_what_cannot_be_written_is_counted():
    file = io.StringIO()
    turns = (Message(role="assistant", content="b"),)
    open_one, bare = Episode(messages=turns, is_open=True), Episode()
    counts = export([open_one, bare, Episode(messages=turns, outcome=Failure("x"))], file, "openai")
    assert counts == {"left out: open": 1, "left out: no messages": 1, "failure": 1}
    assert len(file.getvalue().splitlines()) == 1
    with pytest.raises(SettingsError, match="--format xml: expected openai or atif"):
        export([], file, "xml")


def test_a_block_that_was_tampered_with_is_refused(store, write):
    row = to_openai(TRICKY)
    for change in ({"version": 2}, {"outcome": {"kind": "won"}}, {"messages": {"3": {"role": "king"}}}):
        row["loraloop"] = {**to_openai(TRICKY)["loraloop"], **change}
        assert ingest_file(store, write(json.dumps(row))).refused == {"bad_shape": 1}


def test_atif_validates_under_its_own_models(fixtures, store):
    atif = pytest.importorskip("atif", reason="the package atif is not installed (extra dev)")
    for path in iter_files([fixtures]):
        ingest_file(store, path)
    for episode in [TRICKY, *store.query()]:
        atif.Trajectory.model_validate(json.loads(json.dumps(to_atif(episode))))


def test_an_independent_reader_reads_the_same(shared_data, tmp_path):
    agentpile = pytest.importorskip("agentpile", reason="the package agentpile is not installed (extra dev)")
    for path in sorted((shared_data / "atif").rglob("*.json")):
        fresh = InMemoryEpisodeStore()
        ingest_file(fresh, path)
        ours = fresh.query()[0]
        agentpile.to_chat(agentpile.load(str(path)), str(tmp_path / "chat.jsonl"))
        (theirs,) = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
        assert [(m["role"], m.get("content") or "") for m in theirs["messages"]] == [(m.role, m.content or "") for m in ours.messages]


def test_the_command_writes_what_is_wanted(tmp_path, fixtures):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "loraloop", *arguments, "-p", str(tmp_path / "p")], capture_output=True, text=True)

    run("ingest", str(fixtures / "tau_bench" / "results.json"))
    done = run("export", "--outcome", "success")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert rows
    assert {row["loraloop"]["outcome"]["kind"] for row in rows} == {"success"}
    both = run("export", "--format", "atif", "--output", str(tmp_path / "out" / "all.jsonl"))
    assert "did not succeed" in both.stderr
    assert len((tmp_path / "out" / "all.jsonl").read_text().splitlines()) > len(rows)
    assert run("export", "--outcome", "won").returncode == 1
