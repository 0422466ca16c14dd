"""The score that was declared decides the outcome, on its own scale, wherever a format keeps it; what fits no scale is refused."""

from __future__ import annotations

import json

import pytest

from loraloop.episode import Episode, EpisodeMetadata, Failure, Message, Success, Timeout, Unknown
from loraloop.errors import SettingsError
from loraloop.importers.ingest import ingest_file
from loraloop.importers.scores import ScoreRule
from loraloop.learn.outcome_rules import Meaning, OutcomeSettings, judge

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def ingest(store, path, *said):
    return ingest_file(store, path, score_rule=ScoreRule.parse(*said))


def lines(*values, key="reward"):
    return "".join(json.dumps({"messages": TURNS, "task_id": n, key: value}) + "\n" for n, value in enumerate(values))


def test_a_verdict_in_a_line_of_chat_is_read_when_it_is_named(store, write):
    path = write(lines(0.25, 1, True, False, "C", "p", "I", None))
    assert ingest_file(store, path).refused == {"not_a_demonstration": 7}  # null is no verdict
    report = ingest(store, path, "reward", "0..1")
    assert (report.stored, report.refused, report.scores) == (8, {}, "reward on 0..1")
    judged = [episode for episode in store.query() if "score_scale" in episode.metadata.tags]
    by_task = [episode.outcome for episode in sorted(judged, key=lambda episode: episode.task_id)]
    zero = Failure("reward 0")
    assert by_task == [Failure("reward 0.25"), Success(1.0), Success(1.0), zero, Success(1.0), Failure("reward 0.5"), zero, Unknown()]
    assert judged[0].metadata.tags["outcome_from"] == "score"


def test_one_of_several_rewards_counts_by_its_name(store, write):
    path = write(lines({"correct": 1, "form": {"short": 3}}, {"correct": 0, "form": {"short": 9}}, {"form": {"short": 12}}))
    report = ingest(store, path, "reward.correct", "0..1")
    assert (report.stored, report.refused) == (2, {"no_score": 1})
    assert "number 3: found no score reward.correct" in report.refusals[0].detail
    report = ingest(store, path, "reward.form.short", "0..10", 5)
    assert (report.stored, report.refused) == (2, {"score_outside_scale": 1})
    graded = [episode for episode in store.query() if episode.metadata.tags["score_scale"] == "0..10"]
    assert sorted(map(str, (episode.outcome for episode in graded))) == sorted(map(str, (Failure("reward.form.short 3"), Success(9.0))))
    whole = ingest(store, path, "reward", None)
    assert whole.refused == {"bad_reward": 3}
    assert "name one part of it, as KEY.SUBKEY" in whole.refusals[0].detail


def test_formats_that_keep_parts_of_a_reward_give_them_by_name(store, shared_data):
    path = shared_data / "verifiers" / "wordle" / "wordle--gpt-4.1-mini.816ec3b0.jsonl"
    plain = ingest_file(store, path)
    assert plain.scores.startswith("as recorded, 1")
    names = {name for episode in store.query() for name in episode.metadata.tags if name.startswith("reward.")}
    name = min(names)
    assert ingest(store, path, name.removeprefix("reward."), "0..1").read == plain.read
    assert any(episode.metadata.tags.get("score") == name.removeprefix("reward.") for episode in store.query())


def test_what_an_outcome_says_counts_on_the_declared_scale(store, fixtures):
    rule = ScoreRule.parse(None, "0..2", 1)
    turn = (Message(role="assistant", content="b"),)
    for before, after in (
        (Success(1.5), Success(1.5)),
        (Failure("reward 0.5"), Failure("reward 0.5")),
        (Failure("reward 1.2"), Success(1.2)),
        (Failure("score P"), Success(1.0)),
        (Timeout(0.5), Timeout(0.5)),
        (Timeout(2.0), Success(2.0)),
    ):
        judged = rule.apply(Episode(messages=turn, outcome=before))
        assert judged.outcome == after, before
        assert judged.metadata.tags["score_scale"] == "0..2"
    report = ingest(store, fixtures / "tau_bench" / "results.json", "reward", "0..1", 0)
    assert report.scores == "reward on 0..1"


def test_methods_go_by_the_scale_of_each_episode():
    turn = (Message(role="assistant", content="b"),)
    own = Episode(messages=turn, outcome=Success(50), metadata=EpisodeMetadata(tags={"score_scale": "0..100"}))
    assert judge("weighted", own, OutcomeSettings()) == Meaning(0.5, 0.5)
    assert judge("weighted", own.model_copy(update={"metadata": EpisodeMetadata()}), OutcomeSettings()).reason == "score_outside_scale"
    assert judge("sft", own, OutcomeSettings(min_score=60, score_range=(0, 100))).reason == "score_below_minimum"
    verifiers = own.model_copy(update={"metadata": EpisodeMetadata(tags={"score_scale": "sum"})})
    assert judge("weighted", verifiers, OutcomeSettings()).reason == "score_outside_scale"


@pytest.mark.parametrize("said", [("a", "1..0"), ("a", "1"), ("a", "0..x"), ("", "0..1"), ("a", "0..1", 2), ("a", "1.2.3..5")])
def test_scales_that_are_none_are_refused(said):
    with pytest.raises(SettingsError, match="expected"):
        ScoreRule.parse(*said)


def test_nothing_said_is_no_rule():
    assert ScoreRule.parse(None, None) is None
    assert ScoreRule.parse("a", " -1 .. 1e3 ") == ScoreRule("a", -1.0, 1000.0, 1000.0)
