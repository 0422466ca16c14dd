from __future__ import annotations

import json
import shutil

import pytest

from loraloop.episode import Failure, Success, Timeout, Unknown
from loraloop.importers.ingest import detect, ingest_file, iter_files
from loraloop.importers.mini_swe_agent import MiniSweAgentImporter

RUN = "kitchen__egg-12.traj.json"


def read(path):
    (entry,) = MiniSweAgentImporter().read(path)
    return entry


def test_a_bare_list_is_one_run_word_for_word(fixtures):
    path = fixtures / "mini_swe_agent" / "bare.traj.json"
    episode = read(path)
    assert [message.content for message in episode.messages] == [message["content"] for message in json.loads(path.read_text())]
    assert [message.is_agent for message in episode.messages] == [False, False, True, False, True, False]
    assert episode.outcome == Unknown()


def test_newer_runs_have_tool_calls_and_say_model_time_and_status(fixtures):
    episode = read(fixtures / "mini_swe_agent" / RUN)
    assert [message.role for message in episode.messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    turn = episode.messages[2]
    assert [(call.id, call.function.arguments) for call in turn.tool_calls] == [("a", '{"command":  "ls"}'), ("b", "{}")]
    assert turn.reasoning == "Hm."
    assert episode.messages[1].content == "Fix the egg."
    tags = {"exit_status": "Submitted", "format": "mini-swe-agent", "ignored_keys": '["messages.mood"]', "model": "m-1"}
    assert episode.metadata.tags == tags
    assert episode.metadata.duration_ms == 60_500
    assert episode.task_id == "kitchen__egg-12"


def test_runs_of_one_prompt_are_attempts_at_one_task(fixtures, write):
    messages = json.loads((fixtures / "mini_swe_agent" / "bare.traj.json").read_text())
    first = read(fixtures / "mini_swe_agent" / "bare.traj.json")
    same = read(write(json.dumps([*messages[:2], {"role": "assistant", "content": "No."}]), "a.traj.json"))
    other = read(write(json.dumps([messages[0], {"role": "user", "content": "Fix the ham."}, *messages[2:]]), "b.traj.json"))
    assert first.group_id == same.group_id != other.group_id


@pytest.mark.parametrize(
    ("info", "results", "outcome"),
    [
        ({}, {"resolved_ids": ["kitchen__egg-12"]}, Success(1.0)),
        ({}, {"resolved_ids": [], "unresolved_ids": ["kitchen__egg-12"]}, Failure("not resolved")),
        ({}, None, Unknown()),
        ({"exit_status": "LimitsExceeded"}, None, Timeout()),
        ({"exit_status": "LimitsExceeded"}, {"resolved_ids": [], "empty_patch_ids": ["kitchen__egg-12"]}, Timeout()),
        ({"exit_status": "AuthenticationError", "traceback": "…"}, {"resolved_ids": [], "empty_patch_ids": ["kitchen__egg-12"]}, Unknown()),
    ],
)
def test_how_a_run_ended(fixtures, tmp_path, info, results, outcome):
    run = json.loads((fixtures / "mini_swe_agent" / RUN).read_text())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RUN).write_text(json.dumps({**run, "info": {**run["info"], **info}}))
    if results is not None:
        (tmp_path / "results.json").write_text(json.dumps(results))
    assert read(tmp_path / "run" / RUN).outcome == outcome


def test_a_list_of_messages_under_another_name_is_told_by_its_marks(fixtures, tmp_path):
    assert detect(shutil.copy(fixtures / "mini_swe_agent" / "bare.traj.json", tmp_path / "run.json")).name == "mini-swe-agent"


def test_a_long_run_is_not_taken_for_a_chat(fixtures, write):
    run = json.loads((fixtures / "mini_swe_agent" / RUN).read_text())
    run["messages"][1]["content"] = "x" * 100_000
    assert detect(write(json.dumps(run), "run.json")).name == "mini-swe-agent"


def test_real_runs_are_taken_over_whole(shared_data, store):
    paths = iter_files([shared_data / "mini_swe_agent"])
    reports = [ingest_file(store, path) for path in paths]
    assert [(report.format, report.read, report.stored) for report in reports] == [("mini-swe-agent", 1, 1)] * 2
    for path in paths:
        assert [message.to_openai() for message in read(path).messages] == json.loads(path.read_text())
