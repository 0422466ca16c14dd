"""A service that is killed while an alias moves: it is where it was, or where it should be, and one of the two comes up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fleets import ask, open_fleet
from http_applier import make_adapter

from loraloop.serve.aliases import AliasFile

PROGRAM = Path(__file__).with_name("switch_and_die.py")


@pytest.mark.parametrize(("when", "strength"), [("before", 1), ("after", 2)])
async def test_killed_while_the_alias_moves_it_serves_what_the_disk_says(tmp_path: Path, when: str, strength: float) -> None:
    paths = os.pathsep.join([str(PROGRAM.parent), str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(  # noqa: ASYNC221  nothing else runs yet
        [sys.executable, str(PROGRAM), str(tmp_path), when], env={**os.environ, "PYTHONPATH": paths}, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    expected = make_adapter(tmp_path / "ab"[int(strength) - 1], strength)
    async with open_fleet(tmp_path / "serving") as (fleet, applier):
        assert await ask(fleet, applier) == expected.name
        assert fleet.status().problems == ()
        assert len(applier.processes) == 2
        await fleet.apply(make_adapter(tmp_path / "c", 3), "agent")
        history = [move.after for move in AliasFile(tmp_path / "serving").read_history()]
        assert history[-1] == make_adapter(tmp_path / "c", 3).name
        before = AliasFile(tmp_path / "serving").read_history()[-1].before
        assert before == expected.name, "also when the line of the move that was made is missing"
