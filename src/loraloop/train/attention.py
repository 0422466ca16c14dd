"""Attention of a block of tree rows over the path above it and over itself, without a mask and without copies of K and V.

A run of rows with one `end` is a causal square; the rows behind it that see it are a rectangle, and the path above is another.
Each piece is one call of torch's flash kernel for the CPU; pieces of a row are merged by their log-sum-exp. The backward pass calls
the kernel's own backward with the *merged* output and log-sum-exp, which makes every piece's probabilities those of the whole row;
what it adds to keys and values is summed in float32 at least. bfloat16 blocks go through our own kernels where the machine has them
(`kernels.py`), which take the same arguments and the block's `ends` instead of pieces.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loraloop.train.tree import Block

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001  the public function hides the log-sum-exp
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001

Piece = tuple[slice, slice, bool]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse): out (rows, heads, size) like `q`, lse (heads, rows) in float32 at least.

    `q` is (rows, heads, size); `k` and `v` are (depth + rows, kv heads, size): the path above the block, then the block itself.
    """
    n_kv = k.shape[1]
    queries, keys, values = _by_head(q, n_kv), _shared(k, q.shape[1]), _shared(v, q.shape[1])
    precise = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(queries.shape, dtype=precise)  # (kv heads, group, rows, size)
    lse = torch.full(queries.shape[:-1], -torch.inf, dtype=precise)  # (kv heads, group, rows)
    for rows, keys_at, causal in _pieces(block):
        part, part_lse = _forward(queries[:, :, rows], keys[:, :, keys_at], values[:, :, keys_at], 0.0, causal, scale=scale)
        merged = torch.logaddexp(lse[:, :, rows], part_lse)
        out[:, :, rows] *= (lse[:, :, rows] - merged).exp_().unsqueeze(-1)
        out[:, :, rows] += part * (part_lse - merged).exp_().unsqueeze(-1)
        lse[:, :, rows] = merged
    return out.to(q.dtype).permute(2, 0, 1, 3).reshape(q.shape), lse.reshape(q.shape[1], -1)


def attend_backward(
    d_out: torch.Tensor,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    block: Block,
    scale: float,
    d_kv: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """The gradient of `q`; those of `k` and `v` are added to `d_kv`, (depth + rows, kv heads, size) in float32 at least.

    `saved` is (q, k, v, out, lse) of the forward pass.
    """
    q, k, v, out, lse = saved
    n_heads, n_kv = q.shape[1], k.shape[1]
    queries, keys, values = _by_head(q, n_kv), _shared(k, n_heads), _shared(v, n_heads)
    outs, d_outs = _by_head(out, n_kv), _by_head(d_out, n_kv)
    sums = lse.view(n_kv, n_heads // n_kv, -1)
    d_q = torch.zeros(queries.shape, dtype=d_kv[0].dtype)
    for rows, keys_at, causal in _pieces(block):
        args = (queries[:, :, rows], keys[:, :, keys_at], values[:, :, keys_at], outs[:, :, rows], sums[:, :, rows])
        part_q, part_k, part_v = _backward(d_outs[:, :, rows], *args, 0.0, causal, scale=scale)
        d_q[:, :, rows] += part_q
        for total, part in zip(d_kv, (part_k, part_v), strict=True):
            total[keys_at] += part.sum(1, dtype=total.dtype).transpose(0, 1)
    return d_q.to(q.dtype).permute(2, 0, 1, 3).reshape(q.shape)


def _pieces(block: Block) -> Iterator[Piece]:
    """(query rows, key rows, causal) of each kernel call; key rows count from the beginning of the path."""
    if block.depth:
        yield slice(0, block.n_rows), slice(0, block.depth), False
    for start, stop, end in block.segments():
        keys_at = slice(block.depth + start, block.depth + stop)
        yield slice(start, stop), keys_at, True
        if end > stop:
            yield slice(stop, end), keys_at, False


def _by_head(x: torch.Tensor, n_kv: int) -> torch.Tensor:
    """(rows, heads, size) as (kv heads, heads of the group, rows, size)."""
    return x.view(x.shape[0], n_kv, -1, x.shape[-1]).permute(1, 2, 0, 3)


def _shared(x: torch.Tensor, n_heads: int) -> torch.Tensor:
    """(rows, kv heads, size) as (kv heads, heads of the group, rows, size), every head of a group reading the same memory."""
    return x.permute(1, 0, 2).unsqueeze(1).expand(-1, n_heads // x.shape[1], -1, -1)
