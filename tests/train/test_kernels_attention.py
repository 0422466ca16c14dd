"""The native attention over a prefix tree: against float64, against torch's flash attention, and against masks that are wrong by one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from train.attention_reference import Case, dense, flash, make_case, relative_error, visible

from loraloop.train.kernels import Kernels, load_kernels

ISAS = ("amx", "avx512bf16")
NAMES = ("out", "d_q", "d_k", "d_v")
SHAPES = [
    # rows, path, (query heads, heads), dim
    (1, 0, (1, 1), 64),
    (1, 700, (3, 1), 64),
    (16, 33, (4, 1), 64),
    (31, 1, (3, 3), 32),
    (64, 1024, (9, 3), 64),
    (130, 0, (4, 1), 128),
    (129, 127, (3, 1), 48),
    (200, 45, (2, 2), 16),
    (300, 0, (9, 3), 64),
    (257, 300, (4, 1), 128),
    (96, 200, (2, 1), 256),
]


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.delenv("LORALOOP_KERNELS", raising=False)
    monkeypatch.setenv("LORALOOP_ISA", request.param)
    found, reason = load_kernels()
    if found is None or found.isa != request.param:
        pytest.skip(f"no kernels for {request.param} here: {reason}")
    return found


def run(kernels: Kernels, case: Case, end: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    end = case.end if end is None else end
    out, lse = kernels.attention_forward(case.q, case.k, case.v, end=end, scale=case.scale)
    d_k, d_v = torch.zeros(case.k.shape), torch.zeros(case.v.shape)
    d_q = kernels.attention_backward(
        case.d_out, q=case.q, k=case.k, v=case.v, out=out, lse=lse, end=end, scale=case.scale, d_k=d_k, d_v=d_v
    )
    return {"out": out, "lse": lse, "d_q": d_q, "d_k": d_k, "d_v": d_v}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_random_tree_is_as_exact_as_torch_flash_attention(kernels: Kernels, shape: tuple, seed: int) -> None:
    case = make_case(*shape, seed=seed)
    mask = visible(case.end, shape[1])
    got, true, torchs = run(kernels, case), dense(case, mask), flash(case, mask)
    assert (got["lse"].double() - true["lse"]).abs().max() < 2e-5
    for name in NAMES:
        error, theirs = relative_error(got[name], true[name]), relative_error(torchs[name], true[name])
        # a single row's gradient of q and k is rounding noise round zero, in torch as here; hence the absolute floor
        noise = 4e-3 if true[name].norm() > 1e-3 else 1.0
        assert error <= max(1.5 * theirs, noise), f"{name}: {error:.2e}, torch {theirs:.2e}"
        assert error < 8e-3 or noise == 1.0


@pytest.mark.parametrize("first", [289, 301, 319, 700])
def test_rows_that_see_nothing_of_many_keys_before_their_own_are_right(kernels: Kernels, first: int) -> None:
    """Two long siblings, the border between them inside a group of rows: for its second half all keys so far were hidden."""
    case = make_case(first + 290, 0, (3, 1), 64)
    end = torch.full((first + 290,), first + 290, dtype=torch.int32)
    end[:first] = first
    got, true = run(kernels, case, end), dense(case, visible(end, 0))
    assert (got["lse"].double() - true["lse"]).abs().max() < 2e-5
    for name in NAMES:
        assert relative_error(got[name], true[name]) < 8e-3, name


def test_scores_far_apart_neither_overflow_nor_lose_the_small(kernels: Kernels) -> None:
    case = make_case(150, 90, (3, 1), 64, spread=12.0)
    got, true = run(kernels, case), dense(case, visible(case.end, 90))
    assert all(torch.isfinite(tensor).all() for tensor in got.values())
    assert relative_error(got["lse"], true["lse"]) < 1e-6
    assert relative_error(got["out"], true["out"]) < 4e-3


def mutations(end: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ends that are wrong in one row: a node that ends one row early, and a leaf's last row that its next sibling sees."""
    n_rows = len(end)
    early = end.clone()
    inner = next(row for row in range(n_rows - 1, -1, -1) if row + 1 < end[row])
    early[inner] -= 1
    leak = end.clone()
    leaf = next(row for row in range(n_rows - 2, -1, -1) if end[row] == row + 1)
    leak[leaf] += 1
    return {"one row early": early, "seen by a sibling": leak}


@pytest.mark.parametrize("which", ["one row early", "seen by a sibling"])
def test_a_mask_that_is_wrong_in_one_row_is_noticed(kernels: Kernels, which: str) -> None:
    case = make_case(70, 20, (3, 1), 64, seed=4)
    wrong = run(kernels, case, mutations(case.end)[which])
    true = dense(case, visible(case.end, 20))
    assert (wrong["lse"].double() - true["lse"]).abs().max() > 1e-3
    worst = max((wrong[name].double() - true[name]).abs().max().item() for name in NAMES)
    right = run(kernels, case)
    assert worst > 3 * max((right[name].double() - true[name]).abs().max().item() for name in NAMES)


