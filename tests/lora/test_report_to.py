"""Figures of a training reach the real services, once each, and no trouble of a service reaches the training.

What was written is read back by each package's own reader, in a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from standin import WRITE_ADAPTER, MakeTrainer, is_running, wait_until

from loraloop.errors import SettingsError
from loraloop.learn.conversation import ConversationLearn
from loraloop.lora.report_to import REPORTERS, Reporter, open_reporter
from loraloop.lora.report_to.figures import Figures
from loraloop.lora.report_to.messages import Message
from loraloop.training_record import TrainingEvent

RUN = "run-1790000000000-00000001"
SETTINGS = {"learning_rate": 2e-4, "rank": 16, "verify": False, "method": "dpo", "max_steps": None, "limit": float("inf")}
LINEAGE = {"dataset": "data-0123", "parent": None, "base_model": "path/to/model"}


def needs(name: str, *more: Any) -> Any:
    reason = f"{name} is not installed: pip install 'loraloop[{name}]'"
    return pytest.param(name, *more, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=reason))


every_service = pytest.mark.parametrize("name", [needs(name) for name in REPORTERS])


def step(number: int, **more: Any) -> TrainingEvent:
    return TrainingEvent(event="step", step=number, steps=5, loss=2.0 / number, learning_rate=2e-4, memory_mb=100 + number, **more)


def held_out(when: str, loss: float, number: int | None = None) -> TrainingEvent:
    return TrainingEvent(event="held_out", message=when, step=number, loss=loss, accuracy=0.5)


READERS = {
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util.tensor_util import make_ndarray
run = EventAccumulator(f"{folder}/{run_id}", size_guidance={"tensors": 0}).Reload()
ends = {0: "killed", 1: "finished", 2: "failed"}
for name in run.Tags()["tensors"]:
    if "/" in name and not name.startswith("_hparams_"):
        figures[name] = [(event.step, float(make_ndarray(event.tensor_proto))) for event in run.Tensors(name)]
content = {tag: plugin_data_pb2.HParamsPluginData.FromString(data) for tag, data in run.PluginTagToContent("hparams").items()}
for name, value in content["_hparams_/session_start_info"].session_start_info.hparams.items():
    settings[name] = getattr(value, value.WhichOneof("kind"))
state = ends[content["_hparams_/session_end_info"].session_end_info.status]
n_runs = len(list(__import__("pathlib").Path(folder).glob("run-*")))
""",
    "mlflow": """
import mlflow, os
client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder}/mlflow.db")
experiment = client.get_experiment_by_name("loraloop")
runs = client.search_runs([experiment.experiment_id])
[run] = [run for run in runs if run.info.run_name == run_id]
for name in run.data.metrics:
    figures[name] = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
settings = {**run.data.params, **run.data.tags}
state, n_runs = run.info.status.lower(), len(runs)
assert run.data.tags["loraloop.state"] in ("finished", "failed", "stopped", "interrupted"), run.data.tags
""",
    "trackio": """
import os
os.environ.setdefault("TRACKIO_DIR", folder)
import trackio
runs = list(trackio.Api().runs("loraloop"))
[run] = [run for run in runs if run.name == run_id]
names = [f"{group}/{name}" for group in ("train", "held_out") for name in ("loss", "learning_rate", "memory_mb", "accuracy", "margin")]
for name in names:
    rows = trackio.SQLiteStorage.get_metric_values("loraloop", run_id, name)
    if rows:
        figures[name] = [(row["step"], row["value"]) for row in rows]
settings, n_runs = run.config, len(runs)
ends = {"training finished": "finished", "training failed": "failed"}
state = ends.get(max(run.alerts(), key=lambda alert: alert["timestamp"])["title"], "killed")
""",
}


