from __future__ import annotations

import json

import pytest

from loraloop.episode import Failure, Success
from loraloop.importers.alpaca import AlpacaImporter
from loraloop.importers.openai_chat import OpenAIChatImporter


def read(path):
    return list(AlpacaImporter().read(path))


@pytest.fixture
def episodes(fixtures):
    path = fixtures / "alpaca" / "data.json"
    return dict(zip([entry["case"] for entry in json.loads(path.read_text())], read(path), strict=True))


def said(episode):
    return [(message.role, message.content) for message in episode.messages]


def test_an_instruction_and_its_output_are_two_turns(episodes):
    assert said(episodes["plain"]) == [("user", "How long does an egg boil?"), ("assistant", "Seven minutes.")]
    assert said(episodes["with input and system"])[:2] == [("system", "You translate."), ("user", "Translate.\n\nSeven minutes.")]
    assert episodes["with input and system"].task_id == "3"
    assert episodes["plain"].metadata.tags["outcome_from"] == "format"


def test_a_trace_is_cut_so_that_no_observation_is_the_agents(episodes):
    assert said(episodes["solved trace"]) == [
        ("user", "How long does an egg boil?"),
        ("assistant", "Thought: I look it up.\nAction: search[egg]"),
        ("user", "Observation: An egg boils\nseven minutes."),
        ("assistant", "Thought: Seven.\nAction: finish[7]"),
        ("user", "Observation: Episode finished, reward = True"),
    ]
    for episode in episodes.values():
        assert not any(line.startswith("Observation") for m in episode.messages if m.is_agent for line in m.content.splitlines())


def test_the_last_observation_tells_the_outcome(episodes):
    outcomes = {case: (episode.outcome, episode.metadata.tags["outcome_from"]) for case, episode in episodes.items()}
    assert outcomes["solved trace"] == (Success(1.0), "trace")
    assert outcomes["failed trace"] == (Failure("reward False"), "trace")
    assert outcomes["trace without verdict"] == (Success(1.0), "format")


def test_text_that_is_no_trace_stays_whole(episodes):
    assert said(episodes["an action only"])[1][1] == "Thought: I know.\nAction: finish[7]"
    assert said(episodes["the word in a sentence"])[1][1] == "My observation: eggs boil. Observation: none."


def test_numbered_labels_are_labels(episodes):
    assert [role for role, _ in said(episodes["trace without verdict"])] == ["user", "assistant", "user", "assistant"]


def test_real_traces_become_the_turns_that_their_authors_wrote_elsewhere(shared_data):
    """The same 500 episodes lie beside them as OpenAI turns: an independent answer to where each trace must be cut."""
    episodes = read(shared_data / "alpaca" / "fireact_hotpotqa.json")
    turns = list(OpenAIChatImporter().read(shared_data / "openai_ft" / "fireact_hotpotqa.jsonl"))
    assert len(episodes) == len(turns) == 500
    stripped = [[(role, content.strip()) for role, content in said(episode)] for episode in episodes]
    assert stripped == [[(role, content.strip()) for role, content in said(episode)] for episode in turns]
    assert {episode.outcome for episode in episodes} == {Success(1.0)}
    assert {episode.metadata.tags["outcome_from"] for episode in episodes} == {"trace"}
