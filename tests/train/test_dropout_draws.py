"""Dropout's masks: the right share, independent of how rows are cut, of one another, and of neighbouring keys."""

from __future__ import annotations

import pytest
import torch

from loraloop.train.arithmetic import NativeArithmetic, TorchArithmetic
from loraloop.train.kernels import load_kernels


@pytest.fixture(params=["torch", "native"])
def arithmetic(request: pytest.FixtureRequest) -> TorchArithmetic:
    if request.param == "torch":
        return TorchArithmetic()
    kernels, why = load_kernels()
    if kernels is None:
        pytest.skip(f"no native kernels: {why}")
    return NativeArithmetic(kernels)


def masks(arithmetic: TorchArithmetic, n_rows: int, n: int, keep: float, draw: tuple[int, int]) -> torch.Tensor:
    out = torch.empty(n_rows, n, dtype=torch.bfloat16)
    arithmetic.dropout(torch.ones(n_rows, n, dtype=torch.bfloat16), keep, draw, out)
    assert set(out.unique().tolist()) <= {0.0, float(torch.tensor(1 / keep).bfloat16())}
    return (out > 0).float()


@pytest.mark.parametrize("keep", [0.95, 0.5])
def test_share_kept_is_right_and_values_are_independent(arithmetic: TorchArithmetic, keep: float) -> None:
    kept = masks(arithmetic, 4000, 70, keep, (3, 0))
    spread = (keep * (1 - keep)) ** 0.5
    assert abs(float(kept.mean()) - keep) < 5 * spread / kept.numel() ** 0.5
    assert float((kept.mean(0) - keep).abs().max()) < 6 * spread / 4000**0.5  # no column is favoured
    for neighbours in (
        (kept[1:], kept[:-1]),
        (kept[:, 1:], kept[:, :-1]),
        (kept[:, 16:], kept[:, :-16]),
        (kept, masks(arithmetic, 4000, 70, keep, (4, 0))),
    ):
        both = float((neighbours[0] * neighbours[1]).mean())
        assert abs(both - keep**2) < 6 * spread / neighbours[0].numel() ** 0.5


def test_mask_of_a_row_does_not_depend_on_the_block_that_it_is_in(arithmetic: TorchArithmetic) -> None:
    whole = masks(arithmetic, 100, 37, 0.7, (5, 10))
    parts = torch.cat([masks(arithmetic, n, 37, 0.7, (5, 10 + start)) for start, n in ((0, 1), (1, 40), (41, 59))])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, masks(arithmetic, 100, 37, 0.7, (5, 11)))


def test_dropped_values_can_be_added(arithmetic: TorchArithmetic) -> None:
    x, into = torch.randn(50, 40).bfloat16(), torch.randn(50, 40).bfloat16()
    alone, total = torch.empty_like(x), into.clone()
    arithmetic.dropout(x, 0.8, (1, 2), alone)
    arithmetic.dropout(x, 0.8, (1, 2), total, add=True)
    assert torch.allclose(total.float(), into.float() + alone.float(), rtol=2e-2, atol=2e-2)
