"""The native row kernels, against float64 and against the same formula in torch with float32 inside and one rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional
from train.attention_reference import relative_error

from loraloop.train.kernels import Kernels, load_kernels

Tensor = torch.Tensor
SHAPES = [(1, 16), (3, 7), (5, 40), (64, 576), (33, 1536)]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.delenv("LORALOOP_KERNELS", raising=False)
    found, reason = load_kernels()
    if found is None:
        pytest.skip(f"no kernels here: {reason}")
    return found


def sliced(n_rows: int, width: int, seed: int, spread: float = 2.0) -> Tensor:
    """A matrix of bfloat16 whose rows are further apart than they are long."""
    return (torch.randn(n_rows, width + 24, generator=torch.Generator().manual_seed(seed)) * spread).bfloat16()[:, 8:-16]


def check(got: Tensor, formula: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compare with the formula in float64; the measure is the formula in float32, rounded to bfloat16 once."""
    true = formula(*(tensor.double() for tensor in inputs))
    once = formula(*(tensor.float() for tensor in inputs)).bfloat16()
    assert got.dtype == torch.bfloat16
    assert relative_error(got, true) <= 1.05 * relative_error(once, true) + 1e-7


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5) * weight


def gradient(formula: Callable[..., Tensor], d_out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(formula(*leaves), leaves, d_out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_and_its_gradient(kernels: Kernels, shape: tuple[int, int]) -> None:
    x, d_out, weight = sliced(*shape, 0), sliced(*shape, 1), sliced(1, shape[1], 2)[0].contiguous()
    out, rstd = kernels.rms_norm(x, weight, eps=1e-5)
    check(out, norm, x, weight)
    torch.testing.assert_close(rstd, torch.rsqrt(x.float().square().mean(1) + 1e-5))
    residual = sliced(*shape, 3)
    d_x = residual.clone()
    kernels.rms_norm_backward(d_out, x, weight, rstd=rstd, d_x=d_x)
    check(d_x, lambda d, x, w, r: r + gradient(norm, d, x, w)[0], d_out, x, weight, residual)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu_and_its_gradient_in_place(kernels: Kernels, shape: tuple[int, int]) -> None:
    n_rows, width = shape
    both, d_h = sliced(n_rows, 2 * width, 0, spread=4.0), sliced(*shape, 1)
    gate, up = both[:, :width], both[:, width:]
    check(kernels.swiglu(gate, up), swiglu, gate, up)
    inputs = [tensor.clone() for tensor in (d_h, gate, up)]
    kernels.swiglu_backward(d_h, gate, up, d_gate=gate, d_up=up, h=d_h)  # each over its own input
    check(d_h, lambda d, g, u: swiglu(g, u), *inputs)
    check(gate, lambda d, g, u: gradient(swiglu, d, g, u)[0], *inputs)
    check(up, lambda d, g, u: gradient(swiglu, d, g, u)[1], *inputs)


def test_swiglu_of_extreme_gates(kernels: Kernels) -> None:
    gate = torch.tensor([[-3e38, -1e4, -200.0, -90.0, -88.0, -60.0, -0.0, 0.0, 60.0, 1e4, 3e38]]).bfloat16()
    up = torch.ones_like(gate)
    torch.testing.assert_close(kernels.swiglu(gate, up), functional.silu(gate.double()).bfloat16(), rtol=1e-2, atol=1e-30)
    d_gate, d_up, h = (torch.empty_like(gate) for _ in range(3))
    kernels.swiglu_backward(up, gate, up, d_gate=d_gate, d_up=d_up, h=h)
    assert torch.isfinite(d_gate).all()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=2)
    return torch.cat([first * cos[:, None] - second * sin[:, None], second * cos[:, None] + first * sin[:, None]], dim=2)


@pytest.mark.parametrize("dim", [16, 32, 48, 64, 128])
def test_rope_turns_and_turns_back(kernels: Kernels, dim: int) -> None:
    angles = torch.rand(37, dim // 2, generator=torch.Generator().manual_seed(0)) * 6
    x = sliced(37, 3 * dim, 0).unflatten(1, (3, dim))
    before = x.clone()
    kernels.rope(x, angles.cos(), angles.sin())
    check(x, rotate, before, angles.cos(), angles.sin())
    turned = x.clone()
    kernels.rope(x, angles.cos(), angles.sin(), sign=-1)
    check(x, lambda x, c, s: rotate(x, c, -s), turned, angles.cos(), angles.sin())
    assert relative_error(x, before.double()) < 4e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (2, 17), (9, 1000), (3, 49152)], ids=str)
def test_head_softmax(kernels: Kernels, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = (torch.randn(shape[0], shape[1] + 8, generator=torch.Generator().manual_seed(0)) * 8).to(dtype)[:, :-8]
    coef = torch.linspace(-1.0, 2.0, shape[0])
    before = logits.clone()
    lse = kernels.head_softmax(logits, coef)
    assert (lse.double() - before.double().logsumexp(1)).abs().max() < 1e-5
    if dtype == torch.bfloat16:
        check(logits, lambda x, c: x.softmax(1) * c[:, None], before, coef)
    else:
        assert relative_error(logits, before.double().softmax(1) * coef.double()[:, None]) < 2e-6


def test_no_rows_are_no_work(kernels: Kernels) -> None:
    empty = torch.empty(0, 32, dtype=torch.bfloat16)
    out, rstd = kernels.rms_norm(empty, torch.ones(32, dtype=torch.bfloat16), eps=1e-5)
    assert (out.shape, rstd.shape) == ((0, 32), (0,))
    assert kernels.swiglu(empty, empty).shape == (0, 32)
    kernels.rope(empty.view(0, 2, 16), torch.empty(0, 8), torch.empty(0, 8))
    assert kernels.head_softmax(empty, torch.empty(0)).shape == (0,)


def test_what_does_not_fit_is_refused(kernels: Kernels) -> None:
    matrix = torch.zeros(4, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="up must be"):
        kernels.swiglu(matrix, matrix[:, :16])
    with pytest.raises(ValueError, match="weight must be"):
        kernels.rms_norm(matrix, torch.ones(32), eps=1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.swiglu(matrix, torch.zeros(32, 4, dtype=torch.bfloat16).T)
    with pytest.raises(ValueError, match="sign"):
        kernels.rope(matrix.view(4, 2, 16), torch.ones(4, 8), torch.ones(4, 8), sign=2)
    with pytest.raises(ValueError, match="logits must be"):
        kernels.head_softmax(matrix.half(), torch.ones(4))
