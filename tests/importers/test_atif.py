from __future__ import annotations

import json

import pytest

from loraloop.episode import Failure, Success, Timeout, Unknown
from loraloop.importers.atif import AtifImporter
from loraloop.importers.ingest import detect, iter_files
from loraloop.training_data import Refusal


@pytest.fixture
def episodes(fixtures):
    """By what they say of themselves: the trajectory's id."""
    return {entry.metadata.tags["trajectory_id"]: entry for entry in AtifImporter().read(fixtures / "atif" / "trajectories.jsonl")}


def test_a_trajectory_becomes_messages_word_for_word(episodes):
    episode = episodes["t-1"]
    assert [(message.role, message.content) for message in episode.messages] == [
        ("system", "You cook."),
        ("user", "Two eggs, please."),
        ("assistant", ""),
        ("tool", "second"),
        ("tool", "first"),
        ("assistant", "Done by rule."),
        ("assistant", "Done."),
    ]
    assert [(call.id, call.function.arguments) for call in episode.messages[2].tool_calls] == [
        ("a", '{"what": "egg", "amount": 1}'),
        ("b", "{}"),
    ]
    assert [message.tool_call_id for message in episode.messages[3:5]] == ["b", "a"]
    assert episode.messages[2].reasoning == "Both at once."
    assert episode.tools[0]["function"]["name"] == "boil"
    assert episode.outcome == Success(1.0)
    assert (episode.metadata.started_at, episode.metadata.duration_ms) == (1740823200000, 60_000)
    assert episode.metadata.tags["model"] == "m-1"


def test_what_no_model_wrote_is_not_the_agents(episodes):
    assert [message.is_agent for message in episodes["t-1"].messages if message.role == "assistant"] == [True, False, True]


def test_copied_context_is_seen_and_never_trained_on(episodes):
    episode = episodes["s-2"]
    assert [message.is_demo for message in episode.messages] == [True, True, True, False]
    assert [message.is_agent for message in episode.messages] == [False, False, False, True]
    assert episode.metadata.tags["copied_context"] == "2"


def test_results_without_calls_are_the_environments(episodes):
    messages = episodes["t-3"].messages
    assert [(message.role, message.author) for message in messages][2] == ("user", "environment")
    assert episodes["t-3"].outcome == Failure("score 0.25")


def test_a_sub_agent_is_an_episode_of_its_own_with_no_outcome(episodes):
    assert list(episodes) == ["t-1", "s-2", "t-3", "t-3-a", "s-4"]
    helper = episodes["t-3-a"]
    assert [message.content for message in helper.messages] == ["Help.", "I help."]
    assert (helper.outcome, helper.metadata.tags["parent_trajectory"]) == (Unknown(), "t-3")


def test_what_has_no_place_is_named(episodes):
    assert json.loads(episodes["s-4"].metadata.tags["ignored_keys"]) == ["case", "mine", "steps.mood"]


def test_one_result_for_several_calls_says_how_to_record_it(fixtures):
    refused = {entry.reason: entry for entry in AtifImporter().read(fixtures / "atif" / "refused.jsonl")}
    assert "raw_content" in refused["unanswered_tool_call"].detail


TRAJECTORY = {
    "schema_version": "ATIF-v1.7",
    "agent": {"name": "a"},
    "steps": [{"source": "user", "message": "Do."}, {"source": "agent", "message": "Done."}],
}


def read_trial(folder, result=None, name="trajectory.json", document=TRAJECTORY, **rewards):
    (folder / "agent").mkdir()
    (folder / "agent" / name).write_text(json.dumps(document))
    if result is not None:
        (folder / "result.json").write_text(result if isinstance(result, str) else json.dumps(result))
    for suffix, text in rewards.items():
        (folder / "verifier").mkdir(exist_ok=True)
        (folder / "verifier" / f"reward.{suffix}").write_text(text)
    return next(AtifImporter().read(folder / "agent" / name))


def paid(*, exception=None, **rewards):
    return {
        "task_name": "eggs",
        "trial_name": "eggs__1",
        "verifier_result": {"rewards": rewards} if rewards else None,
        "exception_info": {"exception_type": exception} if exception else None,
    }


