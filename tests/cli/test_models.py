"""`loraloop models` as a user types it, on models that are there without a training."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from models_made import OWN_ADAPTER, save_model

from loraloop.lora.model import TrainedModel
from loraloop.project import Project

Models = tuple[TrainedModel, TrainedModel, TrainedModel]


def models(*arguments: str, cwd: Path, code: int = 0, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loraloop", "models", *arguments]
    environment = {**os.environ, "COLUMNS": "260"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, input=said, env=environment, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def three(tmp_path: Path) -> Models:
    """A retired model that was promoted once, one that went on from it, and one with the very same adapter as the first."""
    with Project(tmp_path / "loraloop-project") as project:
        folder = project.directory / "models"
        first = save_model(folder)
        second = save_model(folder, OWN_ADAPTER, parent=first.id, run="run-1700000000000-0123abcd")
        third = save_model(folder)
        project.move_model(first.id, "promoted", "12 of 40 goals, before 5")
        project.move_model(first.id, "retired", "replaced")
    return first, second, third


def test_list_and_show_tell_state_lineage_and_hash(tmp_path: Path, three: Models) -> None:
    first, second, third = three
    table = models("list", cwd=tmp_path).stdout
    rows = [[cell.strip() for cell in line.split("│")] for line in table.splitlines() if "lora-" in line]
    assert [row[1:3] for row in rows] == [[first.id, "retired"], [second.id, "candidate"], [third.id, "candidate"]]
    assert [row[6:9] for row in rows] == [
        ["-", (first.adapter_sha256 or "")[:12], "-"],
        [first.id, (second.adapter_sha256 or "")[:12], second.run],
        ["-", (first.adapter_sha256 or "")[:12], "-"],
    ]
    listed = [json.loads(line) for line in models("list", "--json", cwd=tmp_path).stdout.splitlines()]
    shown = json.loads(models("show", first.id, "--json", cwd=tmp_path).stdout)
    assert listed[0].items() <= shown.items()
    assert (listed[1]["parent"], listed[1]["run"], listed[1]["state"]) == (first.id, second.run, "candidate")
    assert shown["adapter_sha256"] == first.adapter_sha256
    assert shown["same_adapter"] == [third.id]
    assert [(change["from"], change["state"], change["reason"]) for change in shown["history"]] == [
        ("candidate", "promoted", "12 of 40 goals, before 5"),
        ("promoted", "retired", "replaced"),
    ]
    text = models("show", first.id, cwd=tmp_path).stdout
    for line in ("state: retired", "parent: None", f"adapter_sha256: {first.adapter_sha256}", f"the very same adapter: {third.id}"):
        assert line in text
    assert re.search(r"UTC  candidate -> promoted: 12 of 40 goals, before 5$", text, re.MULTILINE)
    assert "the very same adapter" not in models("show", second.id, cwd=tmp_path).stdout


def test_delete_asks_and_keeps_what_is_needed(tmp_path: Path, three: Models) -> None:
    first, second, third = three
    refused = models("delete", first.id, "--yes", cwd=tmp_path, code=1)
    assert f"Error: {first.id} is not deleted: {second.id} went on from it; delete that first" in refused.stderr
    for said in ("n\n", ""):
        asked = models("delete", "latest", cwd=tmp_path, code=1, said=said)
        assert f"Delete {third.id} (candidate) and its adapter for good? [y/N]" in asked.stderr
        assert "Nothing is deleted" in asked.stderr
        assert asked.stdout == ""
    ambiguous = models("delete", "lora-", "--yes", "--json", cwd=tmp_path, code=1)
    assert f"3 models begin with 'lora-': {first.id}, {second.id}, {third.id}" in ambiguous.stderr
    assert models("delete", "latest", cwd=tmp_path, said="y\n").stdout == f"deleted {third.id}\n"
    assert json.loads(models("delete", second.id[:-1], "--yes", "--json", cwd=tmp_path).stdout) == {"id": second.id, "deleted": True}
    models("delete", first.id, "--yes", cwd=tmp_path)
    assert models("list", "--json", cwd=tmp_path).stdout == ""
    assert list((tmp_path / "loraloop-project" / "models").iterdir()) == []
