"""Outcomes from files that others wrote: joined to the right episode, or told why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraloop.episode import EpisodeMetadata, Failure, Success, Timeout, Unknown
from loraloop.errors import ImportFailed
from loraloop.label import LabelReport, label_from
from loraloop.plugins import EpisodeStore
from loraloop.store.memory import InMemoryEpisodeStore
from loraloop.testing import make_episode


@pytest.fixture
def store() -> EpisodeStore:
    """Three attempts at two tasks, nobody knows how they ended."""
    store = InMemoryEpisodeStore()
    for name, task in (("a1", "egg"), ("a2", "egg"), ("b1", "ham")):
        tags = {"run": name, "shared": "x"}
        store.append(make_episode(id=name, task_id=task, outcome=Unknown(), metadata=EpisodeMetadata(created_at=1, tags=tags)))
    return store


def outcomes(store: EpisodeStore) -> dict[str, object]:
    return {dto.id: dto.outcome for dto in store.list_meta() if not dto.outcome.is_unknown}


def join(store: EpisodeStore, path: Path, content: object, key: str | None = None) -> LabelReport:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    report = label_from(store, path, key)
    told = report.joined + report.known + report.unmatched + report.ambiguous + sum(report.refused.values())
    assert report.read == told
    assert len(report.details) == report.read - report.joined - report.known
    return report


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.json", [{"episode_id": "a1", "score": 0.25}, {"task_id": "ham", "success": False, "reason": "burnt"}]),
        ("r.jsonl", '{"id": "a1", "reward": 0.25}\n\n{"task": "ham", "outcome": "failure", "reason": "burnt"}\n'),
        ("r.csv", "\ufeffepisode_id,task_id,score,passed,reason\na1,,0.25,,\n,ham,,FALSE,burnt\n"),
    ],
)
def test_rows_are_joined_by_episode_id_or_task_id(store, tmp_path, name, content):
    report = join(store, tmp_path / name, content)
    assert (report.read, report.joined) == (2, 2)
    assert outcomes(store) == {"a1": Success(0.25), "b1": Failure("burnt")}
    assert store.get_labels("a1")[1].source == str(tmp_path / name)


def test_names_and_verdicts_alone_are_enough(store, tmp_path):
    report = join(store, tmp_path / "r.json", {"a1": True, "a2": "timeout", "ham": 0, "rice": 1})
    assert outcomes(store) == {"a1": Success(1.0), "a2": Timeout(), "b1": Failure("score 0")}
    assert (report.joined, report.unmatched) == (3, 1)
    assert "'rice' is no episode" in report.details[0]


def test_several_attempts_at_one_task_get_no_verdict_that_names_the_task_only(store, tmp_path):
    report = join(store, tmp_path / "r.json", {"egg": True})
    assert report.ambiguous == 1
    assert "'egg' is more than one episode" in report.details[0]
    assert outcomes(store) == {}


def test_a_tag_tells_them_apart_when_it_is_named(store, tmp_path):
    rows = [{"run": "a2", "task_id": "egg", "score": 1}, {"run": "b1", "score": 1}, {"run": "c", "score": 1}]
    assert join(store, tmp_path / "r.json", rows, key="run").joined == 2
    assert outcomes(store) == {"a2": Success(1.0), "b1": Success(1.0)}
    assert join(store, tmp_path / "r.json", [{"shared": "x", "score": 0}], key="shared").ambiguous == 1


def test_other_columns_are_no_names(store, tmp_path):
    """An id that is no episode's is not taken for a task, nor is any other column."""
    store.append(make_episode(id="c1", task_id="3", outcome=Unknown()))
    report = join(store, tmp_path / "r.json", [{"id": 3, "comment": "ham", "trial": "b1", "score": 1}])
    assert report.unmatched == 1
    assert outcomes(store) == {}


