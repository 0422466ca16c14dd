"""Dropout in the tree engine: drawn from seed and step alone, drawn again for the backward pass, right on average and in its gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from train.tree_cases import random_rows
from train.tree_models import CONFIGS, NAMES, Gradient, Twins, make_twins, plain_gradient, take_gradient

from loraloop.train.adapters import FusedLinear
from loraloop.train.buffers import Keep
from loraloop.train.engine import Plan
from loraloop.train.tree import build_tree

ROWS = random_rows(2, n_rows=4, shared=10, own=5)


def dropped(both: Twins, *, seed: int = 0, step: int = 1, plan: Plan | None = None) -> Gradient:
    engine = both.engine(plan, seed=seed)
    return take_gradient(both.fused, lambda: engine.backward(ROWS, step))


@pytest.fixture(scope="module", params=NAMES)
def both(request: pytest.FixtureRequest) -> Twins:
    return make_twins(CONFIGS[request.param](), lora_dropout=0.3)


def test_same_seed_and_step_give_the_same_bits_and_others_do_not(both: Twins) -> None:
    first = dropped(both, seed=3, step=5)
    torch.rand(7)  # whoever drew before does not matter
    again = dropped(both, seed=3, step=5)
    assert again.loss == first.loss
    assert torch.equal(again.vector, first.vector)
    for other in (dropped(both, seed=4, step=5), dropped(both, seed=3, step=6)):
        assert other.apart(first) > 1e-2


def test_what_is_kept_changes_no_bit_of_it(both: Twins) -> None:
    for block_rows in (5, 1000):
        first, *others = (dropped(both, plan=Plan(block_rows, keep)) for keep in Keep)
        for other in others:
            assert other.loss == first.loss
            assert torch.equal(other.vector, first.vector)


def test_without_dropout_and_when_measuring_nothing_is_drawn(both: Twins) -> None:
    engine = both.engine()
    exact = both.plain.eval()
    truth = plain_gradient(exact, ROWS)
    exact.train()
    assert take_gradient(both.fused, lambda: engine.backward(ROWS, 1, dropout=False)).apart(truth) <= 1e-12
    total, weight = engine.measure(ROWS)
    assert total / weight == pytest.approx(truth.loss, rel=1e-12)
    assert dropped(both).apart(truth) > 1e-2


def test_gradient_is_that_of_autograd_through_the_same_masks(both: Twins) -> None:
    """PEFT's own model, each of whose dropouts multiplies by the mask of the tree's rows along its sample."""
    found, expected = dropped(both, seed=11, step=2), _masked(both, seed=11, step=2)
    assert found.apart(expected) <= 1e-12
    assert dropped(both, seed=12, step=2).apart(expected) > 1e-2


def _masked(both: Twins, *, seed: int, step: int) -> Gradient:
    """The gradient by autograd, with the masks that the engine draws for one block that holds the whole tree."""
    tree = build_tree(ROWS)
    draw = hash((seed, step, 0)) % 2**40
    fused = {id(linear): linear for linear in both.architecture.linears}
    places = _places(tree)

    class Mask(torch.nn.Module):
        """Stands where PEFT has its dropout."""

        def __init__(self, linear: FusedLinear, adapter: Any) -> None:
            super().__init__()
            self.mask = linear._mask(adapter, torch.empty(tree.n_rows, linear.n_inputs, dtype=torch.float64), draw)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = places[Mask.sample]
            behind = x.shape[1] - len(rows)  # tokens that are no input of a supervised one
            mask = torch.cat([self.mask[rows], torch.ones(behind, x.shape[2], dtype=x.dtype)])
            return x * mask

    owners = {id(adapter.a): (linear, adapter) for linear in fused.values() for adapter in linear.adapters}
    masked = make_copy(both)
    for (_, plain), (_, ours) in zip(masked.named_modules(), both.fused.named_modules(), strict=False):
        if hasattr(ours, "lora_A") and "default" in ours.lora_A:
            plain.lora_dropout["default"] = Mask(*owners[id(ours.lora_A["default"].weight)])
    total = sum(sum(row.weights[1:]) for row in ROWS)
    parts = []
    for number, row in enumerate(ROWS):
        Mask.sample = number
        share = sum(row.weights[1:]) / total
        part = plain_gradient(masked, [row])
        parts.append(Gradient(part.loss * share, part.vector * share))
    return Gradient(sum(part.loss for part in parts), torch.stack([part.vector for part in parts]).sum(0))


def make_copy(both: Twins) -> Any:
    import copy

    return copy.deepcopy(both.plain)


def _places(tree: Any) -> list[list[int]]:
    """For each sample the tree's rows of its tokens."""
    from train.tree_cases import list_paths

    at = {path: row for row, path in enumerate(list_paths(tree))}
    places = []
    for row in ROWS:
        path = [at.get(tuple(row.ids[:depth])) for depth in range(1, len(row.ids) + 1)]
        places.append([place for place in path if place is not None])
    return places


def test_kept_inputs_are_scaled_so_that_the_mean_is_that_without_dropout() -> None:
    both = make_twins(CONFIGS["qwen3"](), lora_dropout=0.3)
    linear = both.architecture.linears[0]
    adapter = linear.adapters[0]
    linear.refresh()
    x = torch.empty(1, linear.width, dtype=torch.float64)
    x[:, : linear.n_inputs] = torch.linspace(-1, 1, linear.n_inputs)
    linear.fill(x, None)
    exact = x[0, linear.n_inputs :].clone()
    n = 4000
    rows = x.expand(n, -1).clone()
    linear.fill(rows, 123)
    drawn = rows[:, linear.n_inputs :]
    error = (drawn.mean(0) - exact) / (drawn.std(0) / math.sqrt(n))
    assert float(error.abs().max()) < 5
    mask = linear._mask(adapter, torch.empty(n, linear.n_inputs), 123)
    assert mask.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert float((mask == 0).float().mean()) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / mask.numel()))


def test_no_two_adapters_draw_the_same_mask() -> None:
    """Whatever the rank: q, k, v and every layer's other matrices, in every layer."""
    for rank in (4, 32, 64, 128):
        both = make_twins(CONFIGS["llama"](), lora_dropout=0.5, r=rank)
        masks = [
            linear._mask(adapter, torch.empty(64, 32), 7).flatten().bool()
            for linear in both.architecture.linears
            for adapter in linear.adapters
        ]
        pairs = torch.stack(masks).float() * 2 - 1
        correlation = (pairs @ pairs.t() / pairs.shape[1]).fill_diagonal_(0)
        assert float(correlation.abs().max()) < 6 / math.sqrt(pairs.shape[1]), rank
