"""A project: which dataset is meant, and files that are no episodes among those that are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from models_made import save_model

from loraloop.dataset import MANIFEST_FILE, TRAIN_FILE, DatasetSettings
from loraloop.episode import EpisodeMetadata
from loraloop.errors import DatasetError, ImportFailed, LoraTrainerError, StoreError
from loraloop.lora.model import LoraModelId
from loraloop.lora.runs import Run, RunPlan
from loraloop.project import Project
from loraloop.testing import make_episode

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "%s"}]}\n'


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """A project with ten solved tasks."""
    with Project(tmp_path / "project") as opened:
        for number in range(10):
            said = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]
            opened.store.append(make_episode(task_id=str(number), messages=said, metadata=EpisodeMetadata(tags={"license": "own"})))
        yield opened


def more(fraction: float = 0.6) -> DatasetSettings:
    """Another dataset of the same episodes."""
    return DatasetSettings(held_out_fraction=fraction)


def backdate(project: Project, seconds: float) -> None:
    """Make all that is built so far look older than a clock's resolution."""
    for manifest in (project.directory / "datasets").glob(f"*/{MANIFEST_FILE}"):
        before = manifest.stat().st_mtime - seconds
        os.utime(manifest, (before, before))


def test_what_was_built_last_is_trained_on_even_when_it_was_there_before(project: Project) -> None:
    first = project.build(settings=more(0.0))
    backdate(project, 10)
    second = project.build(settings=more())
    assert first.id != second.id
    assert project.get_dataset() == second
    backdate(project, 10)
    assert project.build(settings=more()) == second
    third = project.build(settings=more(0.0))
    assert project.get_dataset() == third
    assert third.id != first.id, "what the second held out stays held out"
    assert third.manifest.held_out == second.manifest.held_out
    assert project.list_datasets()[-1] == third


def test_a_damaged_dataset_stops_only_what_needs_it(project: Project) -> None:
    damaged = project.build()
    (damaged.path / TRAIN_FILE).write_text("")
    good = project.build(settings=more())
    assert project.get_dataset(good.id) == good
    with pytest.raises(DatasetError, match=rf"remove .*{damaged.id} and build the dataset again"):
        project.get_dataset(damaged.id)


def test_an_id_may_be_cut_short_while_it_means_one_dataset(project: Project) -> None:
    with pytest.raises(DatasetError, match="make one with `loraloop build`"):
        project.get_dataset()
    with pytest.raises(DatasetError, match="0 datasets begin with 'x'; known: none; make one with `loraloop build`"):
        project.get_dataset("x")
    first, second = project.build(), project.build(settings=more())
    assert project.get_dataset(first.id[:20]) == first
    with pytest.raises(DatasetError, match=rf"2 datasets begin with ''; known: .*{second.id}"):
        project.get_dataset("")


def test_a_file_that_is_no_episodes_costs_none_of_the_others(project: Project, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "a.jsonl").write_text(CHAT % "first")
    (runs / "b.json").write_text('{"some": "settings"}')
    (runs / "c.json").write_text('[{"task_id": 1, "reward": 1, "traj": [')  # a run that is still written
    (runs / "d.jsonl").write_text(CHAT % "last")
    reports = list(project.ingest([runs]))
    assert [(Path(report.path).name, report.stored, report.refused) for report in reports] == [
        ("a.jsonl", 1, {}),
        ("b.json", 0, {"unreadable_file": 1}),
        ("c.json", 0, {"unreadable_file": 1}),
        ("d.jsonl", 1, {}),
    ]
    for report in reports:
        assert report.read == report.stored + report.duplicates + sum(report.refused.values())
    assert "b.json: no known format fits" in reports[1].refusals[0].detail
    assert "check that the file is complete" in reports[2].refusals[0].detail


