"""Linear layers with LoRA that read the same input, computed as one matrix product: y = [x | u] [W | B]^T with u = s x A^T.

The frozen weights W of the layers (q, k and v; gate and up; or one alone) and their B matrices lie in one buffer, and PEFT's modules
keep names, configuration and files: their base weights become views of it, their A and B stay theirs and get the gradients. The
input is saved once for all of them, in its own dtype; nothing of its size is made in float32. Not autograd: `backward` is called
with what `forward` was; gradients of A and B are summed over blocks in float32 at least, until `collect`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from loraloop.train.call import Call


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter: PEFT's parameters and where they stand in the fused product."""

    a: nn.Parameter  # (rank, inputs)
    b: nn.Parameter  # (outputs, rank)
    scaling: float
    dropout: float
    outputs: slice
    ranks: slice


class FusedLinear:
    """Linear layers over one input. A module is PEFT's LoRA layer or, where none was asked for, a plain `nn.Linear`."""

    def __init__(self, modules: Sequence[nn.Module], key: int) -> None:
        bases = [_base(module) for module in modules]
        self.n_inputs = bases[0].in_features
        self.adapters: list[Adapter] = []
        self.key = key
        """Tells this layer's dropout draws from those of others."""
        n_outputs = n_ranks = 0
        for module, base in zip(modules, bases, strict=True):
            if base is not module:
                self.adapters.append(_adapter(module, n_outputs, n_ranks))
                n_ranks = self.adapters[-1].ranks.stop
            n_outputs += base.out_features
        weight = bases[0].weight
        self.weight = torch.zeros(n_outputs, self.n_inputs + n_ranks, dtype=weight.dtype, device=weight.device)  # (outputs, inputs + ranks)
        self.a = torch.zeros(n_ranks, self.n_inputs, dtype=weight.dtype, device=weight.device)  # (ranks, inputs), scaled
        precise = torch.promote_types(weight.dtype, torch.float32)
        self._d_a = torch.zeros(n_ranks, self.n_inputs, dtype=precise, device=weight.device)
        self._d_b = torch.zeros(n_ranks, n_outputs, dtype=precise, device=weight.device)
        """Only the blocks of an adapter's own ranks and outputs are of use."""
        self.bias = _join_biases(bases, weight)
        self.width = self.weight.shape[1]
        """Columns of a filled input."""
        at = 0
        for base in bases:
            rows = self.weight[at : at + base.out_features, : self.n_inputs]
            rows.copy_(base.weight.data)
            base.weight.data = rows
            at += base.out_features

    def refresh(self, *, adapter: bool = True) -> None:
        """Take A and B over from PEFT's parameters and begin sums of gradients anew; before every walk. Without `adapter`, B is 0."""
        self._d_a.zero_()  # here and not when they are collected: a walk that an error ended leaves nothing to the next
        self._d_b.zero_()
        if not adapter:
            self.weight[:, self.n_inputs :].zero_()
            return
        for each in self.adapters:
            self.a[each.ranks] = each.a.detach() * each.scaling
            columns = slice(self.n_inputs + each.ranks.start, self.n_inputs + each.ranks.stop)
            self.weight[each.outputs, columns] = each.b.detach().to(self.weight.dtype)

    def fill(self, x: torch.Tensor, call: Call) -> None:
        """Compute u on the right of `x` from the input on its left."""
        left = x[:, : self.n_inputs]
        if not self._drops(call):
            if self.adapters:
                torch.mm(left, self.a.t(), out=x[:, self.n_inputs :])
            return
        for adapter in self.adapters:
            columns = slice(self.n_inputs + adapter.ranks.start, self.n_inputs + adapter.ranks.stop)
            x[:, columns] = self._dropped(left, adapter, call) @ self.a[adapter.ranks].t()

    def forward(self, x: torch.Tensor, out: torch.Tensor, rows: slice = slice(None), *, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """`out` := (rows, outputs) of a filled `x`; `rows` picks outputs, `add_to` is added to the product (a residual stream)."""
        weight = self.weight[rows].t()
        if add_to is None:
            return torch.mm(x, weight, out=out) if self.bias is None else torch.addmm(self.bias[rows], x, weight, out=out)
        torch.addmm(add_to, x, weight, out=out)
        return out if self.bias is None else out.add_(self.bias[rows])

    def backward(self, d_y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out` := the gradient of the product's left side; the input's own is not complete before `finish`."""
        return torch.mm(d_y, self.weight, out=out)

    def finish(self, d_y: torch.Tensor, d_x: torch.Tensor, x: torch.Tensor, call: Call) -> torch.Tensor:
        """Add to the sums of A's and B's gradients, and give the whole gradient of the input, (rows, inputs), a view of `d_x`.

        `d_x` is what `backward` gave for `d_y`, `x` the filled input of the forward pass.
        """
        self.add_b_gradients(d_y, x[:, self.n_inputs :], call)
        self.add_input_gradient(d_x, call)
        self.add_a_gradients(d_x, x[:, : self.n_inputs], call)
        return d_x[:, : self.n_inputs]

    def add_b_gradients(self, d_y: torch.Tensor, u: torch.Tensor, call: Call) -> None:
        """B's gradients, from the output's gradient and u."""
        if self.adapters:
            call.arithmetic.rank_products(u, d_y, self._d_b)

    def add_input_gradient(self, d_x: torch.Tensor, call: Call) -> None:
        """Add what comes through A to the left of `d_x`."""
        left, d_u = d_x[:, : self.n_inputs], d_x[:, self.n_inputs :]
        if not self._drops(call):
            if self.adapters:
                left.addmm_(d_u, self.a)
            return
        for adapter in self.adapters:
            through = torch.mm(d_u[:, adapter.ranks], self.a[adapter.ranks])
            call.arithmetic.dropout(through, 1 - adapter.dropout, self._draw(adapter, call), left, add=True)

    def add_a_gradients(self, d_x: torch.Tensor, x: torch.Tensor, call: Call) -> None:
        """A's gradients, from that of u on the right of `d_x` and the input."""
        d_u = d_x[:, self.n_inputs :]
        if not self.adapters:
            return
        if not self._drops(call):
            call.arithmetic.rank_products(d_u, x, self._d_a)
            return
        for adapter in self.adapters:
            call.arithmetic.rank_products(d_u[:, adapter.ranks], self._dropped(x, adapter, call), self._d_a[adapter.ranks])

    def collect(self) -> None:
        """Add what blocks have summed up to the gradients of PEFT's parameters."""
        for adapter in self.adapters:
            _gradient(adapter.a).add_(self._d_a[adapter.ranks], alpha=adapter.scaling)
            _gradient(adapter.b).add_(self._d_b[adapter.ranks, adapter.outputs].t())

    def _drops(self, call: Call) -> bool:
        return call.seed is not None and any(adapter.dropout for adapter in self.adapters)

    def _dropped(self, x: torch.Tensor, adapter: Adapter, call: Call) -> torch.Tensor:
        """The adapter's own draw of dropout on `x`, the same each time."""
        out = torch.empty(x.shape, dtype=x.dtype)
        call.arithmetic.dropout(x, 1 - adapter.dropout, self._draw(adapter, call), out)
        return out

    def _draw(self, adapter: Adapter, call: Call) -> tuple[int, int]:
        """(key, first row) of one adapter's mask: of its own for every step, layer and adapter, by row of the tree."""
        number: int = self.key * 4096 + adapter.ranks.start
        return ((call.seed or 0) + number * 0x9E3779B97F4A7C15) % 2**64, call.block.start


def _base(module: nn.Module) -> nn.Linear:
    base = getattr(module, "base_layer", module)
    assert isinstance(base, nn.Linear)  # noqa: S101  architecture.py has looked
    return base


def _adapter(module: nn.Module, first_output: int, first_rank: int) -> Adapter:
    """The active adapter of one of PEFT's LoRA layers."""
    layer: object = module
    name: str = layer.active_adapters[0]  # type: ignore[attr-defined]
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight  # type: ignore[attr-defined]
    dropout = float(getattr(layer.lora_dropout[name], "p", 0.0))  # type: ignore[attr-defined]
    scaling = float(layer.scaling[name])  # type: ignore[attr-defined]
    return Adapter(a, b, scaling, dropout, slice(first_output, first_output + b.shape[0]), slice(first_rank, first_rank + a.shape[0]))


def _join_biases(bases: Sequence[nn.Linear], like: torch.Tensor) -> torch.Tensor | None:
    if all(base.bias is None for base in bases):
        return None
    return torch.cat([like.new_zeros(base.out_features) if base.bias is None else base.bias.detach() for base in bases])


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    """The parameter's gradient, zero when it has none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
