"""One decoder layer, forward and backward, on the rows of a block: a mixer (attention or short convolution), then a gated MLP.

Written out instead of left to autograd, so that what is kept between the passes is chosen: matrix products are kept, norms, rotations
and activations are computed again. What the rows of a path give to those below them (keys and values, a convolution's inputs) lies in
a `Stack`, and their gradients in it, where every block below adds its share before its ancestors' backward pass reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch

from loraloop.train.adapters import FusedLinear
from loraloop.train.arithmetic import TorchArithmetic
from loraloop.train.tree import Block


class Keep(IntEnum):
    """What a layer keeps for its backward pass; what it does not is computed again."""

    INPUTS = 0
    """Only what came in."""
    MIXER = 1
    """The MLP's wide products are computed again."""
    PRODUCTS = 2
    """Every matrix product."""


@dataclass(frozen=True)
class Call:
    """What all layers need to know of a block."""

    block: Block
    cos: torch.Tensor  # (rows, head size / 2)
    sin: torch.Tensor
    parents: torch.Tensor
    """(convolution size - 1, rows) the row above, the one above that, …: places in the stack, -1 before the beginning."""
    seed: int | None
    """Draws the dropout of this block; None is without."""
    arithmetic: TorchArithmetic

    @property
    def here(self) -> slice:
        """The block's own rows in a stack."""
        return slice(self.block.depth, self.block.depth + self.block.n_rows)


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm with frozen weights."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Stack:
    """By place on the path: what a mixer gives to rows further down, and the sum of the gradients that come back."""

    values: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor, ...]  # in float32 at least


class Mixer(Protocol):
    """The part of a layer in which rows see one another."""

    norm: Norm
    output: FusedLinear

    @property
    def kept_values(self) -> int:
        """Values that `backward` wants kept for each row, the output's filled input among them."""
        ...

    @property
    def shared_values(self) -> int:
        """Values of each row in a stack; there are as many gradients."""
        ...

    def new_stack(self, n_rows: int) -> Stack:
        """Room for a path of `n_rows`."""
        ...

    def forward(self, x: torch.Tensor, call: Call, stack: Stack) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """(rows, hidden) with the mixer's output added to `x`, and what `backward` wants to have."""
        ...

    def backward(self, d_x: torch.Tensor, x: torch.Tensor, saved: tuple[torch.Tensor, ...], call: Call, stack: Stack) -> None:
        """Turn the gradient of what `forward` gave into that of `x`, in place."""
        ...


