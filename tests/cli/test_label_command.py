"""`loraloop label` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loraloop.episode import Success, Timeout, Unknown
from loraloop.project import Project
from loraloop.testing import make_episode


def loraloop(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "loraloop", *arguments], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def one(tmp_path: Path) -> str:
    episode = make_episode(outcome=Unknown(), task_id="egg")
    with Project(tmp_path / "loraloop-project") as project:
        project.store.append(episode)
    return str(episode.id)


def test_an_episode_is_labelled_and_its_history_shown(tmp_path: Path, one: str) -> None:
    assert "unknown" in loraloop("label", one, "--success", "0.8", "--comment", "by hand", cwd=tmp_path).stdout.lower()
    labels = json.loads(loraloop("label", one, "--timeout", "--partial", "0.5", "--json", cwd=tmp_path).stdout)
    assert [label["outcome"]["kind"] for label in labels] == ["unknown", "success", "timeout"]
    shown = json.loads(loraloop("episodes", "show", one, "--json", cwd=tmp_path).stdout)
    assert shown["outcome"] == {"partial_score": 0.5, "kind": "timeout"}
    assert shown["labels"] == labels
    assert "by hand" in loraloop("episodes", "show", one, cwd=tmp_path).stdout
    with Project(tmp_path / "loraloop-project") as project:
        assert project.store.get(one).outcome == Timeout(0.5)
        assert project.store.get_labels(one)[1].outcome == Success(0.8)


def test_outcomes_from_a_file_are_counted_and_what_was_not_joined_is_told(tmp_path: Path, one: str) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"egg": True, "ham": False}))
    done = loraloop("label", "--from", "results.json", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["joined"] == json.loads(done.stdout)["unmatched"] == 1
    assert "not joined: results.json, 'ham'" in done.stderr
    (tmp_path / "results.json").write_text(json.dumps({"ham": False}))
    assert "1 verdicts: 0 joined" in loraloop("label", "--from", "results.json", cwd=tmp_path, code=1).stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give one of the two"),
        (["ID", "--from", "x.json"], "give one of the two"),
        (["ID"], "takes one of --success"),
        (["ID", "--success", "1", "--timeout"], "takes one of --success"),
        (["ID", "--failure", "x", "--partial", "1"], "takes one of --success"),
        (["ID", "--success", "nan"], "expected a finite number"),
        (["missing", "--success", "1"], "no episode 'missing'"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, one: str, arguments: list[str], says: str) -> None:
    given = [one if each == "ID" else each for each in arguments]
    assert says in loraloop("label", *given, cwd=tmp_path, code=1).stderr