def test_what_is_no_verdict_is_refused_by_name(store, tmp_path):
    rows = [
        7,
        {"score": 1},
        {"id": "a1"},
        {"id": "a1", "score": "maybe"},
        {"id": "a1", "score": None, "outcome": ""},
        {"id": "a2", "score": []},
    ]
    report = join(store, tmp_path / "r.json", rows)
    assert report.refused == {"no_name": 1, "no_verdict": 2, "not_an_object": 1, "unknown_verdict": 2}
    assert f"{tmp_path / 'r.json'}, entry 4: unknown_verdict: found 'maybe'" in report.details[3]
    assert outcomes(store) == {}


def test_reading_a_file_again_says_nothing_new(store, tmp_path):
    content = {"a1": True, "b1": False}
    join(store, tmp_path / "r.json", content)
    report = join(store, tmp_path / "r.json", content)
    assert (report.joined, report.known) == (0, 2)
    assert len(store.get_labels("a1")) == 2
    assert join(store, tmp_path / "other.json", {"a1": False}).joined == 1
    assert outcomes(store)["a1"] == Failure()
    assert join(store, tmp_path / "r.json", content).joined == 1, "it was said otherwise since"


def test_lists_of_resolved_instances(store, tmp_path):
    for name in ("x", "y", "z"):
        store.append(make_episode(id=f"s-{name}", task_id=name, outcome=Unknown()))
    report = join(store, tmp_path / "results.json", {"resolved": ["x"], "generated": ["x", "y", "z"], "no_logs": ["z"], "applied": ["x"]})
    assert (report.joined, report.refused) == (2, {"no_verdict": 1})
    assert outcomes(store) == {"s-x": Success(1.0), "s-y": Failure("unresolved")}
    bench = {
        "resolved_ids": ["ham"],
        "unresolved_ids": ["x"],
        "empty_patch_ids": ["y"],
        "error_ids": ["z"],
        "total_instances": 4,
        "submitted_ids": ["q"],
    }
    assert join(store, tmp_path / "bench.json", bench).joined == 3
    assert outcomes(store) == {"b1": Success(1.0), "s-x": Failure("unresolved"), "s-y": Failure("empty patch")}


def test_harbor_trials(store, tmp_path):
    def trial(name: str, task: str, rewards: object, exception: str | None = None) -> dict[str, object]:
        info = {"exception_type": exception, "exception_message": ""} if exception else None
        return {"trial_name": name, "task_name": task, "verifier_result": {"rewards": rewards}, "exception_info": info}

    store.append(make_episode(id="c1", task_id="rice", outcome=Unknown()))
    assert join(store, tmp_path / "one" / "result.json", trial("b1", "anything", {"reward": 1.0})).joined == 1
    job = tmp_path / "job"
    for number, each in enumerate(
        (
            trial("a1", "egg", {"reward": 0}),
            trial("none", "rice", {"reward": 0.5}, "AgentTimeoutError"),
            trial("a2", "egg", {}, "NetworkError"),
        )
    ):
        (job / str(number)).mkdir(parents=True)
        (job / str(number) / "result.json").write_text(json.dumps(each))
    (job / "result.json").write_text(json.dumps({"n_total_trials": 3}))
    report = label_from(store, job)
    assert (report.read, report.joined, report.refused) == (3, 2, {"exception": 1})
    assert outcomes(store) == {"b1": Success(1.0), "a1": Failure("score 0"), "c1": Timeout(0.5)}
    two = label_from(store, write(tmp_path / "two.json", trial("a2", "egg", {"style": 1, "tests": 0})))
    assert two.refused == {"no_verdict": 1}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("r.json", "{", "is not JSON"),
        ("r.json", "{}", "none of the forms"),
        ("r.json", '{"episodes": [1]}', "none of the forms"),
        ("r.jsonl", '{"id": "a1", "score": 1}\n{', "cannot be read as JSON Lines"),
        ("folder/readme.json", "{}", "no result.json of a Harbor trial"),
    ],
)
def test_a_file_that_holds_no_verdicts_changes_nothing(store, tmp_path, name, content, says):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(ImportFailed, match=says):
        label_from(store, path.parent if "/" in name else path)
    with pytest.raises(ImportFailed, match="cannot be read"):
        label_from(store, tmp_path / "missing.json")
    assert outcomes(store) == {}
