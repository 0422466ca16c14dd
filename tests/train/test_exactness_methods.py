"""Every method's loss and gradient in float64 against their definitions, pair by pair and sample by sample, from autograd alone."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from train.tree_cases import VOCABULARY, make_row, random_rows
from train.tree_models import NAMES, Gradient, take_gradient, twins

from loraloop.chat.render import Row
from loraloop.chat.rows import Unit
from loraloop.train import objectives
from loraloop.train.buffers import Keep
from loraloop.train.dense import DenseEngine
from loraloop.train.engine import Plan
from loraloop.train.objectives import Desirability, Engine, Likelihood, Objective, Preference, put_elsewhere
from loraloop.train.reference import Reference, open_reference
from loraloop.train.tree import build_tree

LIMIT = 1e-12
BETA = 0.3
MAX_LENGTH = 60


def sides(seed: int, n_better: int, n_worse: int) -> tuple[list[Row], list[Row]]:
    """Rows of a pair: a common prompt without weight, then own and other tokens in turn, of several weights."""
    draw = random.Random(seed)
    prompt = [draw.randrange(VOCABULARY) for _ in range(draw.randint(4, 12))]
    rows = []
    for _ in range(n_better + n_worse):
        tail = [draw.randrange(VOCABULARY) for _ in range(draw.randint(3, 9))]
        weights = [0.0] * len(prompt) + [draw.choice([0.0, 1.0, 1.0, 0.5]) for _ in tail[:-1]] + [1.0]
        rows.append(make_row([*prompt, *tail], weights))
    return rows[:n_better], rows[n_better:]


def pairs() -> list[Unit]:
    """Of one row a side and of several; one pair counts more; one stands twice."""
    shapes = ((1, 1), (2, 1), (1, 3), (1, 1))
    made = [sides(seed, *shape) for seed, shape in enumerate(shapes)]
    units = [Unit((*better, *worse), len(better), [1.0, 2.5, 1.0, 0.5][n - 1], n) for n, (better, worse) in enumerate(made, 1)]
    return [*units, units[0]]


def kto_units() -> list[Unit]:
    """Desirable and not, of one row and of two."""
    made = [sides(seed + 20, 1 + seed % 2, 0)[0] for seed in range(5)]
    return [Unit(tuple(rows), len(rows) if n in (1, 2, 5) else 0, [1.0, 1.0, 2.0, 0.5, 1.0][n - 1], n) for n, rows in enumerate(made, 1)]


def weighted_units() -> list[Unit]:
    """Weights above, at and below 1, and one below 0."""
    rows = random_rows(5)
    return [Unit((row,), 1, weight, n) for n, (row, weight) in enumerate(zip(rows, (1.0, 0.25, 3.0, -0.2, 1.0, 1.0), strict=True), 1)]


# --- the definitions --------------------------------------------------------------------------------------------------------


def log_p(model: Any, rows: Sequence[Row]) -> torch.Tensor:
    """The weighted sum of the log-probabilities of all supervised tokens of `rows`."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
        picked = torch.log_softmax(logits, -1)[torch.arange(len(row.ids) - 1), row.ids[1:]]
        total = total + (picked * torch.tensor(row.weights[1:], dtype=torch.float64)).sum()
    return total


def ratio(model: Any, rows: Sequence[Row]) -> torch.Tensor:
    """By how much the log-probability is above the base model's."""
    with torch.no_grad(), model.disable_adapter():
        base = log_p(model, rows)
    return log_p(model, rows) - base


def n_weights(rows: Sequence[Row]) -> float:
    return sum(sum(row.weights[1:]) for row in rows)


def dpo(model: Any, units: list[Unit], loss: str) -> torch.Tensor:
    parts = []
    for unit in units:
        better, worse = ratio(model, unit.better), ratio(model, unit.worse)
        if loss == "sigmoid":
            parts.append(-logsigmoid(BETA * (better - worse)) * unit.weight)
        else:
            parts.append((better / n_weights(unit.better) - worse / n_weights(unit.worse) - 1 / (2 * BETA)) ** 2 * unit.weight)
    return sum(parts) / sum(unit.weight for unit in units)


