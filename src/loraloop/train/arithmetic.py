"""What a layer does besides matrix products, forward and backward: norm, rotation, gated activation, attention, softmax of the head.

`TorchArithmetic` computes in any float type, in float32 at least inside, rounded once. `NativeArithmetic` does the same in bfloat16
with our own kernels, each in one pass over memory. Functions write into what they are given, which may be columns of a wider matrix.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from typing_extensions import override

from loraloop.train import attention
from loraloop.train.kernels import HEAD_DIM_STEP, MAX_HEAD_DIM, Kernels, load_kernels
from loraloop.train.tree import Block

Saved = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""(q, k, v, out, log-sum-exp) of an attention."""
Pair = tuple[torch.Tensor, torch.Tensor]
"""Of keys and values."""


class TorchArithmetic:
    """In torch operations, for every float type."""

    name = "torch"

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
        """`out` := x / rms(x) * weight over the last axis; gives 1 / rms, (rows,). Zhang and Sennrich 2019."""
        wide = _wide(x)
        scale = wide.square().mean(-1).add_(eps).rsqrt_()
        out.copy_(wide * scale.unsqueeze(-1) * weight)
        return scale

    def rms_norm_backward(self, d_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, d_x: torch.Tensor) -> None:
        """`d_x` += the gradient of `rms_norm`, whose result was `scale`."""
        normed = _wide(x) * scale.unsqueeze(-1)
        d_normed = _wide(d_out) * weight
        inner = (d_normed * normed).mean(-1, keepdim=True)
        d_x.add_(((d_normed - normed * inner) * scale.unsqueeze(-1)).to(d_x.dtype))

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool = False) -> None:
        """Turn `x` (rows, heads, size) in place by its rotary embedding; `cos` and `sin` are (rows, size / 2). Su et al. 2021."""
        half = x.shape[-1] // 2
        one, other = _wide(x[..., :half]).clone(), _wide(x[..., half:]).clone()
        c, s = cos.unsqueeze(1), (-sin if inverse else sin).unsqueeze(1)
        x[..., :half] = one * c - other * s
        x[..., half:] = other * c + one * s

    def swiglu(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """`out` := silu(gate) * up, the two halves of `gate_up`. Shazeer 2020."""
        gate, up = _wide(gate_up).chunk(2, -1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    def swiglu_backward(self, d_h: torch.Tensor, gate_up: torch.Tensor, h: torch.Tensor) -> None:
        """Turn `gate_up` into its own gradient, and `h` into silu(gate) * up once more."""
        gate, up = _wide(gate_up).chunk(2, -1)
        wide, sigmoid = _wide(d_h), torch.sigmoid(gate)
        activated = gate * sigmoid
        d_gate = wide * up * (sigmoid + activated * (1 - sigmoid))
        d_up = wide * activated
        h.copy_(activated * up)
        half = gate.shape[-1]
        gate_up[:, :half] = d_gate
        gate_up[:, half:] = d_up

    def attend(self, q: torch.Tensor, kv: Pair, block: Block, *, scale: float, out: torch.Tensor) -> torch.Tensor:
        """`out` := attention of the block's rows over path and block, see `attention.attend`; gives the log-sum-exp (heads, rows)."""
        result, lse = attention.attend(q, *kv, block, scale)
        out.copy_(result)
        return lse

    def attend_backward(self, d_out: torch.Tensor, saved: Saved, block: Block, *, scale: float, d_kv: Pair, d_q: torch.Tensor) -> None:
        """Write the gradient of the queries into `d_q`; those of keys and values are added to `d_kv`."""
        d_q.copy_(attention.attend_backward(d_out, saved, block, scale, d_kv))

    def softmax(self, logits: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Turn each row of `logits` into its factor times its softmax, in place; gives the rows' log-sum-exp."""
        wide = _wide(logits)
        lse = torch.logsumexp(wide, -1)
        logits.copy_((wide - lse.unsqueeze(-1)).exp_().mul_(factors.unsqueeze(-1)))
        return lse

    def dropout(self, x: torch.Tensor, keep: float, draw: tuple[int, int], out: torch.Tensor, *, add: bool = False) -> None:
        """`out` := x * mask / keep, or += that; each value is kept with probability `keep`, in steps of 1/65536.

        `draw` is (key, number of the first row): the mask follows from key, row and column alone, however rows are cut into blocks.
        16 bits are drawn for a value, which is much faster than torch's own draws on a CPU. Salmon et al. 2011.
        """
        n_rows, n = x.shape
        n_counters = -(-n // 16)  # of a row; each gives 4 words of 64 bits
        bits = np.random.Philox(key=draw[0] % 2**62).advance(draw[1] * n_counters)
        drawn = bits.random_raw(n_rows * n_counters * 4).view(np.uint16).reshape(n_rows, -1)[:, :n]
        value = x * torch.from_numpy(drawn < round(keep * 65536)) / keep
        if add:
            out.add_(value)
        else:
            out.copy_(value)

    def rank_products(self, u: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
        """`out` += u^T y, (ranks, columns) in float32 at least, of `u` (rows, ranks) and `y` (rows, columns): a LoRA matrix's gradient."""
        out.add_(torch.mm(u.t(), y))


class NativeArithmetic(TorchArithmetic):
    """In our own kernels, for bfloat16; every method as in TorchArithmetic."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.name = f"native ({kernels.isa})"

    @override
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
        return self.kernels.rms_norm(x, weight, eps=eps, out=out)[1]

    @override
    def rms_norm_backward(self, d_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, d_x: torch.Tensor) -> None:
        self.kernels.rms_norm_backward(d_out, x, weight, rstd=scale, d_x=d_x)

    @override
    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool = False) -> None:
        self.kernels.rope(x, cos, sin, sign=-1 if inverse else 1)

    @override
    def swiglu(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        gate, up = gate_up.chunk(2, -1)
        self.kernels.swiglu(gate, up, out=out)

    @override
    def swiglu_backward(self, d_h: torch.Tensor, gate_up: torch.Tensor, h: torch.Tensor) -> None:
        gate, up = gate_up.chunk(2, -1)
        self.kernels.swiglu_backward(d_h, gate, up, d_gate=gate, d_up=up, h=h)

    @override
    def attend(self, q: torch.Tensor, kv: Pair, block: Block, *, scale: float, out: torch.Tensor) -> torch.Tensor:
        return self.kernels.attention_forward(q, *kv, end=_ends(block), scale=scale, out=out)[1]

    @override
    def attend_backward(self, d_out: torch.Tensor, saved: Saved, block: Block, *, scale: float, d_kv: Pair, d_q: torch.Tensor) -> None:
        q, k, v, out, lse = saved
        d_k, d_v = d_kv
        self.kernels.attention_backward(d_out, q=q, k=k, v=v, out=out, lse=lse, end=_ends(block), scale=scale, d_k=d_k, d_v=d_v, d_q=d_q)

    @override
    def softmax(self, logits: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return self.kernels.head_softmax(logits, factors)

    @override
    def dropout(self, x: torch.Tensor, keep: float, draw: tuple[int, int], out: torch.Tensor, *, add: bool = False) -> None:
        self.kernels.dropout(x, keep=keep, draw=draw, out=out, add=add)

    @override
    def rank_products(self, u: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
        self.kernels.rank_products(u, y, out)


def choose_arithmetic(dtype: torch.dtype, head_sizes: Collection[int] = ()) -> tuple[TorchArithmetic, str]:
    """The fastest arithmetic for `dtype` and these sizes of attention heads on this machine, and why not the native one."""
    if dtype != torch.bfloat16:
        return TorchArithmetic(), "the native kernels are for bfloat16"
    for size in head_sizes:
        if size % HEAD_DIM_STEP or size > MAX_HEAD_DIM:
            return TorchArithmetic(), f"the native kernels are not for heads of {size} values"
    kernels, why = load_kernels()
    return (NativeArithmetic(kernels), "") if kernels else (TorchArithmetic(), why)


def _ends(block: Block) -> torch.Tensor:
    return torch.from_numpy(block.ends.astype("int32"))


def _wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
