from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from loraloop.episode import CONVERSATION, Failure, Success, Unknown
from loraloop.errors import ImportFailed
from loraloop.importers.ingest import ingest_file
from loraloop.importers.tau_bench import TauBenchImporter
from loraloop.training_data import Refusal


def read(path):
    return list(TauBenchImporter().read(path))


def test_a_run_is_taken_over_as_it_was(fixtures):
    episode = read(fixtures / "tau_bench" / "results.json")[0]
    assert (episode.task_id, episode.group_id, episode.learn_model) == ("0", "0", CONVERSATION)
    assert episode.metadata.scenario == "tau-bench"
    assert episode.metadata.tags == {"format": "tau-bench", "trial": "0"}
    assert (episode.metadata.started_at, episode.metadata.ended_at) == (None, None)
    assert [message.role for message in episode.messages] == ["system", "user", *["assistant", "tool"] * 2, "assistant", "user"]
    assert [call.id for message in episode.messages for call in message.tool_calls] == ["call_1", "call_1"]
    assert episode.messages[2].content is None
    assert episode.messages[3].name == "cancel"


def test_rewards_become_outcomes(fixtures):
    outcomes = [episode.outcome for episode in read(fixtures / "tau_bench" / "results.json")]
    assert outcomes == [
        Success(1.0),
        Failure("reward 0.0"),
        Failure("reward 0.5"),
        Success(1.0),
        Unknown(),
        Unknown(),
        Success(0.9999999),
        Failure("reward -1.0"),
    ]


def test_trials_and_unknown_keys_are_tags(fixtures):
    tags = [episode.metadata.tags for episode in read(fixtures / "tau_bench" / "results.json")]
    assert [tag.get("trial") for tag in tags] == ["0", "1", "0", "1", "b", None, "0", "1"]
    assert tags[4]["ignored_keys"] == '["agent"]'


def test_ground_truth_is_never_stored(fixtures):
    for name in ("results.json", "refused.json"):
        text = "".join(entry.model_dump_json() for entry in read(fixtures / "tau_bench" / name))
        assert "GROUND TRUTH" in (fixtures / "tau_bench" / "results.json").read_text()
        assert "GROUND TRUTH" not in text


def test_every_refusal_has_its_reason_and_says_what_to_do(fixtures):
    path = fixtures / "tau_bench" / "refused.json"
    runs = json.loads(path.read_text())
    for number, (run, entry) in enumerate(zip(runs, read(path), strict=True), 1):
        assert isinstance(entry, Refusal), run["case"]
        assert entry.reason == run["case"].partition(":")[0], entry
        assert re.fullmatch(rf"{re.escape(str(path))}, entry {number}: found .+; expected .+; do this: .+", entry.detail)


def test_an_entry_that_is_no_run_spoils_only_itself(write):
    run = {"task_id": 0, "reward": 1, "info": {}, "traj": [{"role": "assistant", "content": "Bye"}], "trial": 0}
    entries = read(write(json.dumps([None, run, []])))
    assert [getattr(entry, "reason", "kept") for entry in entries] == ["bad_shape", "kept", "bad_shape"]


@pytest.mark.parametrize("content", [b'[{"task_id": 0', b"\xff[]", b"[\x00]", b"", b'{"task_id": 0}', b"7"])
def test_a_file_that_is_no_json_list_cannot_be_imported(write, content):
    with pytest.raises(ImportFailed, match=r"rows.json: found .*; expected .*; do this: "):
        read(write(content, "rows.json"))


def test_trials_with_the_same_words_are_different_episodes(write):
    run = {"task_id": 0, "reward": 1, "info": {}, "traj": [{"role": "assistant", "content": "Bye"}], "trial": 0}
    runs = [run, {**run, "trial": 1}, {**run, "task_id": 1}, {**run, "reward": 0}, {**run, "info": {"user_cost": 1}}]
    ids = [episode.id for episode in read(write(json.dumps(runs)))]
    assert len(set(ids)) == 4
    assert ids[4] == ids[0]  # nothing of info is imported


def test_ids_do_not_depend_on_the_hash_seed(fixtures):
    code = (
        "import sys; from pathlib import Path; from loraloop.importers.ingest import detect\n"
        "for name in sys.argv[1:]:\n"
        "    print(*(getattr(entry, 'id', entry) for entry in detect(Path(name)).read(Path(name))))"
    )
    files = [str(fixtures / "tau_bench" / "results.json"), str(fixtures / "openai" / "accepted.jsonl")]
    seen = {
        subprocess.run(
            [sys.executable, "-c", code, *files], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(seen) == 1
    assert seen.pop().count(b"ep-0000000000000-") == 14


def test_real_results_are_taken_over_whole(shared_data, store, tmp_path):
    path = shared_data / "tau_bench" / "gpt-4o-airline.json"
    report = ingest_file(store, path)
    assert (report.read, report.stored, report.duplicates, report.refused) == (140, 140, 0, {})
    episodes = store.query()
    assert Counter(episode.outcome.kind for episode in episodes) == {"success": 43, "failure": 97}
    assert len({episode.task_id for episode in episodes}) == 35
    copy = shutil.copy(path, tmp_path / "elsewhere.json")
    assert ingest_file(store, copy).duplicates == 140
    assert store.count() == 140


def test_real_messages_are_kept_word_for_word(shared_data):
    path = shared_data / "tau_bench" / "gpt-4o-airline.json"
    runs = json.loads(path.read_text())
    for run, episode in zip(runs, read(path), strict=True):
        assert [message.to_openai() for message in episode.messages] == run["traj"]
        assert run["info"]["task"]["instruction"] not in episode.model_dump_json()


def test_real_runs_with_repeated_call_ids_keep_each_result_by_its_call(shared_data):
    n_repeated = 0
    for episode in read(shared_data / "tau_bench" / "gpt-4o-airline.json"):
        calls = [(at, call) for at, message in enumerate(episode.messages) for call in message.tool_calls]
        ids = [call.id for _, call in calls]
        n_repeated += len(ids) != len(set(ids))
        for at, call in calls:
            if at + 1 < len(episode.messages):
                assert episode.messages[at + 1].tool_call_id == call.id
                assert episode.messages[at + 1].name == call.function.name
    assert n_repeated == 45
