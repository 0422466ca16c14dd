"""`loraloop doctor`: what this machine has, and what is in the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from loraloop.project import Project
from loraloop.testing import make_episode


def examine(*arguments: str, cwd: Path, code: int = 0, **environment: str) -> dict[str, dict[str, object]]:
    command = [sys.executable, "-m", "loraloop", "doctor", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


def test_everything_is_told_and_a_project_that_is_not_there_yet_is_no_problem(tmp_path: Path) -> None:
    found = examine(cwd=tmp_path)
    assert found["torch"]["value"] == version("torch")
    assert {"device", "kernels", "memory", "sqlite", "store", "training now", "psycopg"} <= found.keys()
    assert str(found["store"]["value"]).startswith("none yet")
    assert not any(one["is_problem"] for one in found.values())


def test_a_store_that_cannot_be_opened_is_a_problem(tmp_path: Path) -> None:
    with Project(tmp_path / "loraloop-project") as project:
        project.store.append(make_episode())
    assert str(examine(cwd=tmp_path)["store"]["value"]).endswith("1 episodes")
    nowhere = "postgresql+psycopg://nobody@127.0.0.1:1/x"
    found = examine(cwd=tmp_path, code=1, LORALOOP_STORE_URL=nowhere)["store"]
    assert found["is_problem"]
    (tmp_path / "loraloop-project" / "episodes.db").write_bytes(b"no database, and long enough to be looked at" * 10)
    assert examine(cwd=tmp_path, code=1)["store"]["is_problem"]
