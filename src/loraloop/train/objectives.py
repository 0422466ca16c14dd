"""What a step minimises, method by method, and its gradient through an engine that knows likelihoods only.

Every loss here is a function of the rows' summed log-probabilities, so its gradient is a coefficient a row, and any engine that can
sum nll over rows with coefficients computes it. Likelihood knows its coefficients beforehand. Preference and Desirability know them
when all log-probabilities of the step are known: an engine holds what it has computed until then where there is memory for it, and
computes it a second time where there is not. So a step of pairs needs no more memory than one of single samples.

The reference of dpo and kto is the base model, which is the model with its adapter off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from loraloop.chat.render import Row
from loraloop.chat.rows import Unit
from loraloop.train.arguments import PreferenceLoss
from loraloop.train.reference import Reference
from loraloop.train.tree import Floats

EVEN = 1e-4
"""Nats that rounding alone may put between a fresh adapter and its reference: so little is no preference."""


class Engine(Protocol):
    """Computes losses and gradients of rows for the adapter of one model."""

    name: str
    n_computed: int
    """Tokens computed in the last call."""

    def add_gradient(self, rows: Sequence[Row], coefficients: Sequence[float], step: int | None = None) -> Floats:
        """Add the gradient of the sum of coefficient * loss over `rows`, and give each row's loss, the sum of w * nll of its tokens.

        `step` draws the dropout; None is without.
        """
        ...

    def add_gradient_by(self, rows: Sequence[Row], choose: Callable[[Floats], Sequence[float]]) -> Floats:
        """`add_gradient`, without dropout, with the coefficients that `choose` gives when it is told each row's loss."""
        ...

    def measure(self, rows: Sequence[Row], *, adapter: bool = True) -> Floats:
        """Each row's loss, the sum of w * nll of its tokens, without dropout and gradients; without the `adapter`, the base model's."""
        ...


@dataclass(frozen=True)
class Measure:
    """How far a model is by one objective."""

    loss: float
    n_computed: int
    """Tokens computed for it."""
    accuracy: float | None = None
    """dpo: the share of pairs whose better side has gained more than the worse one, against the reference. kto: the share of samples
    that have gained more than other answers, where they are desirable, or less, where they are not. What is even counts as half."""
    margin: float | None = None
    """dpo: mean reward of the better side less that of the worse. kto: the same of desirable and undesirable samples. In nats, times
    beta."""


class Objective(Protocol):
    """The loss of a training method."""

    def backward(self, engine: Engine, units: Sequence[Unit], step: int) -> Measure:
        """Add the gradient of the loss over `units`, one optimizer step's, and measure it on the way."""
        ...

    def measure(self, engine: Engine, units: Sequence[Unit]) -> Measure:
        """The loss over `units`, without gradients and dropout."""
        ...

    def list_rows(self, units: Sequence[Unit]) -> list[Row]:
        """All rows that are computed at once for a step of `units`."""
        ...


class Likelihood:
    """sft and weighted: sum(w * nll) / sum(|w|) over the step, w the product of a token's, its turn's and its sample's weight.

    With a negative sample weight its tokens become less likely.
    """

    def backward(self, engine: Engine, units: Sequence[Unit], step: int) -> Measure:
        """One pass."""
        coefficients = _shares(units)
        losses = engine.add_gradient([unit.rows[0] for unit in units], coefficients.tolist(), step)
        return Measure(float(losses @ coefficients), engine.n_computed)

    def measure(self, engine: Engine, units: Sequence[Unit]) -> Measure:
        """The same loss without gradients."""
        return Measure(float(engine.measure([unit.rows[0] for unit in units]) @ _shares(units)), engine.n_computed)

    def list_rows(self, units: Sequence[Unit]) -> list[Row]:
        """The rows of the units."""
        return [unit.rows[0] for unit in units]


