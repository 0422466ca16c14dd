"""What dpo and kto say of themselves (loss, accuracy, margin, tokens), and kto's answers to other prompts, on given log-probabilities."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from train.tree_cases import make_row

from loraloop.chat.render import Row
from loraloop.chat.rows import Unit
from loraloop.train.objectives import EVEN, Desirability, Preference, put_elsewhere
from loraloop.train.reference import Reference
from loraloop.train.tree import Floats

BETA = 0.5


class Given:
    """A reference of 10 for every row and an engine whose losses are 10 less what each row, by its first token, has gained."""

    name = "given"
    n_computed = 0

    def __init__(self, gained: dict[int, float]) -> None:
        self.gained = gained
        self.coefficients: dict[int, float] = {}

    def measure(self, rows: Sequence[Row], *, adapter: bool = True) -> Floats:
        assert adapter
        self.n_computed = 100
        return np.array([10 - self.gained[row.ids[0]] for row in rows])

    def add_gradient(self, rows: Sequence[Row], coefficients: Sequence[float], step: int | None = None) -> Floats:
        raise AssertionError(f"{len(rows)} rows, {coefficients}, {step}: the losses decide on the coefficients")

    def add_gradient_by(self, rows: Sequence[Row], choose: Callable[[Floats], Sequence[float]]) -> Floats:
        losses = self.measure(rows)
        self.coefficients = {row.ids[0]: coefficient for row, coefficient in zip(rows, choose(losses), strict=True)}
        self.n_computed = 170
        return losses


class Ten(Reference):
    def __init__(self) -> None:
        super().__init__({})

    def of(self, rows: Sequence[Row]) -> Floats:
        return np.full(len(rows), 10.0)


def row(first: int) -> Row:
    return make_row([first, 0, 0], [0, 1, 1])


def pair(better: int, worse: int, weight: float = 1.0) -> Unit:
    return Unit((row(better), row(worse)), 1, weight)


def answer(number: int, weight: float = 1.0, *, good: bool) -> Unit:
    return Unit((row(number),), int(good), weight, number)


def test_a_pair_is_right_when_its_better_side_gained_more_and_half_right_when_even() -> None:
    engine = Given({1: 3.0, 2: 1.0, 3: -1.0, 4: 2.0, 5: 1.0, 6: 1.0 + EVEN / 2})
    units = [pair(1, 2, 2.0), pair(3, 4), pair(5, 6)]
    found = Preference(Ten(), BETA).measure(engine, units)
    assert found.accuracy == pytest.approx((2 * 1 + 0 + 0.5) / 4)
    assert found.margin == pytest.approx(BETA * (2 * 2 - 3 - EVEN / 2) / 4)
    assert found.n_computed == 100
    assert Preference(Ten(), BETA).measure(engine, units[:1]).loss == pytest.approx(math.log1p(math.exp(-BETA * 2)))


def test_a_step_pulls_the_sides_apart_and_counts_the_tokens_that_it_took() -> None:
    engine = Given({1: 3.0, 2: 1.0})
    found = Preference(Ten(), BETA).backward(engine, [pair(1, 2)], 1)
    assert found.n_computed == 170
    assert engine.coefficients[1] == pytest.approx(BETA / (1 + math.exp(BETA * 2)))
    assert engine.coefficients[2] == -engine.coefficients[1]


@pytest.mark.parametrize(("elsewhere", "z"), [({1: 4.0, 2: 2.0}, 3.0), ({1: -4.0, 2: 2.0}, 0.0), ({1: 4.0}, 4.0), ({}, 0.0)])
def test_kto_compares_with_the_mean_gain_of_other_answers_but_never_with_a_loss(elsewhere: dict[int, float], z: float) -> None:
    engine = Given({1: 5.0, 2: 1.0, **{10 + number: gain for number, gain in elsewhere.items()}})
    units = [answer(1, good=True), answer(2, 3.0, good=False)]
    others = {number: row(10 + number) for number in elsewhere}
    found = Desirability(Ten(), others, BETA, 2.0, 0.5).measure(engine, units)
    good, bad = (1 / (1 + math.exp(BETA * gain)) for gain in (5 - z, z - 1))
    assert found.loss == pytest.approx((2.0 * good + 3.0 * 0.5 * bad) / 4)
    assert found.margin == pytest.approx(BETA * 4)
    assert found.accuracy == pytest.approx(((z < 5) + 3 * (z > 1)) / 4)


def test_a_step_of_kto_pulls_by_the_slope_of_its_loss_and_by_nothing_at_other_answers() -> None:
    engine = Given({1: 5.0, 2: 1.0, 11: 3.0})
    units = [answer(1, good=True), answer(2, good=False)]
    found = Desirability(Ten(), {1: row(11)}, BETA, 2.0, 0.5).backward(engine, units, 1)
    assert found.n_computed == 170
    slope = BETA * math.exp(BETA * 2) / (1 + math.exp(BETA * 2)) ** 2  # both are 2 from the baseline
    assert engine.coefficients == pytest.approx({1: 2.0 * slope / 2, 2: -0.5 * slope / 2, 11: 0})


def test_kto_is_half_right_when_nothing_has_changed_and_has_no_margin_over_one_kind() -> None:
    units = [answer(1, good=True), answer(2, good=False)]
    found = Desirability(Ten(), {}, BETA).measure(Given({1: EVEN / 2, 2: EVEN / 2}), units)
    assert (found.accuracy, found.margin) == (0.5, 0)
    assert Desirability(Ten(), {}, BETA).measure(Given({1: 1.0}), units[:1]).margin is None


def test_what_is_not_a_number_in_other_answers_is_no_baseline_of_0() -> None:
    engine = Given({1: 1.0, 11: math.nan})
    with np.errstate(invalid="ignore"):
        assert math.isnan(Desirability(Ten(), {1: row(11)}, BETA).measure(engine, [answer(1, good=True)]).loss)


# --- other answers ----------------------------------------------------------------------------------------------------------


def unit(number: int, prompt: list[int], answered: list[int]) -> Unit:
    ids = [*prompt, *answered]
    return Unit((make_row(ids, [0.0] * len(prompt) + [1.0] * len(answered)),), 1, sample_number=number)


def test_every_prompt_gets_the_answer_of_the_next_in_the_file_that_has_another() -> None:
    draw = random.Random(0)
    for _ in range(200):
        prompts = [[draw.randrange(2)] * draw.randint(1, 2) for _ in range(draw.randint(1, 7))]
        units = [unit(number, prompt, [10 + number]) for number, prompt in enumerate(prompts, 1)]
        expected = {}
        for index, prompt in enumerate(prompts):
            turned = [(index + step) % len(prompts) for step in range(1, len(prompts))]
            other = next((place for place in turned if prompts[place] != prompt), None)
            if other is not None:
                expected[index + 1] = ([*prompt, 11 + other], [0.0] * len(prompt) + [1.0])
        assert {number: (row.ids, row.weights) for number, row in put_elsewhere(units, 50).items()} == expected


def test_what_is_put_elsewhere_is_cut_off_at_the_limit_and_keeps_a_trained_token() -> None:
    units = [unit(1, [1] * 7, [2]), unit(2, [3], [4] * 7)]
    assert put_elsewhere(units, 8)[1].ids == [1] * 7 + [4]
    assert put_elsewhere(units, 8)[2].ids == [3, 2]


def test_the_work_grows_with_the_number_of_samples_that_begin_alike_and_not_with_its_square() -> None:
    class Ids(list[int]):
        n_read = 0

        def __getitem__(self, key: Any) -> Any:
            Ids.n_read += 1
            return super().__getitem__(key)

    units = [unit(number, [1], [2]) for number in range(1, 400)] + [unit(400, [3], [4])]
    counted = [Unit((make_row(Ids(one.rows[0].ids), one.rows[0].weights),), 1, sample_number=one.sample_number) for one in units]
    assert len(put_elsewhere(counted, 10)) == 400
    assert Ids.n_read < 10 * 400
