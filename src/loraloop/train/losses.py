"""The head and the loss on the rows that predict a supervised token, forward and backward at once.

The weights of a step are known before its first forward pass, so the gradient of the logits is known with them: logits of a few rows
exist at a time and are turned into their own gradient in place. The head is frozen; only the gradient of its input is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loraloop.train.arithmetic import TorchArithmetic
from loraloop.train.tree import Block, TokenTree

HEAD_ROWS = 256
"""Rows whose logits exist at one time."""


@dataclass(frozen=True)
class Targets:
    """The supervised tokens that a block's rows predict; a row may have several, of different samples."""

    rows: torch.Tensor  # (rows with a target,) counted from the block's start, ascending
    of_row: torch.Tensor  # (targets,) index into `rows`, ascending
    tokens: torch.Tensor  # (targets,)
    weights: torch.Tensor  # (targets,) float64
    row_weights: torch.Tensor  # (rows with a target,) float64, the sum over a row's targets

    @classmethod
    def of(cls, tree: TokenTree, block: Block) -> Targets:
        """The targets of `block`."""
        first, last = np.searchsorted(tree.target_rows, (block.start, block.stop))
        rows, of_row = np.unique(tree.target_rows[first:last] - block.start, return_inverse=True)
        weights = tree.target_weights[first:last]
        sums = np.bincount(of_row, weights, minlength=len(rows))
        tokens = torch.from_numpy(tree.target_tokens[first:last])
        return cls(torch.from_numpy(rows), torch.from_numpy(of_row), tokens, torch.from_numpy(weights), torch.from_numpy(sums))


def head_loss(
    hidden: torch.Tensor, targets: Targets, head: torch.Tensor, factor: float | None, arithmetic: TorchArithmetic
) -> tuple[float, torch.Tensor | None]:
    """(sum of weight * nll, gradient of factor * that sum) for `hidden`, (rows with a target, hidden); no gradient without a factor.

    `head` is (vocabulary, hidden). Log-probabilities are computed in float32 at least.
    """
    loss = 0.0
    d_hidden = torch.empty_like(hidden) if factor is not None else None
    for start in range(0, len(hidden), HEAD_ROWS):
        rows = slice(start, min(start + HEAD_ROWS, len(hidden)))
        first, last = torch.searchsorted(targets.of_row, torch.tensor([rows.start, rows.stop])).tolist()
        here, tokens, weights = targets.of_row[first:last] - start, targets.tokens[first:last], targets.weights[first:last]
        logits = torch.mm(hidden[rows], head.t())  # (rows, vocabulary)
        chosen = logits[here, tokens].double()
        row_factors = (targets.row_weights[rows] * (factor or 0.0)).to(torch.promote_types(logits.dtype, torch.float32))
        lse = arithmetic.softmax(logits, row_factors).double()[here]
        loss += float((weights * (lse - chosen)).sum())
        if d_hidden is not None and factor is not None:
            probable = targets.row_weights[rows][here] * (chosen - lse).exp()
            wanted = _sum_equals(here * logits.shape[1] + tokens, weights)
            logits[here, tokens] = (factor * (probable - wanted)).to(logits.dtype)
            torch.mm(logits, head, out=d_hidden[rows])
    return loss, d_hidden


def _sum_equals(places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(targets,) for each target the weights of all that have its place in the logits.

    A target's gradient is a small difference of large numbers where the model is sure of it: it must be whole before it is rounded.
    """
    _, groups = torch.unique(places, return_inverse=True)
    return torch.zeros_like(weights).index_add_(0, groups, weights)[groups]