@dataclass(frozen=True)
class Preference:
    """dpo: how much more the better side of a pair has gained than the worse one, against the reference.

    With h the difference of the sides' log-probability ratios, the loss of a pair is -log sigmoid(beta * h) (`sigmoid`, Rafailov et
    al. 2023) or (h - 1 / (2 * beta))^2 with log-probabilities a token (`ipo`, Azar et al. 2023, the mean over tokens as TRL has it).
    The loss of a step is the mean over its pairs, by their weights.
    """

    reference: Reference
    beta: float = 0.1
    loss: PreferenceLoss = "sigmoid"

    def backward(self, engine: Engine, units: Sequence[Unit], step: int) -> Measure:
        """The log-probabilities of all rows decide on their coefficients."""
        del step  # there is no dropout to draw
        losses = engine.add_gradient_by(self.list_rows(units), lambda losses: self._coefficients(units, losses))
        values, _, gains = self._values(units, losses)
        return self._measured(values, gains, _weights(units), engine.n_computed)

    def measure(self, engine: Engine, units: Sequence[Unit]) -> Measure:
        """The same loss without gradients."""
        values, _, gains = self._values(units, engine.measure(self.list_rows(units)))
        return self._measured(values, gains, _weights(units), engine.n_computed)

    def list_rows(self, units: Sequence[Unit]) -> list[Row]:
        """Both sides of all pairs."""
        return [row for unit in units for row in unit.rows]

    def _coefficients(self, units: Sequence[Unit], losses: Floats) -> list[float]:
        """Of every row's nll in the gradient."""
        _, slopes, _ = self._values(units, losses)
        coefficients: list[float] = []
        for unit, slope, share in zip(units, slopes, _weights(units), strict=True):
            better, worse = self._lengths(unit)
            # a gain is a fall of nll, so the better side's nll has the opposite sign of h
            coefficients += [-slope * share / better] * len(unit.better) + [slope * share / worse] * len(unit.worse)
        return coefficients

    def _values(self, units: Sequence[Unit], losses: Floats) -> tuple[Floats, Floats, Floats]:
        """(pairs,) loss, its derivative by h, and beta * h, from the nll of all rows."""
        gained = iter(np.concatenate([self.reference.of(unit.rows) for unit in units]) - losses)
        h = np.empty(len(units))
        for number, unit in enumerate(units):
            better, worse = (sum(next(gained) for _ in side) for side in (unit.better, unit.worse))
            lengths = self._lengths(unit)
            h[number] = better / lengths[0] - worse / lengths[1]
        if self.loss == "ipo":
            distance = h - 1 / (2 * self.beta)
            return distance**2, 2 * distance, self.beta * h
        return np.logaddexp(0, -self.beta * h), -self.beta * _sigmoid(-self.beta * h), self.beta * h

    def _lengths(self, unit: Unit) -> tuple[float, float]:
        """What the log-probability of either side is divided by."""
        if self.loss == "sigmoid":
            return 1.0, 1.0
        better, worse = (sum(sum(row.weights[1:]) for row in side) for side in (unit.better, unit.worse))
        return better, worse

    def _measured(self, values: Floats, gains: Floats, shares: Floats, n_computed: int) -> Measure:
        accuracy = _share_above(gains, self.beta * EVEN, shares)
        return Measure(float(values @ shares), n_computed, accuracy=accuracy, margin=float(gains @ shares))


