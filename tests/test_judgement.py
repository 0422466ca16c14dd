"""A candidate's way through the gate: the verdict is kept with its evidence, the state moves, and a kill in between costs nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models_made import OWN_ADAPTER, save_model

from loraloop import judgement
from loraloop.dataset import DatasetSettings
from loraloop.episode import EpisodeMetadata
from loraloop.errors import EvaluationError, LoraTrainerError, StoreError
from loraloop.evaluate.gate import Evidence, judge
from loraloop.evaluate.probes import ProbeResult
from loraloop.evaluate.verdict import Policy
from loraloop.files import file_sha256
from loraloop.lora.model import TrainedModel
from loraloop.lora.registry import VERDICT_FILE, hash_adapter
from loraloop.lora.states import ModelState
from loraloop.project import Project
from loraloop.store.ledger import Event, Ledger
from loraloop.testing import make_episode

HIGH, LOW = (1.0,) * 60 + (0.0,) * 40, (1.0,) * 40 + (0.0,) * 60


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    with Project(tmp_path / "project") as opened:
        yield opened


def new_model(project: Project, **changes: Any) -> TrainedModel:
    return save_model(project.directory / "models", **changes)


def make_evidence(model: TrainedModel, **changes: Any) -> Evidence:
    tasks = tuple(f"task-{number}" for number in range(100))
    scores = {"candidate_scores": HIGH, "champion_scores": LOW}
    return Evidence(**{"candidate": model.id, "champion": "base", "task_ids": tasks, "overlaps": (), "probes": (), **scores, **changes})


def events(project: Project) -> list[Event]:
    return list(project.store.ledger.iter_events(kind=judgement.JUDGED))


@pytest.mark.parametrize(
    ("scores", "state"), [((HIGH, LOW), ModelState.PROMOTED), ((LOW, LOW), ModelState.HELD), ((LOW, HIGH), ModelState.REJECTED)]
)
def test_the_model_becomes_what_the_verdict_says(project: Project, scores: tuple[Any, Any], state: ModelState) -> None:
    model = new_model(project)
    evidence = make_evidence(model, candidate_scores=scores[0], champion_scores=scores[1])
    verdict = project.judge(evidence)
    assert project.get_model(model.id).state is state
    assert project.registry.get_history(model.id)[-1].reason == verdict.reason
    kept = project.find_judgement(model.id)
    assert kept is not None
    assert (kept.verdict, kept.evidence, kept.adapter_sha256) == (verdict, evidence, model.adapter_sha256)
    assert judge(kept.evidence, kept.policy) == verdict, "the evidence that was kept gives the verdict again"
    [event] = events(project)
    assert event.subject == model.id
    assert event.data["verdict"] == json.loads(verdict.model_dump_json())
    project.registry.verify(model.id)


def test_the_verdict_of_an_adapter_in_files_of_its_own_is_no_part_of_it(project: Project) -> None:
    model = new_model(project, files=OWN_ADAPTER)
    project.judge(make_evidence(model))
    assert hash_adapter(model.adapter_path) == model.adapter_sha256
    project.registry.verify(model.id)


def test_the_same_evidence_again_changes_nothing(project: Project) -> None:
    evidence = make_evidence(new_model(project))
    first = project.judge(evidence)
    before = file_sha256(project.registry.directory / evidence.candidate / VERDICT_FILE)
    assert project.judge(evidence) == first
    assert file_sha256(project.registry.directory / evidence.candidate / VERDICT_FILE) == before
    assert len(events(project)) == len(project.registry.get_history(evidence.candidate)) == 1


@pytest.mark.parametrize("broken", ["move", "event"])
def test_what_was_cut_off_is_finished_by_judging_again(project: Project, broken: str) -> None:
    class Broken(Ledger):
        def add(self, *_: Event) -> None:
            raise StoreError("cut off")

    class BrokenRegistry(type(project.registry)):  # type: ignore[misc]
        def move(self, *_: Any) -> TrainedModel:
            raise StoreError("cut off")

    evidence = make_evidence(new_model(project))
    registry = BrokenRegistry(project.registry.directory) if broken == "move" else project.registry
    with pytest.raises(StoreError, match="cut off"):
        judgement.decide(registry, Broken(project.store.ledger._database), evidence)
    kept = project.find_judgement(evidence.candidate)
    assert kept is not None
    project.judge(kept.evidence, kept.policy)
    assert project.get_model(evidence.candidate).state is ModelState.PROMOTED
    assert len(events(project)) == len(project.registry.get_history(evidence.candidate)) == 1


def test_a_held_model_is_judged_again_with_more_tasks(project: Project) -> None:
    model = new_model(project)
    few = slice(50, 65)
    names = tuple(str(number) for number in range(15))
    project.judge(make_evidence(model, task_ids=names, candidate_scores=HIGH[few], champion_scores=LOW[few]))
    assert project.get_model(model.id).state is ModelState.HELD
    project.judge(make_evidence(model))
    assert [change.state for change in project.registry.get_history(model.id)] == ["held", "promoted"]
    assert len(events(project)) == 2


def test_a_rejected_model_is_promoted_by_a_person_with_a_reason_only(project: Project) -> None:
    model = new_model(project)
    leak = ProbeResult(kind="reproduction", subject="sk…", choice="reject", message="the model says sk…")
    project.judge(make_evidence(model, probes=(leak,)))
    with pytest.raises(EvaluationError, match="tries until one succeeds"):
        project.judge(make_evidence(model))
    with pytest.raises(EvaluationError, match="for no reason"):
        project.promote(model.id, " ")
    assert project.get_model(model.id).state is ModelState.REJECTED
    verdict = project.promote(model.id, "the string is public")
    assert verdict.overridden is not None
    assert project.get_model(model.id).state is ModelState.PROMOTED
    kept = project.find_judgement(model.id)
    assert kept is not None
    assert kept.verdict == verdict
    assert [event.data["state"] for event in events(project)] == ["rejected", "promoted"]


def test_a_verdict_may_be_put_aside_at_once(project: Project) -> None:
    model = new_model(project)
    verdict = project.judge(make_evidence(model, candidate_scores=LOW), override_reason="needed for the demonstration")
    assert (verdict.decision, project.get_model(model.id).state) == ("promote", ModelState.PROMOTED)
    assert verdict.overridden is not None
    assert verdict.overridden.instead_of == "hold"


def test_a_model_that_nobody_has_judged_is_not_promoted(project: Project) -> None:
    with pytest.raises(EvaluationError, match="was never judged"):
        project.promote(new_model(project).id, "I like it")


def test_a_promoted_model_is_not_taken_back_by_the_gate(project: Project) -> None:
    model = new_model(project)
    first = project.judge(make_evidence(model))
    with pytest.raises(LoraTrainerError, match="is promoted and cannot become rejected"):
        project.judge(make_evidence(model, candidate_scores=LOW, champion_scores=HIGH))
    kept = project.find_judgement(model.id)
    assert kept is not None
    assert kept.verdict == first


def test_an_adapter_that_was_changed_is_not_judged(project: Project) -> None:
    model = new_model(project)
    (model.adapter_path / "adapter_model.safetensors").write_text("others")
    with pytest.raises(LoraTrainerError, match="is not what was recorded"):
        project.judge(make_evidence(model))
    assert project.find_judgement(model.id) is None


def test_a_damaged_verdict_is_named(project: Project) -> None:
    model = new_model(project)
    project.judge(make_evidence(model))
    (model.adapter_path / VERDICT_FILE).write_text('{"verdict": 1}')
    with pytest.raises(EvaluationError, match=f"the verdict of {model.id} cannot be read"):
        project.find_judgement(model.id)


def test_tasks_that_the_model_or_its_parent_has_trained_on_are_found(project: Project) -> None:
    ask = "please book a table for {} people near the old harbour at nine and send the bill to the office in {}"
    for number, (people, town) in enumerate([("two", "Bremen"), ("five", "Kiel"), ("nine", "Bonn")]):
        said = [{"role": "user", "content": ask.format(people, town)}, {"role": "assistant", "content": f"done {number}"}]
        tags = EpisodeMetadata(tags={"license": "own"})
        project.store.append(make_episode(task_id=f"booking-{number}", messages=said, metadata=tags))
    dataset = project.build(settings=DatasetSettings(held_out_fraction=0.0))
    samples = dataset.load_training()
    used = [sample.episode_id for sample in samples]
    assert len(samples) == 3
    parent = new_model(project, dataset=dataset.id, episode_ids=used)
    child = new_model(project, dataset=dataset.id, parent=parent.id, episode_ids=used)
    bare = new_model(project, episode_ids=used)
    tasks = {
        "booking-1": "another text",
        "again": ask.format("two", "Bremen"),
        "alike": ask.format("two", "Bremen") + " today",
        "new": "write a poem about the winter sea and its birds in the morning light",
    }
    expected = [("booking-1", "task_id"), ("again", "content"), ("alike", "near")]
    for model in (parent, child, bare):
        found = project.find_trained_tasks(model.id, tasks)
        assert found is not None
        assert [(one.held_out, one.by) for one in found] == expected
    project.forget([str(episode_id) for episode_id in used])
    forgotten = project.find_trained_tasks(child.id, tasks)
    assert forgotten is not None
    assert [(one.held_out, one.by) for one in forgotten] == expected[1:], "the dataset still has the texts, and no names"
    assert project.find_trained_tasks(bare.id, tasks) is None, "neither episodes nor a dataset: it cannot be told"
    verdict = project.judge(make_evidence(child, overlaps=project.find_trained_tasks(child.id, {"task-3": ask.format("two", "Bremen")})))
    assert verdict.decision == "reject"
    assert "task-3" in verdict.reason


def test_a_policy_is_kept_with_the_verdict(project: Project) -> None:
    model, policy = new_model(project), Policy(level=0.01, min_tasks=50)
    project.judge(make_evidence(model), policy)
    kept = project.find_judgement(model.id)
    assert kept is not None
    assert kept.policy == policy
