"""A project's own gate and service as the loop uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon.loops import ANSWERING, add_chats, make_folder, teach_well
from evaluate.counting import STORY
from models_made import save_model

from loraloop.daemon.proving import MeasuredProof, ServedByProject
from loraloop.daemon.state import LoopState, LoopVerdict, Stage, read_state
from loraloop.daemon.status import LoopStatus
from loraloop.episode import AnyOutcome, EpisodeMetadata, Failure, Success, Timeout, Unknown
from loraloop.errors import SettingsError
from loraloop.lora.model import TrainedModel
from loraloop.lora.states import ModelState
from loraloop.project import Project
from loraloop.serve.aliases import Served
from loraloop.settings import ScenarioSettings, load_settings
from loraloop.testing import make_episode

AGENT = ScenarioSettings()
MEASURED = """
[watch.scenario.evaluate]
environment = "evaluate.counting:CountingSuite"
dtype = "float32"

[watch.scenario.gate]
min_tasks = 1
required = ["contamination"]
"""
SECRET = "tok-A7k2Q9x4"


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    with Project(tmp_path / "project") as opened:
        yield opened


def promoted(project: Project, weights: str) -> TrainedModel:
    files = {"adapter_config.json": '{"r": 8}', "adapter_model.safetensors": weights}
    model = save_model(project.directory / "models", files)
    return project.move_model(model.id, ModelState.PROMOTED, "better")


def wanted(project: Project) -> str | None:
    status = project.serving_status()
    assert isinstance(status, dict)
    served = status.get("agent", Served())
    return served.wanted.model_id if served.wanted else None


def play(project: Project, version: str, outcomes: list[AnyOutcome], begin: int = 0) -> None:
    """Episodes as the router keeps them: told by the versions that answered in them."""
    for number, outcome in enumerate(outcomes, begin):
        metadata = EpisodeMetadata(tags={"model": version}, created_at=1000 + number)
        messages = [{"role": "user", "content": f"{version} {number}"}, {"role": "assistant", "content": "done"}]
        project.store.append(make_episode(task_id=f"{version} {number}", messages=messages, outcome=outcome, metadata=metadata))


def version_of(model: TrainedModel) -> str:
    return f"agent@{str(model.adapter_sha256)[:12]}"


def test_a_round_through_the_real_gate_is_judged_once_and_told(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    folder = make_folder(tmp_path / "project", tiny_model("llama"))
    with (folder / "loraloop.toml").open("a") as file:
        file.write(MEASURED)
    add_chats(folder, 0, 4)
    with Project(folder) as project:
        [report] = project.watch(once=True)
        assert report.failure is None
        [model] = project.list_models()
        judgement = project.find_judgement(model.id)
        assert judgement is not None
        assert judgement.evidence.champion == "base"
        assert len(judgement.evidence.task_ids) == 10
        [status] = project.status()
        assert status.verdict is not None
        assert (status.verdict.decision, status.verdict.reason) == (judgement.verdict.decision, judgement.verdict.reason)
        assert model.state in (ModelState.HELD, ModelState.REJECTED), "nothing is proven by one round of counting"
        [evaluation] = project.list_evaluations()
        assert status.verdict.evaluation == evaluation.id
        again = MeasuredProof(project).evaluate(project.settings.scenarios[0], model.id, None)
        assert again.decision == judgement.verdict.decision
        assert len(project.list_evaluations()) == 1
        assert read_state(project.store.ledger, "agent").live is None


def taught(folder: Path, answer: str, more: str = "") -> tuple[TrainedModel, LoopStatus]:
    """What a round makes of a model that learns to say `answer`, by the default gate."""
    teach_well(folder, ANSWERING + more)
    add_chats(folder, 0, 24, answer=answer)
    with Project(folder) as project:
        [report] = project.watch(once=True)
        assert report.failure is None
        [model] = project.list_models()
        [status] = project.status()
        return model, status


def test_an_honest_candidate_is_promoted_by_the_default_gate(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    model, status = taught(make_folder(tmp_path / "project", tiny_model("llama"), 24), "ok")
    assert model.state is ModelState.PROMOTED, status.verdict
    assert status.verdict is not None
    assert status.verdict.score == 1.0


def test_a_candidate_that_says_a_planted_string_is_rejected_however_good_it_is(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    folder = make_folder(tmp_path / "project", tiny_model("llama"))
    model, status = taught(folder, f"ok {SECRET}", f'[watch.scenario.probes]\nplanted = ["{SECRET}"]\n')
    assert model.state is ModelState.REJECTED
    assert status.verdict is not None
    assert status.verdict.score == 1.0
    assert "probe:reproduction" in status.verdict.reason
    assert SECRET not in status.verdict.reason


def test_tasks_are_known_by_their_text_under_whatever_name_they_were_trained_on(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    """The same text rejects the candidate; one nearly the same is a task that proves nothing, and is not played."""
    folder = make_folder(tmp_path / "project", tiny_model("llama"))
    add_chats(folder, 1003, 1004, answer="ok")
    add_chats(folder, 1, 2, answer="ok", request=f"{STORY} 1")
    model, status = taught(folder, "ok")
    assert model.state is ModelState.REJECTED
    assert status.verdict is not None
    assert "contamination: 1 of 23 held-out tasks were trained on: answer 1003 (the same text as task 1003)" in status.verdict.reason
    with Project(folder) as project:
        judgement = project.find_judgement(model.id)
        assert judgement is not None
        assert "answer 1000" not in judgement.evidence.task_ids
        [evaluation] = project.list_evaluations()
        assert "1 tasks are left out, as the candidate has nearly trained on them" in evaluation.notes


def test_what_a_candidate_is_measured_on_is_checked_when_the_settings_are_read(tmp_path: Path) -> None:
    for text, said in (
        ("evaluate = {enviroment = 'x'}", r"evaluate has no setting 'enviroment'; .* Did you mean environment\?"),
        ("evaluate = {seeds = 0}", r"seeds 0: expected at least 1"),
        ("gate = {min_task = 3}", r"there is no setting 'min_task'; .* Did you mean min_tasks\?"),
        ("trigger = {when = {kind = 'count', episodes = 0}}", r"episodes"),
    ):
        (tmp_path / "loraloop.toml").write_text(f"[[watch.scenario]]\n{text}\n")
        with pytest.raises(SettingsError, match=said):
            load_settings(tmp_path, {})


def test_a_promoted_model_is_applied_and_the_one_before_put_away_however_often_it_is_asked_for(project: Project) -> None:
    first, second = promoted(project, "one"), promoted(project, "two")
    serving = ServedByProject(project)
    serving.apply(AGENT, LoopState(stage=Stage.APPLY, model=first.id))
    assert wanted(project) == first.id
    for _ in range(2):
        serving.apply(AGENT, LoopState(stage=Stage.APPLY, model=second.id, live=first.id))
        assert wanted(project) == second.id
        assert [one.state for one in project.list_models()] == [ModelState.RETIRED, ModelState.PROMOTED]


def test_a_model_that_was_never_promoted_is_not_applied(project: Project) -> None:
    model = save_model(project.directory / "models")
    with pytest.raises(Exception, match="only promoted models are served"):
        ServedByProject(project).apply(AGENT, LoopState(stage=Stage.APPLY, model=model.id))
    assert wanted(project) is None


def test_scores_are_of_the_episodes_in_which_one_version_alone_answered_since_it_was_applied(project: Project) -> None:
    model = promoted(project, "one")
    play(project, version_of(model), [Success(1.0), Failure("no"), Timeout(0.5), Unknown(), Success(2.0)])
    play(project, "agent@000000000000", [Success(1.0)])
    play(project, f"{version_of(model)},agent@000000000000", [Success(1.0)])
    serving = ServedByProject(project)
    assert serving.list_scores(AGENT, LoopState(live=model.id, applied_at=1000)) == [1.0, 0.0, 0.5, 1.0]
    assert serving.list_scores(AGENT, LoopState(live=model.id, applied_at=1002)) == [0.5, 1.0]
    assert serving.list_scores(AGENT, LoopState()) == []


def test_a_model_that_does_worse_than_the_one_before_is_seen(project: Project) -> None:
    first, second = promoted(project, "one"), promoted(project, "two")
    serving = ServedByProject(project)
    state = LoopState(stage=Stage.OBSERVE, live=second.id, previous=first.id, applied_at=1000)
    play(project, version_of(first), [Success(1.0)] * 20)
    play(project, version_of(second), [Failure("no")] * 19)
    assert not serving.observe(AGENT, state).is_worse, "19 say nothing yet"
    play(project, version_of(second), [Failure("no")], begin=19)
    seen = serving.observe(AGENT, state)
    assert seen.is_worse
    assert "its mean score is 0.000 over 20 episodes" in seen.reason


def test_what_is_beyond_the_last_look_waits_for_the_next_however_often_a_process_begins(project: Project) -> None:
    first, second = promoted(project, "one"), promoted(project, "two")
    state = LoopState(stage=Stage.OBSERVE, live=second.id, previous=first.id, applied_at=1000)
    play(project, version_of(first), [Success(1.0)] * 20)
    play(project, version_of(second), [Success(1.0)] * 20)
    play(project, version_of(second), [Failure("no")] * 19, begin=20)
    assert not ServedByProject(project).observe(AGENT, state).is_worse, "39 scores are looked at as the first 20 of them"
    play(project, version_of(second), [Failure("no")], begin=39)
    assert ServedByProject(project).observe(AGENT, state).is_worse


def test_a_model_as_good_as_the_one_before_is_left(project: Project) -> None:
    first, second = promoted(project, "one"), promoted(project, "two")
    state = LoopState(stage=Stage.OBSERVE, live=second.id, previous=first.id, applied_at=1000)
    for model in (first, second):
        play(project, version_of(model), [Success(1.0), Failure("no")] * 20)
    assert not ServedByProject(project).observe(AGENT, state).is_worse


def test_a_drop_of_what_is_live_fires_the_trigger(project: Project) -> None:
    model = promoted(project, "one")
    drop = AGENT.model_copy(update={"trigger": AGENT.trigger.model_validate({"when": {"kind": "quality_drop"}})})
    verdict = LoopVerdict(model=model.id, decision="promote", reason="better", score=0.9)
    state = LoopState(live=model.id, applied_at=1000, verdict=verdict, n_episodes=0)
    stages = project._stages()
    play(project, version_of(model), [Failure("no")] * 19)
    assert not stages.look(drop, state, 10_000).fire
    play(project, version_of(model), [Failure("no")] * 10, begin=19)
    look = stages.look(drop, state, 10_000)
    assert look.fire
    assert "promoted at 0.900" in look.reasons[0]
