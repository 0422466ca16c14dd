from __future__ import annotations

import json
from collections import Counter

from loraloop.episode import Failure, Success, Timeout, Unknown
from loraloop.importers.ingest import ingest_file, iter_files
from loraloop.importers.intercode import InterCodeImporter
from loraloop.store.memory import InMemoryEpisodeStore


def read(path):
    return list(InterCodeImporter().read(path))


def test_a_run_alternates_what_the_agent_did_and_what_came_back(fixtures):
    episode = read(fixtures / "intercode" / "tiny_sql_multiturn.json")[0]
    said = [(message.role, message.content) for message in episode.messages]
    assert said == [("user", "How many eggs are there?"), ("assistant", "SELECT count(*) FROM egg"), ("user", "[(12,)]")]
    assert (episode.task_id, episode.group_id, episode.metadata.scenario) == ("7", "ic_sql/7", "ic_sql")
    assert episode.metadata.strategy == "tiny_sql_multiturn"
    assert episode.metadata.tags == {"format": "intercode", "hardness": "easy", "ignored_keys": '["case"]', "max_reward": "1.0"}


def test_running_out_of_turns_is_a_timeout_and_not_a_failure(fixtures):
    assert [episode.outcome for episode in read(fixtures / "intercode" / "tiny_sql_multiturn.json")] == [
        Success(1.0),
        Timeout(0.5),
        Failure("reward 0.0"),
        Unknown(),
        Success(1.0),
    ]
    assert [episode.outcome for episode in read(fixtures / "intercode" / "tiny_sql_react.json")] == [
        Success(1.0),
        Failure("reward 0.5"),
        Timeout(0.0),
        Success(1.0),
        Failure("reward 0.0"),
    ]


def test_thoughts_are_put_together_with_their_actions(fixtures):
    episode = read(fixtures / "intercode" / "tiny_sql_react.json")[0]
    assert [message.content for message in episode.messages[1:]] == [
        "Thought 1: I count them.\nAction 1: execute[SELECT count(*) FROM egg]",
        "Observation 1: [(12,)]",
        "Thought 2: Done.\nAction 2: submit",
        "Observation 2: [(12,)]",
    ]
    assert episode.metadata.tags["text"] == "rebuilt"


def test_a_submit_that_the_harness_forced_is_not_the_agents(fixtures):
    forced = read(fixtures / "intercode" / "tiny_sql_react.json")[2]
    assert [message.is_agent for message in forced.messages if message.role == "assistant"] == [True, True, False]


def test_a_made_up_observation_carries_no_loss(fixtures):
    episode = read(fixtures / "intercode" / "tiny_sql_react.json")[3]
    assert [message.weight for message in episode.messages if message.role == "assistant"] == [0, 1, 1]
    assert episode.metadata.tags["invented_observations"] == "1"


def test_the_same_words_in_another_file_are_another_run(fixtures, write):
    text = (fixtures / "intercode" / "tiny_sql_multiturn.json").read_text()
    other = read(write(text, "other_model.json"))
    assert not {episode.id for episode in other} & {episode.id for episode in read(fixtures / "intercode" / "tiny_sql_multiturn.json")}


def test_real_sql_runs_are_taken_over_whole(shared_data):
    store = InMemoryEpisodeStore()
    reports = [ingest_file(store, path) for path in iter_files([shared_data / "intercode" / "sql"])]
    assert [(report.read, report.stored, report.refused) for report in reports] == [(698, 698, {})] * 3
    episodes = store.query()
    assert Counter(episode.outcome.kind for episode in episodes) == {"success": 1463, "timeout": 404, "failure": 227}
    assert len({episode.group_id for episode in episodes}) == 698
    assert sum("invented_observations" in episode.metadata.tags for episode in episodes) == 3
    forced = [episode for episode in episodes if any(message.author == "harness" for message in episode.messages)]
    assert Counter(episode.outcome.kind for episode in forced) == {"timeout": 47, "success": 7}


def test_real_python_runs_are_taken_over_whole(shared_data):
    episodes = read(*iter_files([shared_data / "intercode" / "python"]))
    assert Counter(episode.outcome.kind for episode in episodes) == {"success": 69, "timeout": 48}


def test_real_actions_are_kept_word_for_word(shared_data):
    path = next(path for path in iter_files([shared_data / "intercode" / "sql"]) if "gpt-4" in path.name)
    for run, episode in zip(json.loads(path.read_text()), read(path), strict=True):
        history = run["turn_history"]
        said = [text for pair in zip(history["actions"], history["observations"], strict=True) for text in pair]
        assert [message.content for message in episode.messages] == [run["query"], *said]