def test_gradients_of_keys_and_values_are_added(kernels: Kernels) -> None:
    case = make_case(100, 60, (3, 1), 64)
    once = run(kernels, case)
    d_k, d_v = torch.full(case.k.shape, 0.5), torch.full(case.v.shape, -2.0)
    out, lse = kernels.attention_forward(case.q, case.k, case.v, end=case.end, scale=case.scale)
    for _ in range(2):
        kernels.attention_backward(
            case.d_out, q=case.q, k=case.k, v=case.v, out=out, lse=lse, end=case.end, scale=case.scale, d_k=d_k, d_v=d_v
        )
    torch.testing.assert_close(d_k, 0.5 + 2 * once["d_k"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_v, 2 * once["d_v"] - 2.0, rtol=1e-5, atol=1e-5)


def test_outputs_may_be_slices_and_nothing_else_is_touched(kernels: Kernels) -> None:
    case = make_case(77, 40, (4, 2), 64)
    plain = run(kernels, case)
    wide = torch.full((77, 4 * 64 + 32), 7.0, dtype=torch.bfloat16)
    wide_q, wide_k, wide_v = wide.clone(), torch.full((117, 2 * 64 + 16), 7.0), torch.full((117, 2 * 64 + 16), 7.0)
    out, d_q = (w[:, 16:-16].view(77, 4, 64) for w in (wide, wide_q))
    d_k, d_v = (w[:, 8:-8].view(117, 2, 64) for w in (wide_k, wide_v))
    _, lse = kernels.attention_forward(case.q, case.k, case.v, end=case.end, scale=case.scale, out=out)
    d_k.zero_()
    d_v.zero_()
    kernels.attention_backward(
        case.d_out, q=case.q, k=case.k, v=case.v, out=out, lse=lse, end=case.end, scale=case.scale, d_k=d_k, d_v=d_v, d_q=d_q
    )
    for name, tensor in {"out": out, "d_q": d_q, "d_k": d_k, "d_v": d_v}.items():
        assert torch.equal(tensor, plain[name]), name
    for whole, margin in ((wide, 16), (wide_q, 16), (wide_k, 8), (wide_v, 8)):
        assert (whole[:, :margin] == 7).all()
        assert (whole[:, -margin:] == 7).all()


@pytest.mark.parametrize("shape", [(300, 200, (9, 3), 64), (40, 1000, (4, 1), 128)], ids=str)
def test_the_same_bits_on_every_run_and_any_number_of_threads(kernels: Kernels, shape: tuple) -> None:
    case, threads = make_case(*shape), torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 5, 5):
            torch.set_num_threads(count)
            runs.append(run(kernels, case))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        for name, tensor in other.items():
            assert torch.equal(tensor, runs[0][name]), name


def test_calls_at_one_time_have_memory_of_their_own(kernels: Kernels) -> None:
    cases = [make_case(200 + 60 * i, 100, (3, 1), 64, seed=i) for i in range(3)]
    alone = [run(kernels, case) for case in cases]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda i: (i % 3, run(kernels, cases[i % 3])), range(60)))
    for i, got in together:
        for name, tensor in got.items():
            assert torch.equal(tensor, alone[i][name]), name


@pytest.mark.parametrize("shape", [(100, 30, (3, 1), 48), (33, 0, (1, 1), 64)], ids=str)
def test_what_a_call_leaves_in_memory_does_not_reach_the_next(kernels: Kernels, shape: tuple) -> None:
    case, larger = make_case(*shape), make_case(300, 200, (4, 1), 128)
    before = run(kernels, case)
    run(kernels, replace(larger, **{name: torch.full_like(getattr(larger, name), torch.nan) for name in ("q", "k", "v", "d_out")}))
    for name, tensor in run(kernels, case).items():
        assert torch.equal(tensor, before[name]), name


def test_a_product_of_torch_is_right_before_and_after(kernels: Kernels) -> None:
    a, b = torch.randn(64, 256).bfloat16(), torch.randn(256, 512).bfloat16()
    before = a @ b
    run(kernels, make_case(64, 64, (3, 1), 64))
    assert torch.equal(a @ b, before)


def test_no_rows_give_nothing_and_touch_nothing(kernels: Kernels) -> None:
    case = make_case(0, 8, (3, 1), 64)
    got = run(kernels, case)
    assert got["out"].shape == (0, 3, 64)
    assert got["lse"].shape == (3, 0)
    assert not got["d_k"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"end": torch.zeros(8, dtype=torch.int64)}, "end must be"),
        ({"k": torch.zeros(4, 1, 64).bfloat16(), "v": torch.zeros(4, 1, 64).bfloat16()}, "4 keys for 8 rows"),
        ({"q": torch.zeros(8, 3, 64)}, "q must be"),
        ({"q": torch.zeros(3, 8, 64).bfloat16().transpose(0, 1)}, "contiguous"),
        ({"k": torch.zeros(9, 2, 64).bfloat16(), "v": torch.zeros(9, 2, 64).bfloat16()}, "3 query heads cannot share 2"),
        (
            {"q": torch.zeros(8, 3, 40).bfloat16(), "k": torch.zeros(9, 1, 40).bfloat16(), "v": torch.zeros(9, 1, 40).bfloat16()},
            "heads of 40",
        ),
        ({"scale": -1.0}, "scale must be positive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(kernels: Kernels, change: dict, message: str) -> None:
    case = make_case(8, 1, (3, 1), 64)
    arguments = {"q": case.q, "k": case.k, "v": case.v, "end": case.end, "scale": case.scale} | change
    with pytest.raises(ValueError, match=message):
        kernels.attention_forward(**arguments)
