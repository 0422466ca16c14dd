"""The settings of a project: which value counts, where it comes from, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_model

from loraloop.errors import SettingsError
from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.project import Project
from loraloop.settings import SECTIONS, Setting, Settings, fields_of, load_settings


def write(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "loraloop.toml").write_text(text)
    return folder


def find(settings: Settings, section: str, name: str) -> Setting:
    [found] = [one for one in settings if (one.section, one.name) == (section, name)]
    return found


def test_without_file_and_environment_everything_is_the_default_of_its_declaration(tmp_path: Path) -> None:
    settings = load_settings(tmp_path, {})
    assert {one.origin for one in settings} == {"default"}
    assert settings.trainer_settings() == (LoraTrainerConfig(), TrainOptions())
    assert [one.alias for one in settings.scenarios] == ["agent"]


def test_the_environment_goes_before_the_file_and_that_before_the_default(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", "[train]\nlora_rank = 8\nepochs = 2\nreport_to = ['tensorboard']\n")
    settings = load_settings(folder, {"LORALOOP_TRAIN_EPOCHS": "7", "LORALOOP_TRAIN_LEARNING_RATE": "1e-3", "HOME": "/"})
    origins = {name: find(settings, "train", name).origin for name in ("lora_rank", "epochs", "learning_rate", "batch_size")}
    assert origins == {
        "lora_rank": str(folder / "loraloop.toml"),
        "epochs": "LORALOOP_TRAIN_EPOCHS",
        "learning_rate": "LORALOOP_TRAIN_LEARNING_RATE",
        "batch_size": "default",
    }
    config, options = settings.trainer_settings()
    assert (config.lora_rank, config.epochs, config.learning_rate, options.report_to) == (8, 7, 1e-3, ("tensorboard",))


def test_a_list_and_a_switch_in_the_environment(tmp_path: Path) -> None:
    _, options = load_settings(
        tmp_path, {"LORALOOP_TRAIN_REPORT_TO": "tensorboard,tensorboard", "LORALOOP_TRAIN_VERIFY": "true"}
    ).trainer_settings()
    assert (options.report_to, options.verify) == (("tensorboard", "tensorboard"), True)


def test_a_scenario_has_settings_of_its_own_and_its_training_waits_for_the_device(tmp_path: Path) -> None:
    folder = write(tmp_path, "[train]\nepochs = 2\n[[watch.scenario]]\nalias = 'cook'\ntrain = {epochs = 5}\nbuild = {max_per_task = 3}\n")
    settings = load_settings(folder, {})
    [scenario] = settings.scenarios
    config, options = settings.trainer_settings(scenario)
    assert (config.epochs, options.wait) == (5, True)
    assert settings.dataset_settings(scenario).max_per_task == 3
    assert (settings.trainer_settings()[0].epochs, settings.dataset_settings().max_per_task) == (2, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[trian]\nepochs = 2", r"there is no section \[trian\]; known: store, build, train, serve, watch\. Did you mean train\?"),
        ("[train]\nlora_rnak = 2", r"\[train\] has no setting 'lora_rnak'; .* Did you mean lora_rank\?"),
        ("[train]\noutput_dir = 'x'", r"\[train\] has no setting 'output_dir'"),
        ("[train]\nepochs = 'many'", r"epochs='many': Input should be a valid integer"),
        ("[train]\nepochs = true", r"epochs=True: Input should be a valid integer"),
        ("[train]\nepochs = 2020-01-01", r"expected a text, a number, true, false or a list"),
        ("[train]\nlearning_rate = 2", r"learning_rate=2.0: expected a finite number > 0 and < 1"),
        ("[build]\nheld_out_fraction = 1.0", r"held_out_fraction=1.0: expected 0 <= share < 1"),
        ("[watch]\ninterval_seconds = 0", r"interval_seconds=0: Input should be greater than 0"),
        ("[[watch.scenario]]\nsorces = ['a']", r"there is no setting 'sorces'; .* Did you mean sources\?"),
        ("[[watch.scenario]]\nalias = '../x'", r"scenario \(0\.alias\)='\.\./x'"),
        ("[[watch.scenario]]\n[[watch.scenario]]", r"two scenarios have the alias 'agent'"),
        ("[[watch.scenario]]\ntrain = {epoch = 1}", r"the scenario 'agent', train has no setting 'epoch'; .* Did you mean epochs\?"),
        ("[[watch.scenario]]\ntrain = {epochs = 0}", r"the scenario 'agent': epochs=0: expected a whole number >= 1"),
        ("train = 3", r"write \[train\] and its settings below"),
        ("[train\n", r"loraloop\.toml cannot be read as TOML"),
    ],
)
def test_what_cannot_be_is_named_with_the_way_out(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        load_settings(write(tmp_path, text), {})
    assert "loraloop.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("LORALOOP_TRAIN_EPOCH", "2", r"the environment has LORALOOP_TRAIN_EPOCH, .* Did you mean LORALOOP_TRAIN_EPOCHS\?"),
        ("LORALOOP_TRAIN_EPOCHS", "many", r"LORALOOP_TRAIN_EPOCHS: epochs='many'"),
        ("LORALOOP_TRAIN_EPOCHS", "0", r"LORALOOP_TRAIN_EPOCHS: epochs=0: expected a whole number >= 1"),
    ],
)
def test_a_variable_that_cannot_be_is_named(tmp_path: Path, name: str, value: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load_settings(tmp_path, {name: value})


def test_a_name_is_unique_within_its_section() -> None:
    for section, owners in SECTIONS.items():
        names = [name for owner in owners for name in fields_of(owner)]
        assert len(names) == len(set(names)), section


def test_the_store_may_be_named_by_the_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", f"[store]\nurl = 'sqlite:///{tmp_path}/elsewhere.db'\n")
    with Project(folder) as project:
        assert project.store.path == tmp_path / "elsewhere.db"
    with Project(folder, store_url=f"sqlite:///{tmp_path}/third.db") as project:
        assert project.store.path == tmp_path / "third.db"


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "loraloop", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_what_is_typed_goes_before_the_settings_of_the_project(tmp_path: Path) -> None:
    """Told by the errors of options that cannot be, as they name the value that counted."""
    folder = write(tmp_path / "p", "[train]\nlora_rank = 3\n[build]\nsecrets = 'allow'\n")
    with Project(folder):
        pass
    assert "base='x'" not in run("train", "-p", str(folder), "--rank", "0", code=1).stderr
    assert "lora_rank=0" in run("train", "-p", str(folder), "--rank", "0", code=1).stderr
    assert "secrets='x'" in run("build", "-p", str(folder), "--secrets", "x", code=1).stderr
    shown = [json.loads(line) for line in run("settings", "show", "-p", str(folder), "--json").stdout.splitlines()]
    [rank] = [one for one in shown if one["name"] == "lora_rank"]
    assert rank == {"section": "train", "name": "lora_rank", "value": 3, "origin": str(folder / "loraloop.toml")}


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", "[store]\nurl = 'postgresql+psycopg://me:hunter2@127.0.0.1/db'\n")
    shown = run("settings", "show", "-p", str(folder), "--json")
    assert "me:***@127.0.0.1" in shown.stdout
    assert "hunter2" not in shown.stdout


def test_what_is_served_may_be_set(tmp_path: Path) -> None:
    """An option that the applier lacks is named before anything is served, so what counted is seen there."""
    model = make_model("llama", tmp_path / "llama")
    text = f"[serve]\nbase = '{model}'\ndrain_seconds = 3.0\noptions = {{ n_threads = '2', colour = 'red' }}\n"
    folder = write(tmp_path / "p", text)
    found = load_settings(folder, {"LORALOOP_SERVE_PORT": "8123"}).service_settings
    assert (found.base, found.port, found.drain_seconds, found.options["n_threads"]) == (str(model), 8123, 3.0, "2")
    assert load_settings(folder, {"LORALOOP_SERVE_OPTIONS": '{"n_ctx": "64"}'}).service_settings.options == {"n_ctx": "64"}
    assert "colour=red" in run("serve", "-p", str(folder), code=1).stderr
    assert "colour" not in run("serve", "-p", str(folder), "--option", "n_threads=many", code=1).stderr
    assert "base of [serve]" in run("serve", "-p", str(tmp_path / "none"), code=2).stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port = 99999", r"port=99999: expected 0 for any that is free, or a port up to 65535"),
        ("drain_seconds = -1.0", r"drain_seconds=-1\.0: expected 0 or more seconds"),
        ("token = 'x'", r"\[serve\] has no setting 'token'"),
        ("options = { n_ctx = 5 }", r"options \(n_ctx\)=5"),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load_settings(write(tmp_path, f"[serve]\n{text}\n"), {})