def kto(model: Any, units: list[Unit], *, good: float = 1.4, bad: float = 0.6) -> torch.Tensor:
    elsewhere = put_elsewhere(units, MAX_LENGTH)
    with torch.no_grad():
        z = torch.stack([ratio(model, [elsewhere[unit.sample_number]]) for unit in units]).mean().clamp(min=0)
    parts = []
    for unit in units:
        r = ratio(model, unit.rows)
        parts.append(
            unit.weight * (good * (1 - torch.sigmoid(BETA * (r - z))) if unit.n_better else bad * (1 - torch.sigmoid(BETA * (z - r))))
        )
    return sum(parts) / sum(unit.weight for unit in units)


def weighted(model: Any, units: list[Unit]) -> torch.Tensor:
    total = sum(abs(unit.weight) * n_weights(unit.rows) for unit in units)
    return sum(-log_p(model, unit.rows) * unit.weight for unit in units) / total


CASES: dict[str, tuple[Callable[[], list[Unit]], Callable[[Any, list[Unit]], torch.Tensor]]] = {
    "weighted": (weighted_units, weighted),
    "dpo, sigmoid": (pairs, lambda model, units: dpo(model, units, "sigmoid")),
    "dpo, ipo": (pairs, lambda model, units: dpo(model, units, "ipo")),
    "kto": (kto_units, kto),
}


@functools.cache
def truth(name: str, case: str) -> Gradient:
    """The loss of the definition, and its gradient."""
    model, (make, loss) = twins(name).plain, CASES[case]

    def work() -> float:
        value = loss(model, make())
        value.backward()
        return float(value.detach())

    found = take_gradient(model, work)
    assert float(found.vector.norm()) > 1e-3
    return found


def reference(engine: Engine, units: list[Unit], tmp_path: Any) -> Reference:
    rows = [row for unit in units for row in unit.rows]
    rows += put_elsewhere(units, MAX_LENGTH).values()
    return open_reference(engine, rows, tmp_path, "test", lambda _: None, chunk_tokens=40)


def objective(case: str, engine: Engine, units: list[Unit], tmp_path: Any) -> Objective:
    if case == "weighted":
        return Likelihood()
    of_base = reference(engine, units, tmp_path)
    if case == "kto":
        return Desirability(of_base, put_elsewhere(units, MAX_LENGTH), BETA, 1.4, 0.6)
    return Preference(of_base, BETA, "ipo" if case.endswith("ipo") else "sigmoid")


# --- the engines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_the_tree_engine_is_that_of_the_definition(name: str, case: str, tmp_path: Any) -> None:
    units = CASES[case][0]()
    plans = [Plan(1, Keep.INPUTS), Plan(4, Keep.MIXER), Plan(1000), Plan(4, Keep.INPUTS, whole_rows=1000), Plan(4, whole_rows=20)]
    for number, plan in enumerate(plans):
        engine = twins(name).engine(plan)
        goal = objective(case, engine, units, tmp_path / str(number))
        found = take_gradient(twins(name).fused, lambda goal=goal, engine=engine: goal.backward(engine, units, 0).loss)
        assert found.apart(truth(name, case)) <= LIMIT, plan
        assert goal.measure(engine, units).loss == pytest.approx(found.loss, rel=LIMIT)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_gradient_of_the_dense_engine_is_that_of_the_definition(name: str, case: str, tmp_path: Any) -> None:
    model, units = twins(name).plain, CASES[case][0]()
    for batch_size in (1, 3):
        engine = DenseEngine(model, batch_size)
        goal = objective(case, engine, units, tmp_path / str(batch_size))
        found = take_gradient(model, lambda goal=goal, engine=engine: goal.backward(engine, units, 0).loss)
        assert found.apart(truth(name, case)) <= LIMIT
        assert goal.measure(engine, units).loss == pytest.approx(found.loss, rel=LIMIT)


def flat(units: Sequence[Unit]) -> list[Row]:
    return [row for unit in units for row in unit.rows]


