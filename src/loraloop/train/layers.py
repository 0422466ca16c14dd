"""One decoder layer, forward and backward, on the rows of a block: a mixer (attention or short convolution), then a gated MLP.

Written out instead of left to autograd, so that what is kept between the passes is chosen: matrix products are kept, norms, rotations
and activations are computed again. What rows show to those further down (keys and values, a convolution's inputs) lies in the layer's
`Stack`, as do its gradients, where every block below adds its share before the backward pass of those above reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from loraloop.train.adapters import FusedLinear
from loraloop.train.arithmetic import TorchArithmetic
from loraloop.train.buffers import Keep, Stack
from loraloop.train.call import Call


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm with frozen weights."""

    weight: torch.Tensor
    eps: float


class Mixer(Protocol):
    """The part of a layer in which rows see one another."""

    norm: Norm
    output: FusedLinear

    @property
    def kept_values(self) -> int:
        """Values that `backward` wants kept for each row, the output's filled input among them."""
        ...

    @property
    def shared_shape(self) -> tuple[int, ...]:
        """Of what a row shows to those further down."""
        ...

    def forward(self, x: torch.Tensor, call: Call, stack: Stack, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`out` := (rows, hidden) with the mixer's output added to `x`; gives what `backward` wants to have."""
        ...

    def backward(self, d_x: torch.Tensor, x: torch.Tensor, saved: tuple[torch.Tensor, ...], call: Call, stack: Stack) -> None:
        """Turn the gradient of what `forward` gave into that of `x`, in place."""
        ...


@dataclass(frozen=True)
class HeadShape:
    """Heads of an attention."""

    n_heads: int
    n_kv_heads: int
    size: int
    scale: float


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
        return self.output.width + self.shape.n_heads * (self.shape.size + 2) + raw

    @property
    def shared_shape(self) -> tuple[int, ...]:
        """Keys, then values."""
        return (2 * self.shape.n_kv_heads, self.shape.size)

    def forward(self, x: torch.Tensor, call: Call, stack: Stack, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See Mixer; saves (q, raw k, the output's input, log-sum-exp). q is raw too where it has a norm, else rotated."""
        heads, end = self.shape, call.here.stop
        n_q = heads.n_heads * heads.size
        normed, _ = enter(self.norm, self.qkv, x, call, stack)
        q = self.qkv.forward(normed, stack.take("q", call.here, n_q), slice(0, n_q)).view(call.n_rows, -1, heads.size)
        shared = stack.values[call.here]
        self.qkv.forward(normed, shared.view(call.n_rows, -1), slice(n_q, None))
        k = shared[:, : heads.n_kv_heads]
        raw_k = k
        if self.head_norms:
            raw_k = stack.take("raw_k", call.here, k[0].numel()).view(k.shape).copy_(k)
            _norm_heads(self.head_norms[1], raw_k, call.arithmetic, out=k)
        call.arithmetic.rotate(k, call.cos, call.sin)
        rotated = self._norm_queries(q, call, stack)
        call.arithmetic.rotate(rotated, call.cos, call.sin)
        mixed = stack.take("mixed", call.here, self.output.width)
        attended = mixed[:, :n_q].view(call.n_rows, -1, heads.size)
        lse = call.arithmetic.attend(rotated, self._keys_and_values(stack.values[:end]), call.block, scale=heads.scale, out=attended)
        self.output.fill(mixed, call)
        self.output.forward(mixed, out, add_to=x)
        return q, raw_k, mixed, lse

    def backward(self, d_x: torch.Tensor, x: torch.Tensor, saved: tuple[torch.Tensor, ...], call: Call, stack: Stack) -> None:
        """See Mixer."""
        q, raw_k, mixed, lse = saved
        heads, arithmetic, end = self.shape, call.arithmetic, call.here.stop
        n_q, n_qk = heads.n_heads * heads.size, heads.n_heads + heads.n_kv_heads
        d_mixed = self.output.backward(d_x, stack.take("d_mixed", call.here, self.output.width))
        d_out = self.output.finish(d_x, d_mixed, mixed, call).view(call.n_rows, -1, heads.size)
        d_qkv = stack.take("d_qkv", call.here, n_q + stack.values[0].numel())
        d_heads = d_qkv.view(call.n_rows, -1, heads.size)
        rotated = self._norm_queries(q, call, stack)
        if self.head_norms:
            arithmetic.rotate(rotated, call.cos, call.sin)
        attended = mixed[:, :n_q].view(call.n_rows, -1, heads.size)
        forward = (rotated, *self._keys_and_values(stack.values[:end]), attended, lse)
        d_kv = self._keys_and_values(stack.gradients[:end])
        arithmetic.attend_backward(d_out, forward, call.block, scale=heads.scale, d_kv=d_kv, d_q=d_heads[:, : heads.n_heads])
        d_heads[:, heads.n_heads :].copy_(stack.gradients[call.here])
        arithmetic.rotate(d_heads[:, :n_qk], call.cos, call.sin, inverse=True)
        if self.head_norms:
            _norm_heads_backward(self.head_norms[0], q, d_heads[:, : heads.n_heads], arithmetic)
            _norm_heads_backward(self.head_norms[1], raw_k, d_heads[:, heads.n_heads : n_qk], arithmetic)
        normed, scale = enter(self.norm, self.qkv, x, call, stack)
        d_normed = self.qkv.backward(d_qkv, stack.take("d_normed", call.here, self.qkv.width))
        arithmetic.rms_norm_backward(self.qkv.finish(d_qkv, d_normed, normed, call), x, self.norm.weight, scale, d_x)

    def _norm_queries(self, q: torch.Tensor, call: Call, stack: Stack) -> torch.Tensor:
        """The norm of the queries, in memory of its own; the queries themselves where there is none."""
        if not self.head_norms:
            return q
        out = stack.take("rotated", call.here, q[0].numel()).view(q.shape)
        _norm_heads(self.head_norms[0], q, call.arithmetic, out)
        return out

    def _keys_and_values(self, shared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return shared[:, : self.shape.n_kv_heads], shared[:, self.shape.n_kv_heads :]


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
        return self.output.width + self.in_proj.weight.shape[0]

    @property
    def shared_shape(self) -> tuple[int, ...]:
        """The convolution's inputs."""
        return (len(self.kernel),)

    def forward(self, x: torch.Tensor, call: Call, stack: Stack, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See Mixer; saves (the three gates, the output's input)."""
        normed, _ = enter(self.norm, self.in_proj, x, call, stack)
        gates = self.in_proj.forward(normed, stack.take("gates", call.here, self.in_proj.weight.shape[0]))
        before, after, inner = gates.chunk(3, -1)
        torch.mul(before, inner, out=stack.values[call.here])
        mixed = stack.take("mixed", call.here, self.output.width)
        torch.mul(after, self._convolve(call, stack), out=mixed[:, : after.shape[1]])
        self.output.fill(mixed, call)
        self.output.forward(mixed, out, add_to=x)
        return gates, mixed

    def backward(self, d_x: torch.Tensor, x: torch.Tensor, saved: tuple[torch.Tensor, ...], call: Call, stack: Stack) -> None:
        """See Mixer."""
        gates, mixed = saved
        before, after, inner = gates.chunk(3, -1)
        d_mixed = self.output.backward(d_x, stack.take("d_mixed", call.here, self.output.width))
        d_y = self.output.finish(d_x, d_mixed, mixed, call)
        d_gates = stack.take("d_gates", call.here, gates.shape[1])
        d_before, d_after, d_inner = d_gates.chunk(3, -1)
        torch.mul(d_y, self._convolve(call, stack), out=d_after)
        total = stack.gradients
        d_convolved = d_y.to(total.dtype) * after
        total[call.here] += d_convolved * self.kernel[:, -1]
        for distance, parents in enumerate(call.parents, 1):
            share = d_convolved * self.kernel[:, -1 - distance] * (parents >= 0).unsqueeze(-1)
            total.index_add_(0, parents.clamp(min=0), share)
        own = total[call.here]
        d_before.copy_(own * inner)
        d_inner.copy_(own * before)
        normed, scale = enter(self.norm, self.in_proj, x, call, stack)
        d_normed = self.in_proj.backward(d_gates, stack.take("d_normed", call.here, self.in_proj.width))
        call.arithmetic.rms_norm_backward(self.in_proj.finish(d_gates, d_normed, normed, call), x, self.norm.weight, scale, d_x)

    def _convolve(self, call: Call, stack: Stack) -> torch.Tensor:
        """(rows, hidden): along each row's own path, never from a sibling."""
        total = stack.values[call.here].to(stack.gradients.dtype) * self.kernel[:, -1]
        for distance, parents in enumerate(call.parents, 1):
            above = stack.values.index_select(0, parents.clamp(min=0)) * (parents >= 0).unsqueeze(-1)
            total += above * self.kernel[:, -1 - distance]
        if self.bias is not None:
            total += self.bias
        return total.to(stack.values.dtype)


class Mlp:
    """A gated MLP: down(silu(gate) * up)."""

    def __init__(self, norm: Norm, gate_up: FusedLinear, down: FusedLinear) -> None:
        self.norm = norm
        self.gate_up = gate_up
        self.down = down

    def forward(self, x: torch.Tensor, call: Call, stack: Stack, out: torch.Tensor) -> torch.Tensor:
        """`out` := (rows, hidden) with the MLP's output added to `x`; gives the wide products, which `backward` can do without."""
        products = self._products(enter(self.norm, self.gate_up, x, call, stack)[0], call, stack)
        h = stack.take("h", call.here, self.down.width)
        call.arithmetic.swiglu(products, h[:, : self.down.n_inputs])
        self.down.fill(h, call)
        self.down.forward(h, out, add_to=x)
        return products

    def backward(self, d_x: torch.Tensor, x: torch.Tensor, products: torch.Tensor | None, call: Call, stack: Stack) -> None:
        """Turn the gradient of what `forward` gave into that of `x`, in place; `products` is used up."""
        n_wide = self.down.n_inputs
        normed, scale = enter(self.norm, self.gate_up, x, call, stack)
        products = self._products(normed, call, stack) if products is None else products
        d_h = self.down.backward(d_x, stack.take("d_h", call.here, self.down.width))
        self.down.add_input_gradient(d_h, call)
        h = stack.take("h", call.here, self.down.width)
        call.arithmetic.swiglu_backward(d_h[:, :n_wide], products, h[:, :n_wide])
        self.down.fill(h, call)
        self.down.add_b_gradients(d_x, h[:, n_wide:], call)
        self.down.add_a_gradients(d_h, h[:, :n_wide], call)
        d_normed = self.gate_up.backward(products, stack.take("d_normed", call.here, self.gate_up.width))
        call.arithmetic.rms_norm_backward(self.gate_up.finish(products, d_normed, normed, call), x, self.norm.weight, scale, d_x)

    def _products(self, normed: torch.Tensor, call: Call, stack: Stack) -> torch.Tensor:
        """(rows, 2 * wide): gate, then up."""
        return self.gate_up.forward(normed, stack.take("gate_up", call.here, self.gate_up.weight.shape[0]))


@dataclass(frozen=True)
class LayerSaved:
    """What a layer kept of its forward pass."""

    x: torch.Tensor
    middle: torch.Tensor | None
    mixer: tuple[torch.Tensor, ...] | None
    products: torch.Tensor | None


@dataclass(frozen=True)
class Layer:
    """A mixer and an MLP, each on top of the residual stream."""

    mixer: Mixer
    mlp: Mlp

    def forward(self, x: torch.Tensor, call: Call, stack: Stack, out: torch.Tensor) -> LayerSaved:
        """`out` := (rows, hidden) of the layer; gives what its backward pass needs."""
        middle = stack.take("middle", call.here, x.shape[1])
        mixer = self.mixer.forward(x, call, stack, middle)
        products = self.mlp.forward(middle, call, stack, out)
        if stack.keep == Keep.INPUTS:
            return LayerSaved(x, None, None, None)
        return LayerSaved(x, middle, mixer, products if stack.keep == Keep.PRODUCTS else None)

    def backward(self, d_x: torch.Tensor, saved: LayerSaved, call: Call, stack: Stack) -> None:
        """Turn the gradient of the layer's output into that of its input, in place, and add to the adapters' gradients."""
        middle, mixer = saved.middle, saved.mixer
        if middle is None or mixer is None:
            middle = stack.take("middle", call.here, d_x.shape[1])
            mixer = self.mixer.forward(saved.x, call, stack, middle)
        self.mlp.backward(d_x, middle, saved.products, call, stack)
        self.mixer.backward(d_x, saved.x, mixer, call, stack)


def enter(norm: Norm, linear: FusedLinear, x: torch.Tensor, call: Call, stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
    """The filled input of `linear`, the norm of `x`; and the norm's scale."""
    filled = stack.take("normed", call.here, linear.width)
    scale = call.arithmetic.rms_norm(x, norm.weight, norm.eps, filled[:, : linear.n_inputs])
    linear.fill(filled, call)
    return filled, scale


def _norm_heads(norm: Norm, x: torch.Tensor, arithmetic: TorchArithmetic, out: torch.Tensor) -> None:
    """`out` := the norm over each head of (rows, heads, size)."""
    flat = x.reshape(-1, x.shape[-1])
    normed = torch.empty_like(flat)
    arithmetic.rms_norm(flat, norm.weight, norm.eps, normed)
    out.copy_(normed.view(x.shape))


def _norm_heads_backward(norm: Norm, raw: torch.Tensor, gradient: torch.Tensor, arithmetic: TorchArithmetic) -> None:
    """Turn the gradient of `_norm_heads` into that of `raw`, in place."""
    flat = raw.reshape(-1, raw.shape[-1])
    scale = arithmetic.rms_norm(flat, norm.weight, norm.eps, torch.empty_like(flat))
    d_x = torch.zeros_like(flat)
    arithmetic.rms_norm_backward(gradient.reshape(flat.shape), flat, norm.weight, scale, d_x)
    gradient.copy_(d_x.view(raw.shape))
