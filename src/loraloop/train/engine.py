"""The tree engine: loss and gradient of one optimizer step, every shared token computed once.

The samples of a step become a tree, the tree a walk over blocks of rows. On the way in a block goes forward through all layers; on the
way out, when all below it is done, backward. So the activations of one path are held at a time, whatever the number of samples, and
the gradient is that of the samples computed one by one (tests/train/test_exactness.py). A tree that fits in one block is one packed
forward and backward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
    coefficients: Floats | None
    """Of every sample's loss in what the gradient is of; None without gradients."""
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
    def measure(self, rows: Sequence[Row], *, adapter: bool = True) -> Floats:
        """Each row's loss, the sum of w * nll of its tokens, without dropout and gradients; without the `adapter`, the base model's."""
        return self._walk(build_tree(rows), None, None, adapter=adapter)

    def _walk(self, tree: TokenTree, coefficients: Floats | None, draw: tuple[int, int] | None, *, adapter: bool = True) -> Floats:
        """Each sample's loss; with coefficients, the gradient too."""
        for linear in self.architecture.linears:
            linear.refresh(adapter=adapter)
        visits = list_visits(tree, self.plan.block_rows)
        room = max((visit.block.depth + visit.block.n_rows for visit in visits), default=0)
        walk = _Walk(tree, self._take_stacks(room), coefficients, torch.zeros(tree.n_samples, dtype=torch.float64), draw)
        for visit in visits:
            if visit.forward:
                self._enter(visit.block, walk)
            elif coefficients is not None:
                self._leave(walk)
        if coefficients is not None:
            for linear in self.architecture.linears:
                linear.collect()
        self.n_computed = tree.n_rows
        losses: Floats = walk.losses.numpy()
        return losses

    def _enter(self, block: Block, walk: _Walk) -> None:
        """Forward through all layers, then the head's loss and gradient."""
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
        d_x = self._head(x, Targets.of(tree, block, walk.coefficients), walk.losses)
        if d_x is not None:
            walk.entered.append(_Entered(call, saved, d_x))

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