class Attention:
    """Grouped-query attention with rotary positions, with or without norms on queries and keys."""

    def __init__(
        self, norm: Norm, qkv: FusedLinear, output: FusedLinear, *, head_norms: tuple[Norm, Norm] | None, shape: HeadShape
    ) -> None:
        self.norm = norm
        self.qkv = qkv
        self.output = output
        self.head_norms = head_norms
        self.shape = shape

    @property
    def kept_values(self) -> int:
        """Queries, raw keys where they have a norm, log-sum-exp in float32."""
        raw = self.shape.n_kv_heads * self.shape.size if self.head_norms else 0
        return self.output.weight.shape[1] + self.shape.n_heads * (self.shape.size + 2) + raw

    @property
    def shared_values(self) -> int:
        """Keys and values."""
        return 2 * self.shape.n_kv_heads * self.shape.size

    def new_stack(self, n_rows: int) -> Stack:
        """Keys and values."""
        size = (n_rows, self.shape.n_kv_heads, self.shape.size)
        dtype = self.qkv.weight.dtype
        precise = torch.promote_types(dtype, torch.float32)
        return Stack(
            (torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)),
            (torch.zeros(size, dtype=precise), torch.zeros(size, dtype=precise)),
        )

    def forward(self, x: torch.Tensor, call: Call, stack: Stack) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """See Mixer; saves (raw q, raw k, output's input, log-sum-exp), the raw ones rotated already where they have no norm."""
        heads, n_rows = self.shape, len(x)
        normed, _ = enter(self.norm, self.qkv, x, call)
        n_q, n_k = heads.n_heads * heads.size, heads.n_kv_heads * heads.size
        q = self.qkv.forward(normed, slice(0, n_q)).view(n_rows, -1, heads.size)
        kv = self.qkv.forward(normed, slice(n_q, n_q + 2 * n_k)).view(n_rows, -1, heads.size)
        k, v = kv[:, : heads.n_kv_heads], kv[:, heads.n_kv_heads :]
        keys, values = stack.values
        values[call.here] = v
        keys[call.here] = k
        saved_k = k.contiguous() if self.head_norms else k.new_empty(0)
        rotated = self._rotate(q, keys[call.here], call)
        filled = self.output.new_input(n_rows)
        out = filled[:, :n_q].view(n_rows, -1, heads.size)
        end = call.here.stop
        lse = call.arithmetic.attend(rotated, (keys[:end], values[:end]), call.block, scale=heads.scale, out=out)
        self.output.fill(filled, call.seed)
        return self.output.forward(filled, add_to=x), (q, saved_k, filled, lse)

    def backward(self, d_x: torch.Tensor, x: torch.Tensor, saved: tuple[torch.Tensor, ...], call: Call, stack: Stack) -> None:
        """See Mixer."""
        q, raw_k, filled, lse = saved
        heads, n_rows, arithmetic = self.shape, len(x), call.arithmetic
        n_q, n_k, end = heads.n_heads * heads.size, heads.n_kv_heads * heads.size, call.here.stop
        d_filled = self.output.finish(d_x, self.output.backward(d_x), filled, call.seed)
        d_qkv = torch.empty(n_rows, n_q + 2 * n_k, dtype=x.dtype)
        d_heads = d_qkv.view(n_rows, -1, heads.size)
        n_qk = heads.n_heads + heads.n_kv_heads
        d_q, d_k, d_v = d_heads[:, : heads.n_heads], d_heads[:, heads.n_heads : n_qk], d_heads[:, n_qk:]
        rotated = self._rotate(q, None, call)
        keys, values = stack.values
        attended = (rotated, keys[:end], values[:end], filled[:, :n_q].view(n_rows, -1, heads.size), lse)
        d_kv = (stack.gradients[0][:end], stack.gradients[1][:end])
        arithmetic.attend_backward(d_filled.view(n_rows, -1, heads.size), attended, call.block, scale=heads.scale, d_kv=d_kv, d_q=d_q)
        d_k.copy_(stack.gradients[0][call.here])
        d_v.copy_(stack.gradients[1][call.here])
        arithmetic.rotate(d_heads[:, :n_qk], call.cos, call.sin, inverse=True)
        if self.head_norms:
            for norm, raw, gradient in zip(self.head_norms, (q, raw_k), (d_q, d_k), strict=True):
                gradient.copy_(_norm_gradient(norm, raw, gradient, arithmetic))
        normed, scale = enter(self.norm, self.qkv, x, call)
        d_normed = self.qkv.finish(d_qkv, self.qkv.backward(d_qkv), normed, call.seed)
        arithmetic.rms_norm_backward(d_normed, x, self.norm.weight, scale, d_x)

    def _rotate(self, q: torch.Tensor, k: torch.Tensor | None, call: Call) -> torch.Tensor:
        """The queries as attention wants them, and the keys in place.

        Without norms the queries are rotated in place in the forward pass, which has keys, and are so already in the backward pass.
        """
        if self.head_norms:
            q = _norm_heads(self.head_norms[0], q, call.arithmetic)
            if k is not None:
                k.copy_(_norm_heads(self.head_norms[1], k, call.arithmetic))
        if k is not None:
            call.arithmetic.rotate(k, call.cos, call.sin)
        if k is not None or self.head_norms:
            call.arithmetic.rotate(q, call.cos, call.sin)
        return q


@dataclass(frozen=True)
class HeadShape:
    """Heads of an attention."""

    n_heads: int
    n_kv_heads: int
    size: int
    scale: float


