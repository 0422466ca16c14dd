"""Dropout in the tree engine: drawn from seed and step alone, drawn again for the backward pass, right on average and in its gradient."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from train.tree_cases import list_paths, make_row, random_rows
from train.tree_models import CONFIGS, NAMES, Gradient, Twins, make_twins, plain_gradient, take_gradient

from loraloop.train.arithmetic import TorchArithmetic, choose_arithmetic
from loraloop.train.buffers import Keep
from loraloop.train.engine import Plan
from loraloop.train.tree import build_tree

ROWS = random_rows(2, n_rows=4, shared=10, own=5)


def dropped(both: Twins, *, seed: int = 0, step: int = 1, plan: Plan | None = None, arithmetic: TorchArithmetic | None = None) -> Gradient:
    engine = both.engine(plan, arithmetic, seed)
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
    assert engine.measure(ROWS).sum() / sum(sum(row.weights[1:]) for row in ROWS) == pytest.approx(truth.loss, rel=1e-12)
    assert dropped(both).apart(truth) > 1e-2


class Recording(TorchArithmetic):
    """Notes the mask of every draw, by key and first row, in the order in which they are first drawn."""

    def __init__(self, inner: TorchArithmetic | None = None) -> None:
        self.inner = inner or TorchArithmetic()
        self.masks: dict[tuple[int, int], torch.Tensor] = {}
        self.n_draws = 0

    def dropout(self, x: torch.Tensor, keep: float, draw: tuple[int, int], out: torch.Tensor, *, add: bool = False) -> None:
        mask = torch.empty(x.shape, dtype=x.dtype)
        self.inner.dropout(torch.ones(x.shape, dtype=x.dtype), keep, draw, mask)
        assert torch.equal(self.masks.setdefault(draw, mask), mask)
        self.n_draws += 1
        self.inner.dropout(x, keep, draw, out, add=add)


def test_gradient_is_that_of_autograd_through_the_same_masks(both: Twins) -> None:
    """PEFT's own model, each of whose dropouts multiplies by the mask that the tree's rows along its sample had."""
    arithmetic = Recording()
    found = dropped(both, seed=11, step=2, arithmetic=arithmetic)
    adapters = [adapter for linear in both.architecture.linears for adapter in linear.adapters]
    assert len(arithmetic.masks) == len(adapters)
    assert arithmetic.n_draws >= 3 * len(adapters)  # forward, and for the gradients of A and of the input
    masks = {id(adapter.a): mask for adapter, mask in zip(adapters, arithmetic.masks.values(), strict=True)}
    expected = _masked(both, masks)
    assert found.apart(expected) <= 1e-12
    assert dropped(both, seed=12, step=2).apart(expected) > 1e-2


class Mask(torch.nn.Module):
    """Stands where PEFT has its dropout."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask
        self.places: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        behind = x.shape[1] - len(self.places)  # tokens that predict nothing supervised are not in the tree
        return x * torch.cat([self.mask[self.places], torch.ones(behind, x.shape[2], dtype=x.dtype)])


def _masked(both: Twins, masks: dict[int, torch.Tensor]) -> Gradient:
    """The gradient by autograd, sample by sample, with the given mask of the whole tree for each adapter, by its A."""
    model, placed = copy.deepcopy(both.plain), []
    for plain, ours in zip(model.modules(), list(both.fused.modules()), strict=True):
        if hasattr(ours, "lora_A") and "default" in ours.lora_A:
            placed.append((plain, Mask(masks[id(ours.lora_A["default"].weight)])))
    for plain, mask in placed:
        plain.lora_dropout["default"] = mask
    at = {path: row for row, path in enumerate(list_paths(build_tree(ROWS)))}
    total = sum(sum(row.weights[1:]) for row in ROWS)
    loss, vector = 0.0, torch.zeros(())
    for row in ROWS:
        prefixes = [tuple(row.ids[:depth]) for depth in range(1, len(row.ids) + 1)]
        for _, mask in placed:
            mask.places = [at[prefix] for prefix in prefixes if prefix in at]
        share = sum(row.weights[1:]) / total
        part = plain_gradient(model, [row])
        loss, vector = loss + part.loss * share, vector + part.vector * share
    return Gradient(loss, vector)


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> tuple[TorchArithmetic, torch.dtype]:
    if request.param == "torch":
        return TorchArithmetic(), torch.float64
    found, why_not = choose_arithmetic(torch.bfloat16)
    if why_not:
        pytest.skip(f"no kernels here: {why_not}")
    return found, torch.bfloat16


def test_kept_values_are_scaled_so_that_the_mean_is_that_without_dropout(kernels: tuple[TorchArithmetic, torch.dtype]) -> None:
    arithmetic, dtype = kernels
    x = torch.ones(3000, 70, dtype=dtype)
    for keep in (0.7, 0.95):
        out = torch.empty_like(x)
        arithmetic.dropout(x, keep, (123, 0), out)
        assert out.unique().tolist() == [0.0, pytest.approx(1 / keep, rel=4e-3)]
        kept = (out > 0).double()
        spread = math.sqrt(keep * (1 - keep))
        assert float(kept.mean()) == pytest.approx(keep, abs=5 * spread / math.sqrt(kept.numel()))
        for axis in (0, 1):  # by column and by row
            means = kept.mean(axis)
            assert float((means - keep).abs().max()) < 6 * spread / math.sqrt(kept.shape[axis])
        again = torch.full_like(x, 2.0)
        arithmetic.dropout(x, keep, (123, 0), again, add=True)
        assert torch.allclose(again, out + 2, atol=0.02)


@pytest.mark.parametrize("rank", [4, 64])
def test_no_two_adapters_and_no_two_blocks_draw_the_same_mask(kernels: tuple[TorchArithmetic, torch.dtype], rank: int) -> None:
    arithmetic, dtype = kernels
    both = make_twins(CONFIGS["lfm2"](), dtype, lora_dropout=0.5, r=rank)
    recording = Recording(arithmetic)
    engine = both.engine(Plan(20), recording)
    engine.backward([make_row(list(range(1, 22)) * 2)])
    n_adapters = sum(len(linear.adapters) for linear in both.architecture.linears)
    masks = torch.stack([mask[:13, :48].flatten() for mask in recording.masks.values()])  # 41 rows in three blocks
    assert len(masks) == 3 * n_adapters
    signs = (masks > 0).double() * 2 - 1
    correlation = (signs @ signs.t() / signs.shape[1]).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 6 / math.sqrt(signs.shape[1])