def test_a_file_that_is_no_episodes_and_is_the_only_one_is_an_error(project: Project, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text('{"some": "settings"}')
    with pytest.raises(ImportFailed, match="no known format fits"):
        list(project.ingest([tmp_path / "b.json"]))


# --- models -----------------------------------------------------------------------------------------------------------------


def plan_of(run_id: LoraModelId, parent: LoraModelId | None = None) -> RunPlan:
    told = {"learn_model": "conversation", "method": "sft", "dataset": None, "config": {}, "options": {}}
    made_from = {"data_sha256": "", "held_out_sha256": None, "sample_count": 1, "episode_ids": ()}
    return RunPlan.model_validate({"id": run_id, "created_at": 1, "parent": parent, **told, **made_from})


def begin(project: Project, plan: RunPlan) -> Run:
    run = project.runs.of(plan)
    run.path.mkdir(parents=True)
    run.tell_plan(plan)
    return run


@pytest.mark.parametrize("state", ["running", "stopped", "interrupted"])
def test_a_model_that_an_unfinished_run_continues_from_is_not_deleted(project: Project, state: str) -> None:
    model, other = save_model(project.directory / "models"), save_model(project.directory / "models")
    run = begin(project, plan_of(LoraModelId.new(), parent=model.id))
    run.lease.acquire("this test")
    run.move("running")
    if state == "stopped":
        run.move("stopped")
    if state == "interrupted":
        (run.path / "lease.json").unlink()
    with pytest.raises(LoraTrainerError, match=f"{model.id} is not deleted: the run {run.id}, which is {state}, continues from it"):
        project.delete_model(model.id)
    assert project.delete_model(other.id) == other.id
    assert project.list_models() == [model]


def test_a_run_with_a_damaged_file_hides_no_other(project: Project) -> None:
    for number, name in enumerate(("run.json", "state.json", "lease.json")):
        run = begin(project, plan_of(model_id := LoraModelId.new()))
        run.move("running")
        (run.path / name).write_text("{")
        assert [one.id for one in project.runs.list_runs()][-1:] == ([] if number == 0 else [model_id])
    assert [one.status.state for one in project.runs.list_runs()] == ["interrupted", "interrupted"]
    (trouble,) = project.runs.list_damaged()
    assert "run.json cannot be read" in trouble


def test_a_model_that_a_finished_run_continued_from_is_kept_by_its_child_alone(project: Project) -> None:
    model = save_model(project.directory / "models")
    child = save_model(project.directory / "models", parent=model.id)
    with pytest.raises(LoraTrainerError, match=f"{child.id} went on from it"):
        project.delete_model(model.id)
    assert project.delete_model(child.id) == child.id
    assert project.delete_model(model.id) == model.id


def test_opening_a_project_sweeps_what_a_deletion_that_was_cut_off_left(project: Project) -> None:
    models = project.directory / "models"
    kept, left = save_model(models), save_model(models)
    left.adapter_path.rename(models / f".{left.id}.deleted")
    with Project(project.directory) as opened:
        assert opened.list_models() == [kept]
        assert [entry.name for entry in models.iterdir()] == [kept.id]


def test_a_model_is_moved_by_its_state_and_a_reason(project: Project) -> None:
    model = save_model(project.directory / "models")
    assert project.move_model("latest", "held", "few goals").state == project.get_model(model.id).state == "held"
    with pytest.raises(LoraTrainerError, match="is held and cannot become candidate"):
        project.move_model("latest", "candidate", "once more")


def test_a_projects_episodes_may_be_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, url = tmp_path / "project", f"sqlite:///{tmp_path / 'elsewhere.db'}"
    episode = make_episode()
    with pytest.raises(StoreError, match="no project in"):
        Project(directory, store_url=url, create=False)
    with Project(directory, store_url=url) as project:
        project.store.append(episode)
    monkeypatch.setenv("LORALOOP_STORE_URL", url)
    with Project(directory, create=False) as project:
        assert project.store.get(episode.id) == episode
    assert not (directory / "episodes.db").exists()