@dataclass(frozen=True)
class Desirability:
    """kto: samples each desirable or not, against what the model has gained on answers to other questions.

    With r the log-probability ratio of a sample and z the mean ratio of answers put behind other prompts (0 at least, no gradient),
    the loss is lambda * (1 - sigmoid(beta * (r - z))) for a desirable sample and lambda * (1 - sigmoid(beta * (z - r))) for another
    (Ethayarajh et al. 2024). `elsewhere` gives for each unit, by its sample's number, its prompt with another sample's answer; where
    there is none z is 0. The loss of a step is the mean over its samples, by their weights.
    """

    reference: Reference
    elsewhere: dict[int, Row]
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def backward(self, engine: Engine, units: Sequence[Unit], step: int) -> Measure:
        """The log-probabilities of all rows, other answers among them, decide on the coefficients; those of other answers are 0."""
        del step  # there is no dropout to draw
        losses = engine.add_gradient_by(self.list_rows(units), lambda losses: self._coefficients(units, losses))
        ratios, z = self._ratios(units, losses)
        values, _ = self._values(units, ratios, z)
        return self._measured(units, values, self.beta * (ratios - z), engine.n_computed)

    def measure(self, engine: Engine, units: Sequence[Unit]) -> Measure:
        """The same loss without gradients."""
        ratios, z = self._ratios(units, engine.measure(self.list_rows(units)))
        return self._measured(units, self._values(units, ratios, z)[0], self.beta * (ratios - z), engine.n_computed)

    def list_rows(self, units: Sequence[Unit]) -> list[Row]:
        """The rows of the samples, then their prompts with other answers."""
        rows = [row for unit in units for row in unit.rows]
        return rows + [self.elsewhere[unit.sample_number] for unit in units if unit.sample_number in self.elsewhere]

    def _coefficients(self, units: Sequence[Unit], losses: Floats) -> list[float]:
        """Of every row's nll in the gradient."""
        _, slopes = self._values(units, *self._ratios(units, losses))
        by_unit = zip(units, -slopes * _weights(units), strict=True)  # the nll falls where the ratio rises
        coefficients = [coefficient for unit, coefficient in by_unit for _ in unit.rows]
        return coefficients + [0.0] * (len(losses) - len(coefficients))

    def _ratios(self, units: Sequence[Unit], losses: Floats) -> tuple[Floats, float]:
        """(samples,) log-probability ratios, and z."""
        gained = self.reference.of(self.list_rows(units)) - losses
        ends = np.cumsum([len(unit.rows) for unit in units])
        ratios = np.array([part.sum() for part in np.split(gained[: ends[-1]], ends[:-1])])
        others = gained[ends[-1] :]
        return ratios, float(np.maximum(0.0, others.mean())) if len(others) else 0.0  # what is not a number stays none

    def _values(self, units: Sequence[Unit], ratios: Floats, z: float) -> tuple[Floats, Floats]:
        """(samples,) loss, and its derivative by the ratio."""
        signs = np.array([1.0 if unit.n_better else -1.0 for unit in units])
        lambdas = np.where(signs > 0, self.desirable_weight, self.undesirable_weight)
        reached = _sigmoid(signs * self.beta * (ratios - z))
        return lambdas * (1 - reached), -lambdas * signs * self.beta * reached * (1 - reached)

    def _measured(self, units: Sequence[Unit], values: Floats, gains: Floats, n_computed: int) -> Measure:
        shares = _weights(units)
        desirable = np.array([bool(unit.n_better) for unit in units])
        margin = None
        if desirable.any() and not desirable.all():
            of_kind = [shares * kind for kind in (desirable, ~desirable)]
            margin = float(gains @ of_kind[0] / of_kind[0].sum() - gains @ of_kind[1] / of_kind[1].sum())
        accuracy = _share_above(np.where(desirable, gains, -gains), self.beta * EVEN, shares)
        return Measure(float(values @ shares), n_computed, accuracy=accuracy, margin=margin)


def put_elsewhere(units: Sequence[Unit], max_length: int) -> dict[int, Row]:
    """For each unit, by its sample's number, its prompt with the answer of another that does not begin like it; none if all do.

    The prompt is what precedes the first supervised token. The other is the next in the file, so neither the order of training nor
    its batches change it. Cut off at `max_length` tokens.
    """
    rows = [unit.rows[0] for unit in units]
    starts = [_first_supervised(row) for row in rows]
    found: dict[int, Row] = {}
    after: int | None = None  # the next that begins otherwise; from the end of the file, twice: the next of its last ones come first
    for number in reversed(range(2 * len(units))):
        here, behind = number % len(units), (number + 1) % len(units)
        if rows[here].ids[: starts[here]] != rows[behind].ids[: starts[behind]]:
            after = behind
        if after is not None and number < len(units):
            own, start, other, begin = rows[here], starts[here], rows[after], starts[after]
            ids = (own.ids[:start] + other.ids[begin:])[:max_length]
            weights = ([0.0] * start + other.weights[begin:])[:max_length]
            found[units[here].sample_number] = Row(ids=ids, weights=weights, text="", sample_number=units[here].sample_number)
    return found


def _first_supervised(row: Row) -> int:
    return next(index for index, weight in enumerate(row.weights) if weight > 0 and index)


def _shares(units: Sequence[Unit]) -> Floats:
    """(units,) what a row's summed nll counts in the loss: its sample's weight, over the sum of all weights of the step."""
    total = math.fsum(abs(unit.weight) * sum(unit.rows[0].weights[1:]) for unit in units)
    return np.array([unit.weight / total for unit in units])


def _weights(units: Sequence[Unit]) -> Floats:
    """(units,) the units' weights, their sum 1."""
    weights = np.array([unit.weight for unit in units])
    shares: Floats = weights / weights.sum()
    return shares


def _share_above(gains: Floats, even: float, shares: Floats) -> float:
    """The share of `gains` above 0, those that are `even` at most counted as half."""
    return float(np.where(np.abs(gains) <= even, 0.5, gains > 0) @ shares)


def _sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0, -x))
