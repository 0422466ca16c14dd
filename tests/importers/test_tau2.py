from __future__ import annotations

import json
import shutil

import pytest

from loraloop.episode import Failure, Success, Timeout, Unknown
from loraloop.errors import ImportFailed
from loraloop.importers.ingest import detect, ingest_file, iter_files
from loraloop.importers.tau2 import Tau2Importer

NAME = "gpt-4.1_telecom_no-user_4trials_5tasks.json"


@pytest.fixture
def episodes(fixtures):
    return list(Tau2Importer().read(fixtures / "tau2" / "results.json"))


def test_the_agents_side_is_told_without_the_simulated_users_calls(episodes):
    assert [(message.role, message.content) for message in episodes[0].messages] == [
        ("system", "<policy>\nBe kind.\n</policy>"),
        ("assistant", "Hi! How can I help you today?"),
        ("user", "Two eggs."),
        ("assistant", "What does the pot show?"),
        ("user", "Steam."),
        ("assistant", None),
        ("tool", "1"),
        ("tool", "Error: what?"),
        ("assistant", "Done."),
        ("user", "###STOP###"),
    ]
    assert episodes[0].metadata.tags["simulated_user_calls"] == "1"
    assert "look" not in episodes[0].model_dump_json()


def test_calls_are_as_the_model_wrote_them(episodes):
    turn = episodes[0].messages[5]
    assert [(call.id, call.function.arguments) for call in turn.tool_calls] == [("a", '{"what":  "egg"}'), ("b", "")]
    assert [message.tool_call_id for message in episodes[0].messages if message.role == "tool"] == ["a", "b"]
    assert turn.reasoning == "Boil both."


def test_the_greeting_and_the_stop_mark_are_the_harness(episodes):
    assert [message.is_agent for message in episodes[0].messages if message.role == "assistant"] == [False, True, True, True]
    assert [message.author for message in episodes[2].messages if message.role == "assistant"] == [None, "harness"]


def test_outcomes_are_as_paid_and_a_run_out_of_steps_is_a_timeout(episodes):
    assert [episode.outcome for episode in episodes] == [Success(1.0), Timeout(0.0), Failure("reward 0.5"), Unknown()]
    assert episodes[0].metadata.tags["reward.DB"] == "1.0"


def test_task_time_tools_and_model(episodes):
    assert [episode.task_id for episode in episodes] == ["kitchen/eggs"] * 3 + ["kitchen/7"]
    assert episodes[0].metadata.duration_ms == 10_500
    assert episodes[0].tools == (
        {"type": "function", "function": {"name": "boil", "description": "Boils.", "parameters": {"type": "object"}}},
    )
    assert episodes[0].metadata.tags["model"] == "m-1"
    assert json.loads(episodes[0].metadata.tags["ignored_keys"]) == ["messages.mood"]


def test_a_run_with_a_policy_of_its_own_keeps_it(episodes):
    assert episodes[2].messages[0].content == "<policy>\nBe quick.\n</policy>"


@pytest.fixture
def folder(fixtures, tmp_path):
    """The same results in tau2's other layout: a file for each run."""
    results = json.loads((fixtures / "tau2" / "results.json").read_text())
    runs = results.pop("simulations")
    (tmp_path / "simulations").mkdir()
    for run in runs:
        (tmp_path / "simulations" / f"{run['id']}.json").write_text(json.dumps(run))
    (tmp_path / "results.json").write_text(json.dumps({**results, "simulation_index": []}))
    return tmp_path


def test_a_file_for_each_run_gives_the_same_episodes(episodes, folder):
    assert [entry.id for entry in Tau2Importer().read(folder / "results.json")] == [episode.id for episode in episodes]
    for episode, path in zip(episodes, sorted((folder / "simulations").iterdir()), strict=True):
        assert detect(path).name == "tau2"
        assert [entry.id for entry in Tau2Importer().read(path)] == [episode.id]


def test_a_folder_is_stored_once(folder, store):
    reports = [ingest_file(store, path) for path in iter_files([folder])]
    assert (sum(report.stored for report in reports), sum(report.duplicates for report in reports)) == (4, 4)


def test_one_broken_file_of_a_folder_spoils_itself_only(folder):
    (folder / "simulations" / "s2.json").write_text("{")
    entries = list(Tau2Importer().read(folder / "results.json"))
    assert [getattr(entry, "reason", None) for entry in entries] == [None, "bad_json", None, None]
    assert "file simulations/s2.json" in entries[1].detail


def test_a_run_without_its_results_has_no_policy(folder):
    path = shutil.copy(folder / "simulations" / "s1.json", folder.parent / "alone.json")
    (episode,) = Tau2Importer().read(path)
    assert episode.messages[0].role == "assistant"
    assert episode.task_id == "eggs"


def test_what_is_no_results_file_is_said(write):
    with pytest.raises(ImportFailed, match=r"expected .*simulations"):
        list(Tau2Importer().read(write("[1]", "results.json")))


def test_real_results_agree_with_the_manifest(shared_data):
    path = shared_data / "tau2" / NAME
    episodes = list(Tau2Importer().read(path))
    assert [len(episodes), sum(episode.outcome.is_success for episode in episodes)] == [20, 16]
    assert len({episode.group_id for episode in episodes}) == 5
    assert sum(len(message.tool_calls) for episode in episodes for message in episode.messages) == 192 + 20
    assert all(episode.messages[-1].tool_calls[0].function.name == "done" for episode in episodes)


def test_real_words_are_kept_and_the_ticket_is_in_the_prompt(shared_data):
    results = json.loads((shared_data / "tau2" / NAME).read_text())
    tickets = {task["id"]: task["ticket"] for task in results["tasks"]}
    for run, episode in zip(results["simulations"], Tau2Importer().read(shared_data / "tau2" / NAME), strict=True):
        assert tickets[run["task_id"]] in episode.messages[0].content
        assert results["info"]["environment_info"]["policy"] in episode.messages[0].content
        assert [message.content for message in episode.messages[1:-1]] == [message["content"] for message in run["messages"][:-1]]
        said = [json.loads(call.function.arguments) for message in episode.messages[:-1] for call in message.tool_calls]
        assert said == [call["arguments"] for message in run["messages"] for call in message.get("tool_calls") or []]
        assert "user_scenario" not in episode.model_dump_json()
