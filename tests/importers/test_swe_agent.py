from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest

from loraloop.episode import Failure, Success, Unknown
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
