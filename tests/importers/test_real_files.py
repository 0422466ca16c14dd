"""Every real recording is read by the right importer without naming it, and gives the numbers that its manifest declares."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from loraloop.importers.ingest import ingest_file
from loraloop.plugins import list_names

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "formats_table.py"
FORMATS = {
    "claude_code": "claude-code",
    "mini_swe_agent": "mini-swe-agent",
    "openai_ft": "openai",
    "swe_agent": "swe-agent",
    "tau_bench": "tau-bench",
    "who_and_when": "who-and-when",
}
OTHERS = {
    "sharegpt/mllm_demo.json": "openai",  # its words for a role are OpenAI's; the images are refused
    "inspect/scorer__math_cases.json": None,  # cases of a scorer, no log
    "intercode_sql_env/ic_spider_tasks.json": None,  # tasks, no runs
    "intercode_sql_env/ic_spider_dbs.sql": None,
}
NOT_AGENTS = {"verifiers/tool_test/tool-test--gpt-4.1-mini.5cde0948.jsonl": "no_agent_turn"}
"""Rewarded runs whose completion is empty in the file: they are refused, all of them."""
WITH_A_SUB_AGENT = {"langfuse/pydantic-ai-tools-2025-12-04.trace.json": 2}
"""A trace of one run, with a sub-agent that is an episode of its own."""


def table():
    specification = importlib.util.spec_from_file_location("formats_table", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["formats_table"] = module  # where dataclasses look up their own module
    specification.loader.exec_module(module)
    return module


def expected_format(path):
    folder = path.partition("/")[0]
    if path in OTHERS or ".chatml." in path:
        return OTHERS.get(path)
    name = FORMATS.get(folder, folder)
    return name if name in list_names("importers") else None


def test_every_file_gives_the_declared_numbers(shared_data):
    read_file = table().read_file
    for listed in json.loads((shared_data / "MANIFEST.json").read_text()):
        path = listed["path"]
        name, row = read_file(shared_data / path)
        assert name == (expected_format(path) or "none"), path
        if name == "none":
            continue
        assert row.read == row.episodes + sum(row.refused.values()), path
        if path in NOT_AGENTS:
            assert dict(row.refused) == {NOT_AGENTS[path]: listed["episodes"]}, path
            continue
        assert row.read == WITH_A_SUB_AGENT.get(path, listed["episodes"] or row.read), path
        assert listed["positive"] in (None, row.positives), path


def test_the_table_is_what_the_files_give(shared_data):
    module = table()
    assert module.PAGE.read_text() == module.to_page(module.make_rows(shared_data)), "run python docs/formats_table.py"


def test_traces_are_what_an_independent_reader_makes_of_them(shared_data, store, tmp_path):
    """Its runs have one turn more: what the user said, or a tool gave, behind the last call, and no model was shown."""
    agentpile = pytest.importorskip("agentpile", reason="the package agentpile is not installed (extra dev)")
    path = shared_data / "otlp" / "tau_airline.jsonl"
    ingest_file(store, path)
    agentpile.to_chat(agentpile.load(str(path)), str(tmp_path / "chat.jsonl"))
    theirs = [json.loads(line)["messages"] for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert {messages[-1]["role"] for messages in theirs} == {"user", "tool"}
    ours = [[message.to_openai() for message in episode.messages] for episode in store.query()]
    assert sorted(map(said, ours)) == sorted(said(messages[:-1]) for messages in theirs)
    assert len(ours) == 16


def said(messages):
    """Who said what and called what."""
    calls = [[call["function"]["name"] for call in message.get("tool_calls") or []] for message in messages]
    return [(message["role"], message.get("content") or "", call) for message, call in zip(messages, calls, strict=True)]
