"""Attention over a prefix tree in float64 with an explicit mask, and random trees: what the kernels are compared with."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One block's tensors, as slices of wider matrices, the way a fused projection gives them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor
    end: torch.Tensor
    scale: float


def make_case(n_rows: int, n_path: int, heads: tuple[int, int], dim: int, *, seed: int = 0, spread: float = 1.0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    n_heads, n_kv = heads
    n_keys = n_rows + n_path

    def normal(tokens: int, width: int) -> torch.Tensor:
        return (torch.randn(tokens, width, generator=generator) * spread).bfloat16()

    fused = normal(n_keys, (n_heads + 2 * n_kv) * dim)
    q, k, v = fused.split([n_heads * dim, n_kv * dim, n_kv * dim], dim=1)
    return Case(
        q=q[n_path:].view(n_rows, n_heads, dim),
        k=k.view(n_keys, n_kv, dim),
        v=v.view(n_keys, n_kv, dim),
        d_out=normal(n_rows, n_heads * dim).view(n_rows, n_heads, dim),
        end=tree_ends(n_rows, seed),
        scale=dim**-0.5,
    )


def tree_ends(n_rows: int, seed: int) -> torch.Tensor:
    """The end of each row's subtree in a random tree: a node of some rows, then children that share the rest."""
    chance = random.Random(seed)
    ends = [n_rows] * n_rows
    todo = [(0, n_rows)]
    while todo:
        start, stop = todo.pop()
        if start >= stop:
            continue
        own = chance.randint(1, max(1, (stop - start) // 2))
        ends[start : start + own] = [stop] * own
        start += own
        while start < stop:
            size = chance.randint(1, stop - start)
            todo.append((start, start + size))
            start += size
    return torch.tensor(ends, dtype=torch.int32)


def visible(end: torch.Tensor, n_path: int) -> torch.Tensor:
    """(rows, keys): which keys a row sees."""
    rows = torch.arange(len(end))
    own = (rows[None] <= rows[:, None]) & (rows[:, None] < end[None].long())
    return torch.cat([torch.ones(len(end), n_path, dtype=torch.bool), own], dim=1)


def dense(case: Case, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """out, lse, d_q, d_k, d_v in float64 from the same bfloat16 inputs."""
    q, k, v = (tensor.double().detach().requires_grad_() for tensor in (case.q, case.k, case.v))
    shared = case.q.shape[1] // case.k.shape[1]
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(shared, 1)) * case.scale
    scores = scores.masked_fill(~mask, -math.inf)
    out = torch.einsum("hts,shd->thd", scores.softmax(-1), v.repeat_interleave(shared, 1))
    out.backward(case.d_out.double())
    return {"out": out.detach(), "lse": scores.logsumexp(-1).detach(), "d_q": q.grad, "d_k": k.grad, "d_v": v.grad}


def flash(case: Case, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same by torch's bfloat16 flash attention, which takes the mask as numbers."""
    q, k, v = (tensor.detach().clone().requires_grad_() for tensor in (case.q, case.k, case.v))
    as_batch = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
    bias = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, -math.inf)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(*as_batch, attn_mask=bias, scale=case.scale, enable_gqa=True)
    out = out[0].transpose(0, 1)
    out.backward(case.d_out)
    return {"out": out.detach(), "d_q": q.grad, "d_k": k.grad, "d_v": v.grad}


def relative_error(got: torch.Tensor, true: torch.Tensor) -> float:
    """The norm of the difference over the norm of the truth; 0 for nothing."""
    size = true.double().norm().item()
    return (got.double() - true).norm().item() / size if size else got.double().norm().item()
