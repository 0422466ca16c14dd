from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest

from loraloop.episode import Failure, Success, Timeout, Unknown
from loraloop.importers.ingest import ingest_file, iter_files
from loraloop.importers.swe_agent import SweAgentImporter
from loraloop.learn.conversation import ConversationLearn
from loraloop.training_data import Refusal


def read(path):
    (entry,) = SweAgentImporter().read(path)
    return entry


def test_text_actions_stay_in_the_content(fixtures):
    episode = read(fixtures / "swe_agent" / "kitchen__egg-12.traj")
    assert [message.role for message in episode.messages] == ["system", "user", "user", "assistant", "user", "assistant"]
    assert episode.messages[3].content == "I look first.\n```\nopen egg.py\n```"
    assert episode.metadata.tags == {"exit_status": "submitted (exit_cost)", "format": "swe-agent"}
    assert (episode.task_id, episode.group_id, episode.outcome) == ("kitchen__egg-12", "kitchen__egg-12", Unknown())


def test_shown_examples_stay_marked(fixtures):
    messages = read(fixtures / "swe_agent" / "kitchen__egg-12.traj").messages
    assert [message.is_demo for message in messages] == [False, True, False, False, False, False]


def test_results_find_their_calls_through_the_list_of_ids(fixtures):
    episode = read(fixtures / "swe_agent" / "run-1.traj")
    assert [message.tool_call_id for message in episode.messages if message.role == "tool"] == ["call_1", "call_1"]
    assert [call.function.arguments for message in episode.messages for call in message.tool_calls] == [
        '{"command":"ls"}',
        '{"command":"submit"}',
    ]
    assert episode.task_id == "kitchen__egg-13"  # the settings say it, the file's name does not
    assert "ignored_keys" not in episode.metadata.tags


def test_a_demonstration_is_never_trained_on_whatever_label_it_gets(fixtures):
    episode = read(fixtures / "swe_agent" / "demonstrations" / "simple.traj")
    assert episode.metadata.tags["demonstration"] == "path"
    assert not any(message.is_agent for message in episode.messages)
    sample = ConversationLearn().convert(episode.model_copy(update={"outcome": Success(1.0)}))
    assert isinstance(sample, Refusal)
    assert sample.reason == "no_agent_turn"


@pytest.mark.parametrize(("name", "reason"), [("several", "several_agents"), ("two_ids", "bad_shape"), ("silent", "no_agent_turn")])
def test_runs_that_cannot_be_told_are_refused(fixtures, name, reason):
    refusal = read(fixtures / "swe_agent" / f"{name}.traj")
    assert isinstance(refusal, Refusal)
    assert refusal.reason == reason


