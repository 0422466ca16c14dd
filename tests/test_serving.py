"""Models meet the service while none runs: which may be served, and what is written down for the next start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models_made import save_model
from typer.testing import CliRunner

from loraloop.cli.main import app
from loraloop.errors import LoraTrainerError, ServingError
from loraloop.lora.model import TrainedModel
from loraloop.lora.states import ModelState
from loraloop.project import Project
from loraloop.serve.aliases import AliasFile, AliasTable, Served
from loraloop.serve.applier import Version


def save(project: Project, text: str, *states: str) -> TrainedModel:
    files = {"adapter_config.json": '{"r": 8}', "adapter_model.safetensors": text}
    model = save_model(project.directory / "models", files)
    for state in states:
        model = project.move_model(model.id, state, "on the way")
    return model


def to_version(model: TrainedModel) -> Version:
    assert model.adapter_sha256
    return Version.of_adapter(
        "agent", adapter_sha256=model.adapter_sha256, adapter_path=model.adapter_path.resolve(), model_id=model.id, base_sha256=None
    )


def test_only_promoted_models_are_served_or_others_for_a_reason_that_is_kept(tmp_path: Path) -> None:
    with Project(tmp_path) as project:
        file = AliasFile(tmp_path / "serving")
        for states in ([], ["held"], ["rejected"], ["promoted", "retired"]):
            model = save(project, str(states), *states)
            with pytest.raises(ServingError, match=f"{model.id} is {model.state}, and only promoted models are served; say `--override"):
                project.apply(model.id)
            assert not (tmp_path / "serving" / "aliases.json").exists()
        report = project.apply(model.id, override="to compare them")
        assert (report.kind, report.model_id, report.before) == ("wanted", model.id, None)
        assert file.read_history()[-1].why == "retired, served all the same: to compare them"
        good = save(project, "good", "promoted")
        report = project.apply(good.id[:-2])
        assert file.read().aliases["agent"].wanted == to_version(good)
        assert report.version == f"agent@{(good.adapter_sha256 or '')[:12]}"


def test_a_model_whose_files_have_changed_is_not_served(tmp_path: Path) -> None:
    with Project(tmp_path) as project:
        model = save(project, "good", "promoted")
        (model.adapter_path / "adapter_model.safetensors").write_text("other")
        with pytest.raises(LoraTrainerError, match=r"adapter_model\.safetensors differs from what was recorded"):
            project.apply(model.id)


def test_what_answers_is_not_deleted(tmp_path: Path) -> None:
    with Project(tmp_path) as project:
        live, wanted, neither = (save(project, text, "held") for text in "abc")
        file = AliasFile(tmp_path / "serving")
        file.write(AliasTable(aliases={"agent": Served(version=to_version(live), wanted=to_version(wanted))}))
        for model in (live, wanted):
            with pytest.raises(LoraTrainerError, match="the alias agent is served by it"):
                project.delete_model(model.id)
        project.delete_model(neither.id)


def test_a_rollback_without_a_service_is_written_down_and_promotes_again_what_was_retired(tmp_path: Path) -> None:
    with Project(tmp_path) as project:
        old, new = save(project, "old", "promoted", "retired"), save(project, "new", "promoted")
        file = AliasFile(tmp_path / "serving")
        with pytest.raises(ServingError, match="there is no alias 'agent'"):
            project.rollback()
        file.write(AliasTable(aliases={"agent": Served(version=to_version(new))}))
        with pytest.raises(ServingError, match="'agent' cannot go back to what answered before; it can to: nothing"):
            project.rollback()
        file.write(AliasTable(aliases={"agent": Served(version=to_version(new), previous=(to_version(old),))}))
        report = project.rollback(why="worse")
        assert (report.kind, report.model_id, report.before) == ("wanted", old.id, to_version(new).name)
        assert file.read().aliases["agent"].wanted == to_version(old)
        assert project.get_model(old.id).state is ModelState.PROMOTED


def test_orders_that_need_a_service_say_so(tmp_path: Path) -> None:
    with Project(tmp_path) as project:
        model = save(project, "good", "promoted")
        for order in (
            lambda: project.apply(model.id, canary=0.1),
            lambda: project.apply("base"),
            project.promote_canary,
        ):
            with pytest.raises(ServingError, match=r"no service runs|while a service runs"):
                order()


def test_the_commands_give_json_and_refuse_what_makes_no_sense(tmp_path: Path) -> None:
    run = CliRunner().invoke
    with Project(tmp_path) as project:
        model = save(project, "good", "promoted")
    at = ["--project", str(tmp_path)]
    done = run(app, ["apply", "latest", *at, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["model_id"] == model.id
    found = json.loads(run(app, ["serve", "status", *at, "--json"]).stdout)
    assert found["running"] is False
    assert found["aliases"]["agent"]["wanted"]["model_id"] == model.id
    assert model.id not in run(app, ["serve", "status", *at]).stdout, "nothing answers yet"
    for wrong in (["apply"], ["apply", "x", "--promote"], ["apply", "x", "--canary", "0%"], ["apply", "x", "--canary", "much"]):
        assert run(app, [*wrong, *at]).exit_code == 2
    assert run(app, ["apply", "latest", "--alias", "A B", *at]).exit_code == 2
