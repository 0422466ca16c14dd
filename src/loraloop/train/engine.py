"""The tree engine: loss and gradient of one optimizer step, every shared token computed once.

The samples of a step become a tree, the tree a walk over blocks of rows. On the way in a block goes forward through all layers; on the
way out, when all below it is done, backward. So the activations of one path are held at a time, whatever the number of samples, and
the gradient is that of the samples computed one by one (tests/train/test_exactness.py). A tree that fits in one block is one packed
forward and backward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from loraloop.chat.render import Row
from loraloop.train.architecture import Architecture
from loraloop.train.arithmetic import TorchArithmetic
from loraloop.train.buffers import Keep, Scratch, Stack
from loraloop.train.call import Call
from loraloop.train.layers import LayerSaved
from loraloop.train.losses import Targets, head_loss
from loraloop.train.tree import Block, Floats, TokenTree, build_tree, list_visits


@dataclass(frozen=True)
class Plan:
    """How trees are computed; see `memory.make_plan`."""

    block_rows: int = 4096
    """Rows of a block, at most."""
    keep: Keep = Keep.PRODUCTS
    path_rows: int = 0
    """Rows of a path, and of a block at its end, to take memory for at once; more is taken when a tree needs it."""
    whole_rows: int = 0
    """Rows of the largest tree that may be one block where losses decide what the gradient is of; a larger one is walked twice."""


@dataclass(frozen=True)
class _Entered:
    """A block whose backward pass is still to come."""

    call: Call
    saved: list[LayerSaved]
    d_x: torch.Tensor  # (rows, hidden) the gradient of the last layer's output


@dataclass(frozen=True)
class _Walk:
    """One walk over a tree."""

    tree: TokenTree
    stacks: list[Stack]
    losses: torch.Tensor  # (samples,) float64, the sum of w * nll of each
    draw: tuple[int, int] | None
    """Draws the dropout; None is without."""
    entered: list[_Entered] = field(default_factory=list)


class TreeEngine:
    """Computes steps for the adapter of one model, whose PEFT modules keep all weights and get the gradients."""

    def __init__(self, architecture: Architecture, plan: Plan, arithmetic: TorchArithmetic, seed: int = 0) -> None:
        self.architecture = architecture
        self.plan = plan
        self.arithmetic = arithmetic
        self.seed = seed
        self.name = "tree"
        self._scratch = Scratch(plan.block_rows, architecture.dtype)
        self._stacks: list[Stack] = []
        self.n_computed = 0
        """Tokens computed in the last call."""

    def backward(self, rows: Sequence[Row], step: int = 0, *, dropout: bool = True) -> float:
        """Add the gradient of sum(w * nll) / sum(w) over `rows`, and give that loss. `step` draws the dropout."""
        share = 1.0 / sum(sum(row.weights[1:]) for row in rows)
        return share * float(self.add_gradient(rows, [share] * len(rows), step if dropout else None).sum())

    @torch.no_grad()
    def add_gradient(self, rows: Sequence[Row], coefficients: Sequence[float], step: int | None = None) -> Floats:
        """Add the gradient of the sum of coefficient * loss over `rows`, and give each row's loss, the sum of w * nll of its tokens.

        `step` draws the dropout; None is without.
        """
        return self._walk(build_tree(rows), np.asarray(coefficients, np.float64), None if step is None else (self.seed, step))

    @torch.no_grad()
    def add_gradient_by(self, rows: Sequence[Row], choose: Callable[[Floats], Sequence[float]]) -> Floats:
        """`add_gradient`, without dropout, with the coefficients that `choose` gives when it is told each row's loss.

        A tree of at most `whole_rows` rows goes forward once, as one block that is held meanwhile; a larger one a second time, then
        without the rows whose coefficient is 0.
        """
        tree = build_tree(rows)
        if not 0 < tree.n_rows <= self.plan.whole_rows:
            losses = self._walk(tree, None, None)
            counted = [(row, coefficient) for row, coefficient in zip(rows, choose(losses), strict=True) if coefficient]
            self.add_gradient([row for row, _ in counted], [coefficient for _, coefficient in counted])
            self.n_computed += tree.n_rows
            return losses
        walk = self._begin(tree, tree.n_rows, None)
        block = list_visits(tree, tree.n_rows)[0].block  # all siblings of the root fit
        call, saved, x = self._forward(block, walk)
        self._head(x, Targets.of(tree, block, None), walk.losses)
        losses = walk.losses.numpy().copy()
        coefficients = np.asarray(choose(losses), np.float64)
        d_x = self._head(x, Targets.of(tree, block, coefficients), walk.losses)
        if d_x is not None:
            walk.entered.append(_Entered(call, saved, d_x))
            self._leave(walk)
        self._collect()
        self.n_computed = tree.n_rows
        return losses

    @torch.no_grad()
    def measure(self, rows: Sequence[Row], *, adapter: bool = True) -> Floats:
        """Each row's loss, the sum of w * nll of its tokens, without dropout and gradients; without the `adapter`, the base model's."""
        return self._walk(build_tree(rows), None, None, adapter=adapter)

    def _walk(self, tree: TokenTree, coefficients: Floats | None, draw: tuple[int, int] | None, *, adapter: bool = True) -> Floats:
        """Each sample's loss; with coefficients, the gradient too."""
        visits = list_visits(tree, self.plan.block_rows)
        room = max((visit.block.depth + visit.block.n_rows for visit in visits), default=0)
        walk = self._begin(tree, room, draw, adapter=adapter)
        for visit in visits:
            if visit.forward:
                call, saved, x = self._forward(visit.block, walk)
                d_x = self._head(x, Targets.of(tree, visit.block, coefficients), walk.losses)
                if d_x is not None:
                    walk.entered.append(_Entered(call, saved, d_x))
            elif coefficients is not None:
                self._leave(walk)
        if coefficients is not None:
            self._collect()
        self.n_computed = tree.n_rows
        losses: Floats = walk.losses.numpy()
        return losses

    def _begin(self, tree: TokenTree, room: int, draw: tuple[int, int] | None, *, adapter: bool = True) -> _Walk:
        """A walk over `tree` that holds `room` rows at one time."""
        for linear in self.architecture.linears:
            linear.refresh(adapter=adapter)
        return _Walk(tree, self._take_stacks(room), torch.zeros(tree.n_samples, dtype=torch.float64), draw)

    def _collect(self) -> None:
        """Hand the gradients of a walk over to PEFT's parameters."""
        for linear in self.architecture.linears:
            linear.collect()

    def _forward(self, block: Block, walk: _Walk) -> tuple[Call, list[LayerSaved], torch.Tensor]:
        """Forward through all layers; gives what the way back needs, and the last layer's output."""
        tree = walk.tree
        call = self._call(tree, block, walk.draw)
        saved: list[LayerSaved] = []
        hidden = self.architecture.embed.shape[1]
        x = walk.stacks[0].take("x", call.here, hidden)
        torch.index_select(self.architecture.embed, 0, torch.from_numpy(tree.tokens[block.start : block.stop]), out=x)
        for number, (layer, stack) in enumerate(zip(self.architecture.layers, walk.stacks, strict=True), 1):
            last = number == len(walk.stacks)
            out = self._scratch.take("top", block.n_rows, hidden) if last else walk.stacks[number].take("x", call.here, hidden)
            saved.append(layer.forward(x, call, stack, out))
            stack.gradients[call.here].zero_()
            x = out
        return call, saved, x

    def _take_stacks(self, room: int) -> list[Stack]:
        """A stack for each layer with places for `room` rows: those of the last walk if they are large enough."""
        if not self._stacks or self._stacks[0].n_rows < room:
            self._stacks.clear()
            n_rows = max(room, self.plan.path_rows)
            for layer in self.architecture.layers:
                self._stacks.append(Stack(n_rows, layer.mixer.shared_shape, self.plan.keep, self._scratch))
        return self._stacks

    def _head(self, x: torch.Tensor, targets: Targets, losses: torch.Tensor) -> torch.Tensor | None:
        """Add the losses of a block's targets to those of their samples; gives the gradient of its last layer's output."""
        d_x = torch.zeros_like(x) if targets.pulls is not None else None
        if not len(targets.rows):
            return d_x
        norm = self.architecture.final_norm
        chosen = x[targets.rows]
        normed = torch.empty_like(chosen)
        scale = self.arithmetic.rms_norm(chosen, norm.weight, norm.eps, normed)
        d_normed = head_loss(normed, targets, self.architecture.head, losses, self.arithmetic)
        if d_x is not None and d_normed is not None:
            d_chosen = torch.zeros_like(chosen)
            self.arithmetic.rms_norm_backward(d_normed, chosen, norm.weight, scale, d_chosen)
            d_x[targets.rows] = d_chosen
        return d_x

    def _leave(self, walk: _Walk) -> None:
        """Backward through all layers; what is kept is let go of on the way."""
        block = walk.entered.pop()
        for layer, stack in zip(reversed(self.architecture.layers), reversed(walk.stacks), strict=True):
            layer.backward(block.d_x, block.saved.pop(), block.call, stack)

    def _call(self, tree: TokenTree, block: Block, draw: tuple[int, int] | None) -> Call:
        positions = torch.from_numpy(tree.positions[block.start : block.stop])
        precise = torch.promote_types(self.architecture.dtype, torch.float32)
        cos, sin = self.architecture.rotary(torch.empty(0, dtype=precise), positions.unsqueeze(0))
        half = cos.shape[-1] // 2
        seed = None if draw is None else _mix(*draw)
        parents = torch.from_numpy(list_parents(block, self.architecture.conv_size - 1))
        return Call(block, cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous(), parents, seed, self.arithmetic)


def _mix(*numbers: int) -> int:
    """64 bits that follow from `numbers`."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big")


def list_parents(block: Block, n_above: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """(n_above, rows): for each row the places in the stack of the row above it, the one above that, …; -1 before the beginning."""
    parents = np.arange(block.depth - 1, block.depth + block.n_rows - 1)
    for row in np.flatnonzero(block.ends[:-1] <= np.arange(1, block.n_rows)) + 1:  # a sibling's first row: its parent is further up
        seen = np.flatnonzero(block.ends[:row] > row)
        parents[row] = block.depth + seen[-1] if len(seen) else block.depth - 1
    above = np.concatenate([np.arange(-1, block.depth - 1), parents])  # by place in the stack
    places = [parents]
    for _ in range(n_above - 1):
        places.append(np.where(places[-1] >= 0, above[places[-1]], -1))
    return np.stack(places[:n_above]) if n_above else np.empty((0, block.n_rows), np.int64)
