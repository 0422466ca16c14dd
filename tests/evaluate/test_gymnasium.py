"""A text environment of Gymnasium is a suite: its seeds are tasks, its rewards are summed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("gymnasium", reason="the package gymnasium is not installed; `make test` installs it")

from loraloop.errors import EvaluationError, SettingsError
from loraloop.evaluate.environments.gymnasium import GymnasiumSuite
from loraloop.plugins import find
from loraloop.testing import check_environment

ID = {"id": "guessing:Guessing-v0"}


def test_the_suite_conforms_and_sums_rewards(tmp_path: Path) -> None:
    assert find("environments", "gymnasium") is GymnasiumSuite
    check_environment(lambda: GymnasiumSuite(options=ID), ["3", "no number", "5", "7"])
    suite = GymnasiumSuite(options={**ID, "n": "4", "success": "0.75", "system": "Guess.", "max_turns": "5"})
    assert [task.id for task in suite.list_tasks()] == ["seed-0", "seed-1", "seed-2", "seed-3"]
    assert (suite.limits.max_turns, suite.system, suite.success_reward) == (5, "Guess.", 0.75)
    play = suite.open()
    assert play.reset(suite.list_tasks()[0]) == "Guess a number."
    wanted = play.inner.unwrapped.wanted  # type: ignore[attr-defined]
    said, paid, over = play.step("none")
    assert (suite.is_executed(said), paid, over) == (False, 0.0, False)
    assert play.step(str(wanted - 1)) == ("more", 0.125, False)
    assert play.step(str(wanted)) == ("right", 0.875, True)


def test_a_file_gives_seeds_and_options(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"id": "one", "seed": 5, "options": {"below": 1}}\n')
    suite = GymnasiumSuite(file, ID)
    play = suite.open()
    play.reset(suite.list_tasks()[0])
    assert play.step("0") == ("right", 0.75, True)


def test_what_cannot_be_played_is_named() -> None:
    with pytest.raises(SettingsError, match="which environment"):
        GymnasiumSuite()
    with pytest.raises(SettingsError, match="are numbers"):
        GymnasiumSuite(options={**ID, "n": "many"})
    with pytest.raises(EvaluationError, match=r"cannot make 'NoSuch-v0'"):
        GymnasiumSuite(options={"id": "NoSuch-v0"})
    numbers = GymnasiumSuite(options={"id": "guessing:Numbers-v0"})
    with pytest.raises(EvaluationError, match=r"shows a int; only environments whose observations are texts"):
        numbers.open().reset(numbers.list_tasks()[0])