def read(name: str, folder: Path, run_id: str = RUN) -> dict[str, Any]:
    """What the service's own reader finds of the run: `figures` by name as (step, value), `settings`, `state`, `n_runs`."""
    code = "import json, sys\nfolder, run_id = sys.argv[1:]\nfigures, settings = {}, {}\n" + READERS[name]
    code += "\nprint('\\n' + json.dumps({'figures': figures, 'settings': settings, 'state': state, 'n_runs': n_runs}, default=str))"
    argv = [sys.executable, "-c", code, str(folder / name), run_id]
    done = subprocess.run(
        argv, capture_output=True, text=True, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["figures"] = {key: [(at, pytest.approx(value, rel=1e-6)) for at, value in values] for key, values in found["figures"].items()}
    return found


def report(name: str, folder: Path, said: list[str], run_id: str = RUN, **changed: Any) -> Reporter:
    return open_reporter(name, run_id=run_id, settings={**SETTINGS, **changed}, lineage=LINEAGE, folder=folder, say=said.append)


@pytest.fixture(autouse=True)
def only_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the user's own accounts and folders."""
    for variable in (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_EXPERIMENT_NAME",
        "TRACKIO_DIR",
        "TRACKIO_PROJECT",
        "TRACKIO_SPACE_ID",
        "TRACKIO_SERVER_URL",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


def test_figures_stand_at_the_step_of_their_event_and_measurements_where_they_were_made() -> None:
    figures = Figures({})
    events = [
        TrainingEvent(event="note", message="not a number"),
        held_out("before", 3.0),
        step(1, tokens_per_s=90.0),
        held_out("step", 2.5, 1),
        step(2, margin=0.25),
        held_out("after", 2.0),
    ]
    made = [(f.name, f.step, f.value) for event in events for f in figures.of(Message(at_ms=7, event=event))]
    assert [figure for figure in made if figure[0] == "held_out/loss"] == [
        ("held_out/loss", at, loss) for at, loss in ((0, 3.0), (1, 2.5), (2, 2.0))
    ]
    assert [figure for figure in made if figure[0] == "train/loss"] == [("train/loss", 1, 2.0), ("train/loss", 2, 1.0)]
    assert ("train/tokens_per_s", 1, 90.0) in made
    assert ("train/margin", 2, 0.25) in made
    assert len(made) == len(set(made)) == 2 * 3 + 2 * 3 + 2


def test_a_step_that_the_service_has_is_left_out_but_a_figure_that_it_lacks_is_not() -> None:
    figures = Figures({"train/loss": 2, "train/learning_rate": 1, "held_out/loss": 0})
    made = [(f.name, f.step) for event in (held_out("before", 3.0), step(2), step(3)) for f in figures.of(Message(at_ms=7, event=event))]
    assert made == [
        ("held_out/accuracy", 0),
        ("train/learning_rate", 2),
        ("train/memory_mb", 2),
        ("train/loss", 3),
        ("train/learning_rate", 3),
        ("train/memory_mb", 3),
    ]
    assert [f.step for f in Figures({"train/loss": 9}).of(Message(at_ms=7, event=held_out("after", 1.0)))] == [9, 9]


@pytest.mark.parametrize(("name", "near"), [("tensorbord", "Did you mean tensorboard?"), ("wandb", "known: trackio, mlflow, tensorboard.")])
def test_an_unknown_name_is_refused_with_those_that_are_known(name: str, near: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nothing named") as caught:
        open_reporter(name, run_id=RUN, settings={}, folder=tmp_path)
    assert str(caught.value).endswith(near)


@pytest.mark.parametrize("name", REPORTERS)
def test_a_missing_package_is_named_with_the_command_that_installs_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SettingsError, match=rf"{name} is not installed; say pip install 'loraloop\[{name}\]'"):
        open_reporter(name, run_id=RUN, settings={}, folder=tmp_path)
    monkeypatch.delitem(sys.modules, name)
    (tmp_path / name).mkdir()  # a folder of figures in the working directory is no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(SettingsError, match="is not installed"):
        open_reporter(name, run_id=RUN, settings={}, folder=tmp_path)


@pytest.mark.parametrize("run_id", ["", "..", "a/b", "a b", "ä"])
def test_a_run_id_that_is_no_file_name_is_refused(run_id: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="run_id="):
        open_reporter("tensorboard", run_id=run_id, settings={}, folder=tmp_path)


@every_service
def test_what_was_heard_is_in_the_service(name: str, tmp_path: Path) -> None:
    folder, said = tmp_path / "with a space", []
    reporter = report(name, folder, said, script="caf\udce9.py")
    for event in (held_out("before", 3.0), step(1), step(2, accuracy=0.75, margin=-0.5), held_out("after", 2.5)):
        reporter.hear(event)
    reporter.close("finished")
    assert said == []
    found = read(name, folder)
    assert found["figures"]["train/loss"] == [(1, 2.0), (2, 1.0)]
    assert found["figures"]["train/memory_mb"] == [(1, 101), (2, 102)]
    assert found["figures"]["train/learning_rate"] == [(1, 2e-4), (2, 2e-4)]
    assert found["figures"]["train/margin"] == [(2, -0.5)]
    assert found["figures"]["held_out/loss"] == [(0, 3.0), (2, 2.5)]
    assert found["figures"]["held_out/accuracy"] == [(0, 0.5), (2, 0.5)]
    assert (found["state"], found["n_runs"]) == ("finished", 1)
    texts = {key: str(value) for key, value in found["settings"].items()}
    wanted = {"rank": "16", "method": "dpo", "learning_rate": "0.0002", "verify": "False", "max_steps": "None", "limit": "inf"}
    if name == "tensorboard":
        wanted["rank"] = "16.0"  # it has one type of number
    assert wanted.items() <= texts.items()
    assert "caf" in texts["script"]
    assert texts["loraloop.dataset" if name == "mlflow" else "dataset"] == "data-0123"
    assert not any("parent" in key.lower() for key in texts if "mlflow." not in key)
    assert not (tmp_path / "home" / "trackio").exists()


@pytest.mark.parametrize("name", [needs("tensorboard")])
def test_a_training_is_reported_by_listening_to_its_events(name: str, tmp_path: Path, make_trainer: MakeTrainer) -> None:
    script = """
print(json.dumps({"event": "data", "message": "no figure"}))
print(json.dumps({"event": "held_out", "message": "cut off: \\ud83d", "loss": 3.0}))
print(json.dumps({"event": "step", "step": 1, "loss": float("nan"), "learning_rate": 0.5}))
print(json.dumps({"event": "step", "step": 2, "loss": 2.0}))
"""
    said: list[str] = []
    reporter = report(name, tmp_path, said)
    make_trainer(script + WRITE_ADAPTER).train_sync(ConversationLearn(), on_event=reporter.hear)
    reporter.close("finished")
    assert said == []
    assert read(name, tmp_path)["figures"] == {"held_out/loss": [(0, 3.0)], "train/learning_rate": [(1, 0.5)], "train/loss": [(2, 2.0)]}


DIES = """
import os, signal, sys
from pathlib import Path
from loraloop.lora.report_to import open_reporter
from loraloop.training_record import TrainingEvent
name, run_id, folder = sys.argv[1:]
reporter = open_reporter(name, run_id=run_id, settings={"rank": 16}, folder=Path(folder))
print(reporter._process.pid, flush=True)
reporter.hear(TrainingEvent(event="held_out", message="before", loss=3.0, accuracy=0.5))
for number in (1, 2, 3):
    reporter.hear(TrainingEvent(event="step", step=number, steps=5, loss=2.0 / number, learning_rate=2e-4, memory_mb=100 + number))
os.kill(os.getpid(), signal.SIGKILL)
"""


@every_service
def test_a_run_that_was_killed_is_interrupted_and_goes_on_as_the_same_run_when_resumed(name: str, tmp_path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", DIES, name, RUN, str(tmp_path)], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    said: list[str] = []
    reporter = report(name, tmp_path, said, rank=8)  # waits for the first one's end
    for event in (held_out("before", 3.0), step(2), step(3), step(4), held_out("after", 2.5)):
        reporter.hear(event)
    reporter.close("finished")
    assert not is_running(int(died.stdout)), "what reported the run that died has ended"
    assert said == []
    found = read(name, tmp_path)
    assert found["figures"]["train/loss"] == [(1, 2.0), (2, 1.0), (3, 2 / 3), (4, 0.5)]
    assert found["figures"]["held_out/loss"] == [(0, 3.0), (4, 2.5)]
    assert (found["state"], found["n_runs"]) == ("finished", 1)
    assert str(found["settings"]["resumed.rank" if name == "mlflow" else "rank"]) in ("8", "8.0")


@every_service
def test_without_a_word_at_the_end_a_run_is_interrupted(name: str, tmp_path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", DIES, name, RUN, str(tmp_path)], capture_output=True, text=True)
    wait_until(lambda: not is_running(int(died.stdout)), "what reported to end")
    found = read(name, tmp_path)
    assert found["figures"]["train/loss"] == [(1, 2.0), (2, 1.0), (3, 2 / 3)]
    assert found["state"] == "killed"


INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
from loraloop.lora.report_to import open_reporter
from loraloop.training_record import TrainingEvent
name, run_id, folder = sys.argv[1:]
reporter = open_reporter(name, run_id=run_id, settings={}, folder=Path(folder), say=lambda text: print(text))
try:
    reporter.hear(TrainingEvent(event="step", step=1, loss=2.0))
    time.sleep(0.3)
    os.killpg(0, signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    reporter.hear(TrainingEvent(event="step", step=2, loss=1.0))
    reporter.close("stopped")
"""


@pytest.mark.parametrize("name", [needs("tensorboard")])
def test_ctrl_c_is_for_the_training_which_then_says_how_it_ended(name: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", INTERRUPTED, name, RUN, str(tmp_path)]
    stopped = subprocess.run(argv, capture_output=True, text=True, start_new_session=True)  # a terminal's group of its own
    assert (stopped.stdout, stopped.stderr, stopped.returncode) == ("", "", 0)
    assert read(name, tmp_path)["figures"] == {"train/loss": [(1, 2.0), (2, 1.0)]}


@pytest.mark.parametrize("name", [needs("tensorboard")])
def test_a_step_that_a_dying_process_wrote_half_is_written_again(name: str, tmp_path: Path) -> None:
    said: list[str] = []
    for numbers in ((1, 2), (1, 2, 3)):
        reporter = report(name, tmp_path, said)
        for number in numbers:
            reporter.hear(TrainingEvent(event="step", step=number, loss=2.0 / number))
        reporter.close("interrupted")
        if numbers == (1, 2):
            assert read(name, tmp_path)["figures"] == {"train/loss": [(1, 2.0), (2, 1.0)]}
            [scalars] = [path for path in (tmp_path / name / RUN).iterdir() if path.suffix not in (".settings", ".end")]
            os.truncate(scalars, scalars.stat().st_size - 3)
    assert said == []
    assert read(name, tmp_path)["figures"] == {"train/loss": [(1, 2.0), (2, 1.0), (3, 2 / 3)]}


@every_service
def test_the_process_that_watches_a_training_loads_nothing_and_its_output_stays_its_own(name: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from loraloop.lora.report_to import open_reporter\n"
        f"reporter = open_reporter({name!r}, run_id={RUN!r}, settings={{}}, folder=Path({str(tmp_path)!r})); reporter.close('failed')\n"
        f"sys.exit(str([name for name in ('torch', *{REPORTERS!r}) if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "[]\n")
    assert read(name, tmp_path)["state"] == "failed"


@pytest.mark.parametrize("name", [needs("tensorboard")])
def test_a_service_that_fails_is_one_warning_and_the_training_goes_on(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / RUN).write_text("a file where the run's folder should be")
    said: list[str] = []
    reporter = report(name, tmp_path, said)
    wait_until(lambda: reporter.hear(step(1)) or bool(said), "the warning")
    reporter.hear(step(2))
    reporter.close("finished")
    [warning] = said
    assert "tensorboard has not got all of this run: " in warning
    assert "Error" in warning
    assert str(tmp_path / name / "logs" / f"{RUN}.log") in warning


@pytest.mark.parametrize("name", [needs("tensorboard")])
def test_a_folder_that_cannot_be_made_is_one_warning(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    reporter = report(name, tmp_path / "file", said)
    reporter.hear(step(1))
    reporter.close("finished")
    assert len(said) == 1
    assert "Not a directory" in said[0]


@pytest.mark.parametrize("name", [needs("tensorboard")])
def test_a_service_that_hangs_holds_up_neither_steps_nor_the_end(name: str, tmp_path: Path) -> None:
    (tmp_path / name / RUN).mkdir(parents=True)
    os.mkfifo(tmp_path / name / RUN / "events.out.tfevents.0")  # whoever reads it waits
    said: list[str] = []
    reporter = report(name, tmp_path, said)
    pid = reporter._process.pid
    started = time.monotonic()
    for number in range(1, 2001):
        reporter.hear(step(number))
    reporter.close("finished", max_seconds=1.0)
    assert time.monotonic() - started < 5
    assert len(said) == 1
    assert "it had not taken everything 1 s after the end" in said[0]
    assert not is_running(pid)


@pytest.mark.parametrize("name", [needs("tensorboard")])
def test_a_reporting_process_that_takes_nothing_is_given_up_before_memory_fills(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraloop.lora.report_to.reporter.MAX_BEHIND", 100_000)
    said: list[str] = []
    reporter = report(name, tmp_path, said)
    pid = reporter._process.pid
    os.kill(pid, signal.SIGSTOP)
    for number in range(1, 5001):
        reporter.hear(step(number))
    assert len(said) == 1
    assert "it takes no events" in said[0]
    assert not is_running(pid)
    assert len(reporter._waiting) == 0


@pytest.mark.parametrize("name", [needs("trackio")])
def test_what_trackio_could_not_write_is_one_warning_at_the_end(name: str, tmp_path: Path) -> None:
    said: list[str] = []
    reporter = report(name, tmp_path, said)
    store = tmp_path / name / "loraloop.db"
    wait_until(lambda: n_rows(store) > 0, "trackio's first row")
    for path in store.parent.glob("loraloop.db*"):
        path.unlink()
    store.mkdir()
    reporter.hear(step(1))
    reporter.close("finished")
    [warning] = said
    assert "trackio has not got all of this run: RuntimeError: trackio failed to flush" in warning


@pytest.mark.parametrize("name", [needs("mlflow")])
def test_a_server_that_cannot_be_reached_is_one_warning(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening: connections are refused
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        said: list[str] = []
        reporter = report(name, tmp_path, said)
        reporter.hear(step(1))
        reporter.close("finished")
    [warning] = said
    assert "mlflow has not got all of this run: " in warning
    assert "refused" in warning


@pytest.mark.parametrize(("name", "variable"), [needs("mlflow", "MLFLOW_TRACKING_URI"), needs("trackio", "TRACKIO_DIR")])
def test_where_the_users_environment_leads_is_where_it_goes(
    name: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv(variable, f"sqlite:///{elsewhere}/own.db" if name == "mlflow" else str(elsewhere))
    said: list[str] = []
    reporter = report(name, tmp_path / "here", said)
    reporter.hear(step(1))
    reporter.close("finished")
    assert said == []
    assert read(name, tmp_path / "nowhere")["figures"]["train/loss"] == [(1, 2.0)]
    assert [path.name for path in (tmp_path / "here" / name).iterdir()] == ["logs"]


def n_rows(store: Path) -> int:
    """How many rows trackio has written; 0 while it makes its store."""
    if not store.exists():
        return 0
    with contextlib.closing(sqlite3.connect(store)) as connection, contextlib.suppress(sqlite3.OperationalError):
        return int(connection.execute("SELECT count(*) FROM metrics").fetchone()[0])
    return 0