@pytest.mark.parametrize(
    ("result", "outcome"),
    [
        (paid(reward=1.0), Success(1.0)),
        (paid(reward=0), Failure("reward 0.0")),
        (paid(score=0.5), Failure("reward 0.5")),
        (paid(reward=1, style=0), Success(1.0)),
        (paid(speed=1, style=0), Unknown()),
        (paid(), Unknown()),
        (paid(reward=0, exception="AgentTimeoutError"), Timeout(0.0)),
        (paid(exception="AgentTimeoutError"), Timeout()),
        (paid(reward=1, exception="AgentTimeoutError"), Success(1.0)),
        (paid(reward=1, exception="VerifierTimeoutError"), Unknown()),
    ],
)
def test_a_trial_folder_says_task_and_reward(tmp_path, result, outcome):
    episode = read_trial(tmp_path, result)
    assert (episode.outcome, episode.task_id, episode.group_id) == (outcome, "eggs", "eggs")
    exception = (result["exception_info"] or {}).get("exception_type")
    assert episode.metadata.tags.get("exception") == exception


def test_several_rewards_are_all_kept(tmp_path):
    tags = read_trial(tmp_path, paid(speed=1, style=0.5)).metadata.tags
    assert (tags["reward.speed"], tags["reward.style"]) == ("1", "0.5")


@pytest.mark.parametrize(
    ("files", "outcome"),
    [({"txt": "1\n"}, Success(1.0)), ({"txt": "0.5"}, Failure("reward 0.5")), ({"json": '{"reward": 1}'}, Success(1.0)), ({}, Unknown())],
)
def test_the_verifiers_file_says_it_where_no_result_does(tmp_path, files, outcome):
    assert read_trial(tmp_path, **files).outcome == outcome


@pytest.mark.parametrize("text", ["much", "NaN", '"1"'])
def test_a_reward_that_is_no_number_is_refused(tmp_path, text):
    refusal = read_trial(tmp_path, txt=text)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "bad_reward"


@pytest.mark.parametrize("result", ["{", "[]", '{"reward": 1}', None])
def test_other_files_of_that_name_say_nothing(tmp_path, result):
    assert read_trial(tmp_path, result).outcome == Unknown()


def test_a_trials_reward_is_not_its_sub_agents(tmp_path):
    sub_agent = {**TRAJECTORY, "trajectory_id": "s"}
    main = {**TRAJECTORY, "subagent_trajectories": [sub_agent]}
    assert read_trial(tmp_path, paid(reward=1), document=main).outcome == Success(1.0)
    assert [entry.outcome for entry in AtifImporter().read(tmp_path / "agent" / "trajectory.json")] == [Success(1.0), Unknown()]


def test_only_the_main_trajectory_of_a_trial_was_paid(tmp_path):
    assert read_trial(tmp_path, paid(reward=1), name="trajectory.summarization-1.json").outcome == Unknown()


def test_a_continuation_belongs_to_the_trial(tmp_path):
    assert read_trial(tmp_path, paid(reward=1), name="trajectory.cont-1.json").outcome == Success(1.0)


def test_real_trajectories_agree_with_the_manifest_and_the_recordings(shared_data):
    originals = {}
    for run in json.loads((shared_data / "tau_bench" / "gpt-4o-airline.json").read_text()):
        originals.setdefault((run["task_id"], run["trial"]), run)
    episodes = {}
    for path in iter_files([shared_data / "atif"]):
        assert detect(path).name == "atif"
        (episodes[path.name],) = AtifImporter().read(path)
    manifest = json.loads((shared_data / "MANIFEST.json").read_text())
    listed = manifest if isinstance(manifest, list) else manifest["files"]
    positive = {entry["path"].split("/")[-1]: entry["positive"] for entry in listed if entry["path"].startswith("atif/")}
    assert len(episodes) == 16
    assert {name: int(episode.outcome.is_success) for name, episode in episodes.items()} == positive
    for episode in episodes.values():
        _, task, trial = episode.metadata.tags["trajectory_id"].split("-")
        said = originals[int(task), int(trial)]["traj"]
        assert [message.content or "" for message in episode.messages] == [message["content"] or "" for message in said]