class ShortConvolution:
    """LFM2's gated short convolution: each row sees itself and the few rows above it on its path."""

    def __init__(self, norm: Norm, in_proj: FusedLinear, output: FusedLinear, kernel: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.norm = norm
        self.in_proj = in_proj
        self.output = output
        self.kernel = kernel  # (hidden, size): the last column is for the row itself, the one before for the row above it
        self.bias = bias

    @property
    def kept_values(self) -> int:
        """The three gates."""
        return self.output.weight.shape[1] + self.in_proj.weight.shape[0]

    @property
    def shared_values(self) -> int:
        """The convolution's inputs."""
        return len(self.kernel)

    def new_stack(self, n_rows: int) -> Stack:
        """The convolution's inputs."""
        dtype = self.kernel.dtype
        size = (n_rows, len(self.kernel))
        return Stack((torch.empty(size, dtype=dtype),), (torch.zeros(size, dtype=torch.promote_types(dtype, torch.float32)),))

    def forward(self, x: torch.Tensor, call: Call, stack: Stack) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """See Mixer; saves (the three gates, output's input)."""
        normed, _ = enter(self.norm, self.in_proj, x, call)
        gates = self.in_proj.forward(normed)
        before, after, inner = gates.chunk(3, -1)
        torch.mul(before, inner, out=stack.values[0][call.here])
        filled = self.output.new_input(len(x))
        torch.mul(after, self._convolve(call, stack), out=filled[:, : after.shape[1]])
        self.output.fill(filled, call.seed)
        return self.output.forward(filled, add_to=x), (gates, filled)

    def backward(self, d_x: torch.Tensor, x: torch.Tensor, saved: tuple[torch.Tensor, ...], call: Call, stack: Stack) -> None:
        """See Mixer."""
        gates, filled = saved
        before, after, inner = gates.chunk(3, -1)
        d_y = self.output.finish(d_x, self.output.backward(d_x), filled, call.seed)
        d_gates = torch.empty_like(gates)
        d_before, d_after, d_inner = d_gates.chunk(3, -1)
        torch.mul(d_y, self._convolve(call, stack), out=d_after)
        total = stack.gradients[0]
        d_convolved = d_y.to(total.dtype) * after
        total[call.here] += d_convolved * self.kernel[:, -1]
        for distance, parents in enumerate(call.parents, 1):
            exists = parents >= 0
            share = d_convolved * self.kernel[:, -1 - distance]
            total.index_add_(0, parents.clamp(min=0), share * exists.unsqueeze(-1))
        own = total[call.here]
        d_before.copy_(own * inner)
        d_inner.copy_(own * before)
        normed, scale = enter(self.norm, self.in_proj, x, call)
        d_normed = self.in_proj.finish(d_gates, self.in_proj.backward(d_gates), normed, call.seed)
        call.arithmetic.rms_norm_backward(d_normed, x, self.norm.weight, scale, d_x)

    def _convolve(self, call: Call, stack: Stack) -> torch.Tensor:
        """(rows, hidden): along each row's own path, never from a sibling."""
        values = stack.values[0]
        wide = torch.promote_types(values.dtype, torch.float32)
        total = values[call.here].to(wide) * self.kernel[:, -1]
        for distance, parents in enumerate(call.parents, 1):
            above = values.index_select(0, parents.clamp(min=0)) * (parents >= 0).unsqueeze(-1)
            total += above * self.kernel[:, -1 - distance]
        if self.bias is not None:
            total += self.bias
        return total.to(values.dtype)


class Mlp:
    """A gated MLP: down(silu(gate) * up)."""

    def __init__(self, norm: Norm, gate_up: FusedLinear, down: FusedLinear) -> None:
        self.norm = norm
        self.gate_up = gate_up
        self.down = down

    def forward(self, x: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, hidden) with the MLP's output added to `x`, and the wide products, which `backward` can do without."""
        normed, _ = enter(self.norm, self.gate_up, x, call)
        gate_up = self.gate_up.forward(normed)
        h = self.down.new_input(len(x))
        call.arithmetic.swiglu(gate_up, h[:, : self.down.n_inputs])
        self.down.fill(h, call.seed)
        return self.down.forward(h, add_to=x), gate_up

    def backward(self, d_x: torch.Tensor, x: torch.Tensor, gate_up: torch.Tensor | None, call: Call) -> None:
        """Turn the gradient of what `forward` gave into that of `x`, in place; `gate_up` is used up."""
        normed, scale = enter(self.norm, self.gate_up, x, call)
        products = self.gate_up.forward(normed) if gate_up is None else gate_up
        d_h = self.down.backward(d_x)
        self.down.add_input_gradient(d_h, call.seed)
        h = self.down.new_input(len(x))
        call.arithmetic.swiglu_backward(d_h[:, : self.down.n_inputs], products, h[:, : self.down.n_inputs])
        self.down.fill(h, call.seed)
        self.down.add_b_gradients(d_x, h[:, self.down.n_inputs :])
        self.down.add_a_gradients(d_h, h[:, : self.down.n_inputs], call.seed)
        d_normed = self.gate_up.finish(products, self.gate_up.backward(products), normed, call.seed)
        call.arithmetic.rms_norm_backward(d_normed, x, self.norm.weight, scale, d_x)


@dataclass
class LayerSaved:
    """What a layer kept of its forward pass."""

    x: torch.Tensor
    mixer: tuple[torch.Tensor, ...] | None = None
    middle: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """A mixer and an MLP, each on top of the residual stream."""

    mixer: Mixer
    mlp: Mlp

    def forward(self, x: torch.Tensor, call: Call, stack: Stack, keep: Keep) -> tuple[torch.Tensor, LayerSaved]:
        """(rows, hidden) of the layer, and what its backward pass needs."""
        middle, mixer = self.mixer.forward(x, call, stack)
        out, gate_up = self.mlp.forward(middle, call)
        saved = LayerSaved(x)
        if keep >= Keep.MIXER:
            saved.mixer, saved.middle = mixer, middle
        if keep >= Keep.PRODUCTS:
            saved.gate_up = gate_up
        return out, saved

    def backward(self, d_x: torch.Tensor, saved: LayerSaved, call: Call, stack: Stack) -> None:
        """Turn the gradient of the layer's output into that of its input, in place, and add to the adapters' gradients."""
        mixer, middle = saved.mixer, saved.middle
        if mixer is None or middle is None:
            middle, mixer = self.mixer.forward(saved.x, call, stack)
        self.mlp.backward(d_x, middle, saved.gate_up, call)
        saved.gate_up = saved.middle = None
        self.mixer.backward(d_x, saved.x, mixer, call, stack)


def enter(norm: Norm, linear: FusedLinear, x: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The filled input of `linear`, the norm of `x`; and the norm's scale."""
    filled = linear.new_input(len(x))
    scale = call.arithmetic.rms_norm(x, norm.weight, norm.eps, filled[:, : linear.n_inputs])
    linear.fill(filled, call.seed)
    return filled, scale


def _norm_heads(norm: Norm, x: torch.Tensor, arithmetic: TorchArithmetic) -> torch.Tensor:
    """A norm over each head of (rows, heads, size)."""
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(flat)
    arithmetic.rms_norm(flat, norm.weight, norm.eps, out)
    return out.view(x.shape)


def _norm_gradient(norm: Norm, raw: torch.Tensor, d_out: torch.Tensor, arithmetic: TorchArithmetic) -> torch.Tensor:
    """The gradient of `_norm_heads`."""
    flat = raw.reshape(-1, raw.shape[-1])
    scale = arithmetic.rms_norm(flat, norm.weight, norm.eps, torch.empty_like(flat))
    d_x = torch.zeros_like(flat)
    arithmetic.rms_norm_backward(d_out.reshape(flat.shape), flat, norm.weight, scale, d_x)
    return d_x.view(raw.shape)
