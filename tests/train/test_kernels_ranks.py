"""The native product of a thin and a wide matrix, against float64; the measure is the same product summed in float32."""

from __future__ import annotations

import pytest
import torch
from train.attention_reference import relative_error

from loraloop.train.kernels import Kernels, load_kernels

SHAPES = [(1, 1, 1), (31, 5, 7), (32, 16, 192), (45, 33, 31), (200, 48, 100), (129, 17, 2049), (700, 128, 1000), (3591, 32, 1544)]


@pytest.fixture(params=["amx", "avx512bf16"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.delenv("LORALOOP_KERNELS", raising=False)
    monkeypatch.setenv("LORALOOP_ISA", request.param)
    found, reason = load_kernels()
    if found is None:
        pytest.skip(f"no kernels here: {reason}")
    if found.isa != request.param:
        pytest.skip(f"no {request.param} here")
    return found


def matrices(n_rows: int, n_ranks: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y and u as columns of one matrix, among others that are not numbers, and an `out` with a frame."""
    both = torch.randn(n_rows, n + n_ranks + 9, generator=torch.Generator().manual_seed(n_rows)).bfloat16()
    both[:, :3] = both[:, 3 + n : 9 + n] = torch.nan
    return both[:, 9 + n :], both[:, 3 : 3 + n], torch.randn(n_ranks + 2, n + 5, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_added_and_as_exact_as_in_float32(kernels: Kernels, shape: tuple[int, int, int]) -> None:
    u, y, frame = matrices(*shape)
    before = frame.clone()
    out, old = frame[1:-1, 2:-3], before[1:-1, 2:-3]
    kernels.rank_products(u, y, out)
    true = old.double() + u.double().t() @ y.double()
    assert relative_error(out, true) <= 1.05 * relative_error(old + u.float().t() @ y.float(), true) + 2e-8
    out.copy_(old)
    assert torch.equal(frame, before)  # nothing beside `out` was written


def test_the_number_of_threads_changes_nothing(kernels: Kernels) -> None:
    u, y, _ = matrices(300, 24, 1000)
    results, usual = [], torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3, 7):
            torch.set_num_threads(n_threads)
            results.append(torch.zeros(24, 1000))
            kernels.rank_products(u, y, results[-1])
    finally:
        torch.set_num_threads(usual)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_nothing_is_added_for_no_rows(kernels: Kernels) -> None:
    out = torch.ones(4, 32)
    kernels.rank_products(torch.empty(0, 4).bfloat16(), torch.empty(0, 32).bfloat16(), out)
    assert torch.equal(out, torch.ones(4, 32))
    kernels.rank_products(torch.ones(8, 0).bfloat16(), torch.ones(8, 32).bfloat16(), torch.empty(0, 32))
    kernels.rank_products(torch.ones(8, 4).bfloat16(), torch.ones(8, 0).bfloat16(), torch.empty(4, 0))


def test_what_does_not_fit_is_refused(kernels: Kernels) -> None:
    u, y = torch.zeros(8, 4).bfloat16(), torch.zeros(8, 32).bfloat16()
    for wrong_u, wrong_y, out, match in (
        (u[0], y, torch.zeros(4, 32), "matrices"),
        (u, y[:7], torch.zeros(4, 32), "y must be"),
        (u, y, torch.zeros(32, 4), "out must be"),
        (u, y, torch.zeros(4, 32).bfloat16(), "out must be"),
        (u.float(), y, torch.zeros(4, 32), "u must be"),
        (u, torch.zeros(32, 8).bfloat16().t(), torch.zeros(4, 32), "contiguous"),
    ):
        with pytest.raises(ValueError, match=match):
            kernels.rank_products(wrong_u, wrong_y, out)
