"""Errors form the tree that their module draws, can be pickled, and say what to do."""

from __future__ import annotations

import inspect
import pickle
import re
import signal

import pytest

from loraloop import errors
from loraloop.errors import CannotStart, EmptyData, LoraLoopError, ProcessFailed, ScriptNotFound, TrainingStopped

EXAMPLES = {
    "EmptyData": EmptyData("nothing left", {"outcome_failure": 3}),
    "ScriptNotFound": ScriptNotFound("lora/train.py"),
    "ProcessFailed": ProcessFailed(-9, "last words", "training.log", "a reason"),
    "CannotStart": CannotStart(["BaseModelError: no such folder", "the disk is full"]),
    "TrainingStopped": TrainingStopped("lora-1", 3, 9),
}


def all_errors(root: type[LoraLoopError] = LoraLoopError) -> list[type[LoraLoopError]]:
    own = [error for error in root.__subclasses__() if error.__module__ == errors.__name__]
    return [root, *(below for error in own for below in all_errors(error))]


def drawn_tree() -> dict[str, tuple[str | None, set[str]]]:
    """name -> (parent, builtin bases) as the docstring of the module draws them."""
    tree: dict[str, tuple[str | None, set[str]]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ([│├└─ ]*)([A-Z]\w+)(?: \(([\w, ]+)\))?", line)
        if not found:
            continue
        depth = len(found[1]) // 4
        path[depth:] = [found[2]]
        tree[found[2]] = (path[depth - 1] if depth else None, set((found[3] or "").split(", ")) - {""})
    return tree


def test_tree_in_the_docstring_is_the_real_tree() -> None:
    real = {}
    for error in all_errors():
        parents = [base.__name__ for base in error.__bases__ if issubclass(base, LoraLoopError)]
        builtin = {base.__name__ for base in error.__bases__ if not issubclass(base, LoraLoopError)} - {"Exception"}
        real[error.__name__] = (parents[0] if parents else None, builtin)
    assert drawn_tree() == real
    assert len(real) <= 20


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.__name__)
def test_every_error_survives_pickling_with_its_message_and_parts(error: type[LoraLoopError]) -> None:
    example = EXAMPLES.get(error.__name__) or error("what, which value, what was expected")
    again = pickle.loads(pickle.dumps(example))
    assert type(again) is error
    assert str(again) == str(example)
    assert vars(again) == vars(example)


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.__name__)
def test_every_error_has_a_docstring_of_its_own(error: type[LoraLoopError]) -> None:
    assert inspect.getdoc(error)
    assert error.__doc__ != (error.__base__.__doc__ if error.__base__ else None)


def test_empty_data_lists_its_counts_by_reason_in_order() -> None:
    error = EmptyData("none of 5 episodes gives a sample", {"outcome_unknown": 2, "outcome_failure": 3})
    assert str(error) == "Empty data: none of 5 episodes gives a sample (refused: outcome_failure 3, outcome_unknown 2)"
    assert error.refused == {"outcome_failure": 3, "outcome_unknown": 2}
    assert str(EmptyData("No episodes found")) == "Empty data: No episodes found"


def test_missing_script_is_also_a_missing_file_and_says_what_to_give() -> None:
    error = ScriptNotFound("lora/train.py")
    assert isinstance(error, FileNotFoundError)
    assert str(error) == (
        "Script not found: lora/train.py; give the path of an existing script, or train_script=None for loraloop's own training process"
    )


@pytest.mark.parametrize(("code", "name"), [(-9, "SIGKILL"), (-15, "SIGTERM"), (-11, "SIGSEGV"), (-63, "signal 63"), (3, None), (0, None)])
def test_process_failed_names_the_signal_that_ended_the_process(code: int, name: str | None) -> None:
    error = ProcessFailed(code, "")
    assert error.signal_name == name
    if name:
        assert f"ended by {name}" in str(error)


def test_a_killed_process_is_explained_by_its_most_likely_cause() -> None:
    text = str(ProcessFailed(-signal.SIGKILL, ""))
    assert "ran out of memory" in text
    assert "smaller batch size" in text


def test_process_failed_keeps_the_last_forty_lines_and_points_to_the_rest() -> None:
    error = ProcessFailed(3, "\n".join(f"line {n}" for n in range(100)), "data/training.log")
    assert error.stderr.splitlines() == [f"line {n}" for n in range(60, 100)]
    lines = str(error).splitlines()
    assert lines[0] == "Training failed (exit 3)"
    assert lines[1:41] == [f"line {n}" for n in range(60, 100)]
    assert lines[41] == "The whole output is in data/training.log"


def test_process_failed_says_so_when_nothing_was_written() -> None:
    assert "(nothing was written to stderr)" in str(ProcessFailed(1, "  \n"))
