from __future__ import annotations

import json
from collections import Counter

import pytest

from loraloop.episode import Failure, Success, Unknown
from loraloop.importers.ingest import ingest_file, iter_files
from loraloop.importers.verifiers import VerifiersImporter
from loraloop.store.memory import InMemoryEpisodeStore
from loraloop.training_data import Refusal


def read(path):
    return list(VerifiersImporter().read(path))


@pytest.fixture
def episodes(fixtures):
    path = fixtures / "verifiers" / "results.jsonl"
    cases = [json.loads(line)["case"] for line in path.read_text().splitlines()]
    return dict(zip(cases, read(path), strict=True))


def test_calls_are_decoded_and_kept_to_the_letter(episodes):
    messages = episodes["parallel calls, results without ids"].messages
    assert [call.function.arguments for call in messages[2].tool_calls] == ['{"where": "kitchen"}', '{"shelf": 2}']
    assert [call.id for call in messages[2].tool_calls] == ["a", "b"]
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]


def test_keys_that_parquet_padded_are_taken_out_of_schemas_and_counted(episodes):
    episode = episodes["parallel calls, results without ids"]
    find, opened = [tool["function"] for tool in episode.tools]
    assert find["parameters"]["properties"] == {"where": {"type": "string", "title": "Where"}}
    assert "strict" not in find
    assert opened["parameters"]["properties"]["shelf"]["default"] is None, "a default that may be null is no padding"
    assert "required" not in opened["parameters"]
    assert episode.metadata.tags["padded_keys_removed"] == "6"


def test_padded_arguments_are_taken_out_too(episodes):
    episode = episodes["info is text, arguments an object padded with null"]
    assert episode.messages[2].tool_calls[0].function.arguments == '{"where":"kitchen"}'
    assert episode.metadata.tags["padded_keys_removed"] == "7"


def test_arguments_that_were_encoded_twice_are_decoded_once(episodes):
    episode = episodes["arguments encoded twice"]
    assert episode.messages[2].tool_calls[0].function.arguments == '{"where":  "kitchen"}'
    assert episode.metadata.tags["decoded_arguments"] == "1"


def test_rewards_are_kept_as_they_are_and_their_scale_is_said_to_be_open(episodes):
    assert [episode.outcome for episode in episodes.values()] == [
        Success(1.0),
        Success(1.37),
        Failure("reward 0.9666666667"),
        Failure("reward 0.0"),
        Unknown(),
        Success(1.0),
        Success(1.0),
        Success(1.0),
    ]
    tags = episodes["a reward above 1"].metadata.tags
    assert (tags["reward"], tags["score_scale"], tags["reward.judge_reward_func"]) == ("1.37", "sum", "1.37")
    assert all(episode.metadata.tags["score_scale"] == "sum" for episode in episodes.values())


def test_rollouts_of_one_example_are_one_task_and_examples_of_other_environments_are_not(episodes):
    tasks = {case: episode.task_id for case, episode in episodes.items()}
    assert tasks["a reward above 1"] == tasks["a reward below 1"] != tasks["parallel calls, results without ids"]
    assert tasks["plain text"].startswith("0-")
    assert tasks["plain text"] != tasks["the last call has no answer"], "the same number, another prompt"
    assert tasks["nobody judged"].startswith("4-")


def test_a_right_answer_that_is_a_number_is_not_taken_for_a_judgement(fixtures, write):
    row = json.loads((fixtures / "verifiers" / "results.jsonl").read_text().splitlines()[1])
    (episode,) = read(write(json.dumps({**row, "answer": 60})))
    assert "answer" not in episode.model_dump_json()


def test_an_empty_completion_that_was_paid_is_refused(fixtures):
    refusal = read(fixtures / "verifiers" / "refused.jsonl")[0]
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, "an empty completion of reward 1.0" in refusal.detail) == ("no_agent_turn", True)


@pytest.mark.parametrize(
    ("folder", "account", "outcomes", "scores"),
    [
        ("wiki_search", (105, 105, {}), {"success": 70, "failure": 35}, {1.0}),
        ("math_python", (15, 15, {}), {"success": 14, "failure": 1}, {1.0}),
        ("tool_test", (15, 0, {"no_agent_turn": 15}), {}, set()),
        ("wordle", (15, 15, {}), {"success": 11, "failure": 4}, {1.2761111111, 1.3095238095, 1.3346666667, 1.37, 1.4233333333}),
    ],
)
def test_real_results_are_taken_over_or_refused_whole(shared_data, folder, account, outcomes, scores):
    store = InMemoryEpisodeStore()
    reports = [ingest_file(store, path) for path in iter_files([shared_data / "verifiers" / folder])]
    refused = Counter()
    for report in reports:
        refused.update(report.refused)
    assert (sum(r.read for r in reports), sum(r.stored for r in reports), dict(refused)) == account
    episodes = store.query()
    assert Counter(episode.outcome.kind for episode in episodes) == outcomes
    assert {episode.outcome.score for episode in episodes if episode.outcome.is_success} == scores


def test_real_tools_have_no_parameters_of_other_tools(shared_data):
    for path in iter_files([shared_data / "verifiers" / "wiki_search"]):
        for episode in read(path):
            properties = [list(tool["function"]["parameters"]["properties"]) for tool in episode.tools]
            assert properties == [["query"], ["page_id"], ["section_id"]]
            assert episode.metadata.tags["padded_keys_removed"] == "6"


def test_real_calls_are_kept_to_the_letter(shared_data):
    n_calls = 0
    for path in iter_files([shared_data / "verifiers" / "wiki_search", shared_data / "verifiers" / "math_python"]):
        with path.open() as file:
            rows = [json.loads(line) for line in file]
        for row, episode in zip(rows, read(path), strict=True):
            raw = [json.loads(call) for message in row["completion"] for call in message.get("tool_calls") or []]
            calls = [call for message in episode.messages for call in message.tool_calls]
            assert [call.function.arguments for call in calls] == [call["function"]["arguments"] for call in raw]
            n_calls += len(calls)
    assert n_calls == 425
