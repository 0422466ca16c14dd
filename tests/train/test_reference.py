"""What the base model says of rows: measured once, kept for the next run, and never taken for other rows or another base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from train.tree_cases import make_row, random_rows

from loraloop.chat.render import Row
from loraloop.train.reference import Reference, open_reference
from loraloop.train.tree import Floats
from loraloop.training_record import TrainingEvent

ROWS = random_rows(3, 7)


class Scale:
    """Stands for a model: a row's loss follows from its tokens and weights."""

    def __init__(self) -> None:
        self.n_computed = 0
        self.chunks: list[Sequence[Row]] = []

    def measure(self, rows: Sequence[Row], *, adapter: bool = True) -> Floats:
        assert not adapter
        self.chunks.append(rows)
        self.n_computed = sum(len(row.ids) for row in rows)
        return np.array([weigh(row) for row in rows])


def weigh(row: Row) -> float:
    return float(np.dot(row.ids, range(1, len(row.ids) + 1)) + np.dot(row.weights, range(len(row.ids))) / 3)


def opened(
    rows: Sequence[Row], cache: Path, origin: str = "a base", chunk_tokens: int = 1000
) -> tuple[Reference, Scale, list[TrainingEvent]]:
    scale, heard = Scale(), []
    return open_reference(scale, rows, cache, origin, heard.append, chunk_tokens=chunk_tokens), scale, heard


def test_a_second_run_knows_what_the_first_measured_in_any_order(tmp_path: Path) -> None:
    first, scale, _ = opened(ROWS, tmp_path)
    assert first.of(ROWS).tolist() == [weigh(row) for row in ROWS]
    assert sum(map(len, scale.chunks)) == len(ROWS) - 1  # the last is the first once more
    again, idle, (event,) = opened(ROWS[::-1], tmp_path)
    assert not idle.chunks
    assert again.of(ROWS).tolist() == first.of(ROWS).tolist()
    assert event.message == f"the base model's log-probabilities of {len(ROWS) - 1} rows are known from an earlier run"


def test_other_rows_weights_or_bases_are_measured_anew(tmp_path: Path) -> None:
    opened(ROWS, tmp_path)
    last = ROWS[-2]
    others = [
        ([*ROWS, make_row([1, 2, 3])], "a base"),
        ([*ROWS[:-2], replace(last, weights=[*last.weights[:-1], 0.25])], "a base"),
        ([*ROWS[:-2], replace(last, ids=[*last.ids[:-1], last.ids[-1] + 1])], "a base"),
        (ROWS, "another base"),
    ]
    for rows, origin in others:
        found, scale, _ = opened(rows, tmp_path, origin)
        assert scale.chunks
        assert found.of(rows).tolist() == [weigh(row) for row in rows]
    assert len(list(tmp_path.iterdir())) == 1 + len(others)


def test_a_row_that_was_not_measured_has_no_number(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        opened(ROWS[:2], tmp_path)[0].of(ROWS[:3])


@pytest.mark.parametrize("damage", ["", "[1.0, 2.0", "[]", "{}", "NaN", "[" * 100_000, "\0\xff", "null", "shorter", "one NaN", "one text"])
def test_a_damaged_file_is_measured_again_and_mended(damage: str, tmp_path: Path) -> None:
    opened(ROWS, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = json.loads(file.read_text())
    damaged = {"shorter": whole[:-1], "one NaN": [*whole[:-1], float("nan")], "one text": [*whole[:-1], "7"]}
    file.write_text(json.dumps(damaged[damage]) if damage in damaged else damage, encoding="latin-1")
    found, scale, _ = opened(ROWS, tmp_path)
    assert scale.chunks
    assert found.of(ROWS).tolist() == [weigh(row) for row in ROWS]
    assert json.loads(file.read_text()) == whole


def test_where_nothing_can_be_kept_a_warning_says_so_and_the_numbers_are_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found, _, heard = opened(ROWS, tmp_path / "file" / "reference")
    assert found.of(ROWS).tolist() == [weigh(row) for row in ROWS]
    assert [event.event for event in heard] == ["reference", "warning"]
    assert str(heard[-1].message).startswith("the base model's log-probabilities cannot be kept in ")


def test_rows_that_begin_alike_are_measured_together_within_the_tokens_of_a_chunk(tmp_path: Path) -> None:
    rows = [make_row([first, 5, n]) for n in range(4) for first in (1, 2)] + [make_row([3] * 20)]
    _, scale, heard = opened(rows, tmp_path, chunk_tokens=13)
    assert [[row.ids[0] for row in chunk] for chunk in scale.chunks] == [[1] * 4, [2] * 4, [3]]
    assert [(event.step, event.steps) for event in heard] == [(4, 9), (8, 9), (9, 9)]
    assert heard[-1].eta_s == 0
