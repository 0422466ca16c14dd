"""`loraloop evaluations` as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluate.sides import make_project

from loraloop.evaluation import EvaluationOptions

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def evaluations(project: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loraloop", "evaluations", *arguments, "--project", str(project)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "260"}, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_evaluations_are_listed_and_shown(tmp_path: Path) -> None:
    project, _, [model] = make_project(tmp_path)
    assert "0 evaluations" in evaluations(project.directory, "list").stdout
    found = [project.evaluate(model.id, "base", EvaluationOptions(environment="evaluate.counting:CountingSuite", limit=n)) for n in (2, 3)]
    project.store.close()
    listed = evaluations(project.directory, "list").stdout
    assert listed.index(found[0].id) < listed.index(found[1].id)
    assert [json.loads(line)["id"] for line in evaluations(project.directory, "list", "--json").stdout.splitlines()] == [
        one.id for one in found
    ]
    page = tmp_path / "page.html"
    shown = evaluations(project.directory, "show", found[0].id[:-2], "--report", str(page)).stdout
    assert found[0].id in shown
    assert "counting: success" in shown
    assert found[0].id in page.read_text()
    assert json.loads(evaluations(project.directory, "show", "latest", "--json").stdout)["id"] == found[1].id
    none = evaluations(project.directory, "show", "eval-none", code=1).stderr
    assert "0 finished evaluations begin with 'eval-none'" in none
    assert found[1].id in none