@pytest.mark.parametrize("case", ["dpo, sigmoid", "kto"])
def test_what_fits_as_a_whole_goes_forward_once(case: str, tmp_path: Any) -> None:
    units = CASES[case][0]()
    held, walked = (twins("llama").engine(Plan(4, whole_rows=rows)) for rows in (1000, 0))
    goal = objective(case, held, units, tmp_path)
    n_rows = build_tree(goal.list_rows(units)).n_rows
    assert goal.backward(held, units, 0).n_computed == n_rows
    again = build_tree(flat(units)).n_rows
    assert goal.backward(walked, units, 0).n_computed == n_rows + again
    assert (again < n_rows) == (case == "kto"), "other answers are not computed a second time"
    limit = twins("llama").engine(Plan(4, whole_rows=n_rows)), twins("llama").engine(Plan(4, whole_rows=n_rows - 1))
    assert [goal.backward(engine, units, 0).n_computed for engine in limit] == [n_rows, n_rows + again]


def test_with_all_weights_1_weighted_is_sft_bit_for_bit() -> None:
    """Whether the weight 1 is a sample's own or the default, by the objective or by the engine alone; 2 for all is the same too."""
    both = twins("qwen2", torch.float32)
    rows = random_rows(9)
    engine = both.engine(Plan(16))
    found = [
        take_gradient(both.fused, lambda units=units: Likelihood().backward(engine, units, 0).loss)
        for units in (
            [Unit((row,), 1) for row in rows],
            [Unit((row,), 1, 1.0, n, (f"episode {n}",)) for n, row in enumerate(rows)],
            [Unit((row,), 1, 2.0) for row in rows],
        )
    ]
    for other in found[1:]:
        assert other.loss == found[0].loss
        assert torch.equal(other.vector, found[0].vector)
    assert take_gradient(both.fused, lambda: engine.backward(rows)).apart(found[0]) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_the_model_without_its_adapter(name: str, tmp_path: Any) -> None:
    units = pairs()
    of_base = reference(twins(name).engine(Plan(5)), units, tmp_path)
    with torch.no_grad(), twins(name).plain.disable_adapter():
        expected = [-float(log_p(twins(name).plain, [row])) for row in flat(units)]
    assert of_base.of(flat(units)) == pytest.approx(expected, rel=LIMIT)
    alone = copy.deepcopy(twins(name).plain).unload()
    with torch.no_grad():
        assert expected == pytest.approx([-float(log_p(alone, [row])) for row in flat(units)], rel=LIMIT)


def test_a_fresh_adapter_prefers_nothing(tmp_path: Any) -> None:
    import peft

    model = twins("llama").plain
    fresh = peft.get_peft_model(copy.deepcopy(model).unload(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    engine = DenseEngine(fresh, 2)
    for case, loss in (("dpo, sigmoid", 0.6931471805599453), ("dpo, ipo", 1 / (4 * BETA**2)), ("kto", None)):
        units = CASES[case][0]()
        found = objective(case, engine, units, tmp_path / case).measure(engine, units)
        assert found.margin == pytest.approx(0, abs=1e-12)
        if loss:
            assert found.loss == pytest.approx(loss, rel=1e-12)


# --- mutations: each must be seen -------------------------------------------------------------------------------------------


def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reference, "of", lambda _, rows: objectives.np.zeros(len(rows)))


def sides_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unit, "better", property(lambda unit: unit.rows[unit.n_better :]))
    monkeypatch.setattr(Unit, "worse", property(lambda unit: unit.rows[: unit.n_better]))


def weights_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "_weights", lambda units: objectives.np.full(len(units), 1 / len(units)))


def mutations() -> Iterator[tuple[str, Callable[[pytest.MonkeyPatch], None]]]:
    for case in ("dpo, sigmoid", "dpo, ipo", "kto"):
        yield case, no_reference
        yield case, weights_forgotten
        if case != "kto":
            yield case, sides_swapped


@pytest.mark.parametrize(("case", "mutate"), list(mutations()), ids=lambda given: getattr(given, "__name__", given))
def test_a_wrong_objective_is_seen(case: str, mutate: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, units, engine = truth("qwen3", case), CASES[case][0](), twins("qwen3").engine()
    goal = objective(case, engine, units, tmp_path)
    mutate(monkeypatch)
    assert take_gradient(twins("qwen3").fused, lambda: goal.backward(engine, units, 0).loss).apart(expected) > 1e-3
