"""`loraloop promote` as a user types it, on a model that the gate has held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from models_made import save_model

from loraloop.evaluate.gate import Evidence
from loraloop.project import Project


def loraloop(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "loraloop", *arguments], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def held(tmp_path: Path) -> str:
    with Project(tmp_path / "loraloop-project") as project:
        model = save_model(project.directory / "models")
        scores = (1.0, 0.0) * 10
        names = tuple(map(str, range(20)))
        evidence = Evidence(candidate=model.id, champion="base", task_ids=names, candidate_scores=scores, champion_scores=scores)
        project.judge(evidence)
    return str(model.id)


def test_a_held_model_is_promoted_for_a_reason_which_is_shown(tmp_path: Path, held: str) -> None:
    assert "contamination: hold: nobody has looked" in loraloop("models", "show", held, cwd=tmp_path).stdout
    said = loraloop("promote", held, "--override", "for the fair", cwd=tmp_path).stdout
    assert "is promoted; promote instead of hold, because a person says: for the fair" in said
    shown = json.loads(loraloop("models", "show", held, "--json", cwd=tmp_path).stdout)
    assert shown["state"] == "promoted"
    assert shown["judgement"]["verdict"]["overridden"] == {"instead_of": "hold", "reason": "for the fair"}
    assert shown["history"][-1]["reason"].endswith("for the fair")


def test_without_a_reason_or_a_verdict_nothing_is_promoted(tmp_path: Path, held: str) -> None:
    assert "--override" in loraloop("promote", held, cwd=tmp_path, code=2).stderr
    assert "for no reason" in loraloop("promote", held, "--override", " ", cwd=tmp_path, code=1).stderr
    unjudged = save_model(tmp_path / "loraloop-project" / "models")
    assert "was never judged" in loraloop("promote", unjudged.id, "--override", "why not", cwd=tmp_path, code=1).stderr
    shown = json.loads(loraloop("models", "show", unjudged.id, "--json", cwd=tmp_path).stdout)
    assert (shown["state"], shown["judgement"]) == ("candidate", None)
