"""What all layers need to know of the block that they compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraloop.train.arithmetic import TorchArithmetic
from loraloop.train.tree import Block


@dataclass(frozen=True)
class Call:
    """One block, on its way in or out again: the same for both."""

    block: Block
    cos: torch.Tensor  # (rows, head size / 2)
    sin: torch.Tensor
    parents: torch.Tensor
    """(convolution size - 1, rows) the row above, the one above that, …: places in the stack, -1 before the beginning."""
    seed: int | None
    """Draws the dropout of this step; None is without."""
    arithmetic: TorchArithmetic

    @property
    def n_rows(self) -> int:
        """Rows of the block."""
        return self.block.n_rows

    @property
    def here(self) -> slice:
        """The block's own places in a stack."""
        return slice(self.block.depth, self.block.depth + self.block.n_rows)