@pytest.mark.parametrize(
    ("results", "outcome"),
    [
        ({"resolved": ["kitchen__egg-12"], "with_logs": ["kitchen__egg-12"]}, Success(1.0)),
        ({"resolved": [], "with_logs": ["kitchen__egg-12"], "no_generation": []}, Failure("not resolved")),
        ({"resolved": [], "no_generation": ["kitchen__egg-12"]}, Failure("no_generation")),
        ({"resolved": [], "no_logs": ["kitchen__egg-12"]}, Unknown()),
        ({"resolved_ids": ["kitchen__egg-12"]}, Success(1.0)),
        ({"resolved": ["kitchen__egg-13"]}, Unknown()),
        ({"something": ["kitchen__egg-12"]}, Unknown()),
        ("broken", Unknown()),
    ],
)
@pytest.mark.parametrize("folder", [".", "deep"])
def test_the_evaluation_beside_a_run_says_how_it_ended(fixtures, tmp_path, results, outcome, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    path = shutil.copy(fixtures / "swe_agent" / "kitchen__egg-12.traj", tmp_path / folder / "kitchen__egg-12.traj")
    (tmp_path / "results.json").write_text("{" if results == "broken" else json.dumps(results))
    assert read(path).outcome == outcome


@pytest.mark.parametrize(
    ("stem", "task_id"),
    [
        ("pydicom__pydicom-1458", "pydicom__pydicom-1458"),
        ("gpt4__t-0.00__install-1__scikit-learn__scikit-learn-12", "scikit-learn__scikit-learn-12"),
        ("pytest_dev__my_repo-3", "pytest_dev__my_repo-3"),
        ("run", "run"),
    ],
)
def test_the_instance_is_the_end_of_the_name(fixtures, tmp_path, stem, task_id):
    path = shutil.copy(fixtures / "swe_agent" / "kitchen__egg-12.traj", tmp_path / f"{stem}.traj")
    assert read(path).task_id == task_id


def change(path, to, **changes):
    run = json.loads(path.read_text())
    to.write_text(json.dumps({**run, **changes}))
    return to


@pytest.mark.parametrize(
    ("status", "resolved", "outcome"),
    [
        ("exit_cost", [], Timeout()),
        ("exit_cost", ["kitchen__egg-12"], Success(1.0)),
        ("submitted (exit_cost)", [], Failure("no_generation")),
        (None, [], Failure("no_generation")),
    ],
)
def test_a_run_whose_budget_ended_first_is_a_timeout(fixtures, tmp_path, status, resolved, outcome):
    path = fixtures / "swe_agent" / "kitchen__egg-12.traj"
    copy = change(path, tmp_path / path.name, info={"exit_status": status})
    (tmp_path / "results.json").write_text(json.dumps({"resolved": resolved, "no_generation": ["kitchen__egg-12"]}))
    assert read(copy).outcome == outcome


@pytest.mark.parametrize("chosen", [0, None])
def test_attempts_that_were_not_chosen_are_episodes_of_unknown_outcome(fixtures, tmp_path, chosen):
    path = fixtures / "swe_agent" / "run-1.traj"
    run = json.loads(path.read_text())
    other = {
        "history": [*run["history"][:2], {"role": "assistant", "content": "No.", "agent": "main"}],
        "info": {"exit_status": "exit_cost"},
    }
    attempts = [{key: run[key] for key in ("history", "trajectory", "info")}, other]
    info = {"exit_status": "submitted", "best_attempt_idx": chosen}
    copy = change(path, tmp_path / "kitchen__egg-13.traj", attempts=attempts, info=info)
    (tmp_path / "results.json").write_text('{"resolved_ids": ["kitchen__egg-13"]}')
    first, second = SweAgentImporter().read(copy)
    assert (first.outcome, second.outcome) == (Success(1.0), Timeout())
    assert first.group_id == second.group_id == "kitchen__egg-13"
    assert second.messages[-1].content == "No."
    assert second.metadata.tags["attempt"] == "not chosen"


def test_thoughts_in_blocks_are_kept_apart_and_parts_of_text_put_together(fixtures, tmp_path):
    path = fixtures / "swe_agent" / "run-1.traj"
    history = json.loads(path.read_text())["history"]
    history[2]["thinking_blocks"] = [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "redacted_thinking", "data": "x"}]
    history[3]["content"] = [{"type": "text", "text": "egg.py", "cache_control": {"type": "ephemeral"}}]
    settings = json.dumps({"problem_statement": {"id": "x"}, "agent": {"model": {"name": "m-1"}}})
    episode = read(change(path, tmp_path / path.name, history=history, replay_config=settings))
    assert (episode.messages[2].reasoning, episode.messages[3].content) == ("Hm.", "egg.py")
    assert (episode.metadata.tags["model"], episode.task_id) == ("m-1", "x")


def test_a_history_that_was_shown_shortened_is_told(fixtures, tmp_path):
    path = fixtures / "swe_agent" / "run-1.traj"
    step = {"query": [{"role": "user", "content": "Old environment output: (12 lines omitted)"}]}
    assert read(change(path, tmp_path / path.name, trajectory=[step])).metadata.tags["elided_history"] == "true"
    assert "elided_history" not in read(path).metadata.tags


def test_real_trajectories_are_taken_over_whole(shared_data, store):
    reports = [ingest_file(store, path) for path in iter_files([shared_data / "swe_agent"])]
    assert [(report.format, report.read, report.stored) for report in reports] == [("swe-agent", 1, 1)] * 22
    episodes = store.query()
    assert Counter(episode.outcome.kind for episode in episodes) == {"unknown": 22}
    demonstrations = [episode for episode in episodes if "demonstration" in episode.metadata.tags]
    assert len(demonstrations) == 19
    assert not any(message.is_agent for episode in demonstrations for message in episode.messages)
    assert sum(episode.task_id == "marshmallow-code__marshmallow-1867" for episode in episodes) == 8
    assert sum(any(message.is_demo for message in episode.messages) for episode in episodes) == 21
    assert sum(len(message.tool_calls) for episode in episodes for message in episode.messages) == 44


def test_real_words_are_kept(shared_data):
    for path in iter_files([shared_data / "swe_agent"]):
        history = json.loads(path.read_text())["history"]
        assert [message.content for message in read(path).messages] == [message["content"] for message in history]
