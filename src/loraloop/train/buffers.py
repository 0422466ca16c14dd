"""The memory that layers compute in: taken once and used again by every block and every step.

What is kept for the backward pass is stacked by place on the path, as the walk over a tree is: a block's rows lie behind those of the
blocks above it, and the next sibling writes over them. What is not kept is scratch of one block's size that all layers share. So
memory does not grow with the number of steps, nor with odd sizes left behind, and pages are touched for the first time only once.
"""

from __future__ import annotations

from enum import IntEnum

import torch


class Keep(IntEnum):
    """What a layer keeps for its backward pass; what it does not is computed again."""

    INPUTS = 0
    """Only what came in."""
    MIXER = 1
    """The MLP's wide products are computed again."""
    PRODUCTS = 2
    """Every matrix product."""


KEPT_FROM = {
    "x": Keep.INPUTS,
    "middle": Keep.MIXER,
    "q": Keep.MIXER,
    "raw_k": Keep.MIXER,
    "gates": Keep.MIXER,
    "mixed": Keep.MIXER,
    "gate_up": Keep.PRODUCTS,
}
"""The names of what may be kept, and from which level on it is; every other name is scratch."""


class Buffer:
    """Rows of memory that are zero until they are written.

    The row behind those that are given is, too: oneDNN reads rows of bfloat16 to the next multiple of 32 values, times zero, and what
    lies there must be a number. Rows are cleared when they are first asked for, so that memory is not touched before it is used.
    """

    def __init__(self, n_rows: int, width: int, dtype: torch.dtype) -> None:
        self.n_rows = n_rows
        self._values = torch.empty(n_rows + 1, width, dtype=dtype)
        self._n_clean = 0

    def rows(self, here: slice) -> torch.Tensor:
        """(rows, width), with whatever was in it."""
        if here.stop >= self._n_clean:
            self._values[self._n_clean : here.stop + 1].zero_()
            self._n_clean = here.stop + 1
        return self._values[here]


class Scratch:
    """Buffers of one block's size; one name and width is one buffer, whoever asks."""

    def __init__(self, n_rows: int, dtype: torch.dtype) -> None:
        self.n_rows = n_rows
        self.dtype = dtype
        self._buffers: dict[tuple[str, int], Buffer] = {}

    def take(self, name: str, n_rows: int, width: int) -> torch.Tensor:
        """(rows, width), with whatever was in it."""
        key = (name, width)
        if key not in self._buffers or self._buffers[key].n_rows < n_rows:
            self._buffers[key] = Buffer(max(n_rows, self.n_rows), width, self.dtype)
        return self._buffers[key].rows(slice(0, n_rows))


class Stack:
    """One layer's memory by place on the path.

    `values` is what its mixer shows to rows further down, `gradients` the sum of what comes back, in float32 at least.
    """

    def __init__(self, n_rows: int, shape: tuple[int, ...], keep: Keep, scratch: Scratch) -> None:
        self.n_rows = n_rows
        self.keep = keep
        self.scratch = scratch
        self.values = torch.empty(n_rows, *shape, dtype=scratch.dtype)
        self.gradients = torch.zeros(n_rows, *shape, dtype=torch.promote_types(scratch.dtype, torch.float32))
        self._kept: dict[str, Buffer] = {}

    def take(self, name: str, here: slice, width: int) -> torch.Tensor:
        """(rows, width) for the block whose places are `here`: kept if the name is, else scratch."""
        n_rows = here.stop - here.start
        if name not in KEPT_FROM or KEPT_FROM[name] > self.keep:
            return self.scratch.take(name, n_rows, width)
        if name not in self._kept:
            self._kept[name] = Buffer(self.n_rows, width, self.scratch.dtype)
        return self._kept[name].rows(here)
