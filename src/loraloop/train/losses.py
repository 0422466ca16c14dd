"""The head and the loss on the rows that predict a supervised token, forward and backward at once.

How much each sample's loss counts is known before a walk with gradients begins, so the gradient of the logits is known with them:
logits of a few rows exist at a time and are turned into their own gradient in place. The head is frozen; only the gradient of its
input is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loraloop.train.arithmetic import TorchArithmetic
from loraloop.train.tree import Block, Floats, TokenTree

HEAD_ROWS = 256
"""Rows whose logits exist at one time."""


@dataclass(frozen=True)
class Targets:
    """The supervised tokens that a block's rows predict; a row may have several, of different samples."""

    rows: torch.Tensor  # (rows with a target,) counted from the block's start, ascending
    of_row: torch.Tensor  # (targets,) index into `rows`, ascending
    tokens: torch.Tensor  # (targets,)
    samples: torch.Tensor  # (targets,) whose they are
    weights: torch.Tensor  # (targets,) float64
    pulls: torch.Tensor | None  # (targets,) float64, the weight times the sample's coefficient; None without gradients
    row_pulls: torch.Tensor  # (rows with a target,) float64, the sum over a row's targets; zero without gradients

    @classmethod
    def of(cls, tree: TokenTree, block: Block, coefficients: Floats | None) -> Targets:
        """The targets of `block`; the gradient is that of the sum of every sample's loss times its coefficient."""
        first, last = np.searchsorted(tree.target_rows, (block.start, block.stop))
        rows, of_row = np.unique(tree.target_rows[first:last] - block.start, return_inverse=True)
        weights, samples = tree.target_weights[first:last], tree.target_samples[first:last]
        pulls = None if coefficients is None else weights * coefficients[samples]
        sums = np.zeros(len(rows)) if pulls is None else np.bincount(of_row, pulls, minlength=len(rows))
        return cls(
            rows=torch.from_numpy(rows),
            of_row=torch.from_numpy(of_row),
            tokens=torch.from_numpy(tree.target_tokens[first:last]),
            samples=torch.from_numpy(samples),
            weights=torch.from_numpy(weights),
            pulls=None if pulls is None else torch.from_numpy(pulls),
            row_pulls=torch.from_numpy(sums),
        )


def head_loss(
    hidden: torch.Tensor, targets: Targets, head: torch.Tensor, losses: torch.Tensor, arithmetic: TorchArithmetic
) -> torch.Tensor | None:
    """Add weight * nll of every target to its sample's place in `losses`, (samples,) float64; gives the gradient of `hidden`.

    `hidden` is (rows with a target, hidden), `head` (vocabulary, hidden). The gradient is that of the sum of pull * nll, None when
    the targets have no pulls. Log-probabilities are computed in float32 at least.
    """
    d_hidden = torch.empty_like(hidden) if targets.pulls is not None else None
    for start in range(0, len(hidden), HEAD_ROWS):
        rows = slice(start, min(start + HEAD_ROWS, len(hidden)))
        first, last = torch.searchsorted(targets.of_row, torch.tensor([rows.start, rows.stop])).tolist()
        here, tokens = targets.of_row[first:last] - start, targets.tokens[first:last]
        logits = torch.mm(hidden[rows], head.t())  # (rows, vocabulary)
        chosen = logits[here, tokens].double()
        row_pulls = targets.row_pulls[rows].to(torch.promote_types(logits.dtype, torch.float32))
        lse = arithmetic.softmax(logits, row_pulls).double()[here]
        losses.index_add_(0, targets.samples[first:last], targets.weights[first:last] * (lse - chosen))
        if d_hidden is not None and targets.pulls is not None:
            probable = targets.row_pulls[rows][here] * (chosen - lse).exp()
            wanted = _sum_equals(here * logits.shape[1] + tokens, targets.pulls[first:last])
            logits[here, tokens] = (probable - wanted).to(logits.dtype)
            torch.mm(logits, head, out=d_hidden[rows])
    return d_hidden


def _sum_equals(places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(targets,) for each target the weights of all that have its place in the logits.

    A target's gradient is a small difference of large numbers where the model is sure of it: it must be whole before it is rounded.
    """
    _, groups = torch.unique(places, return_inverse=True)
    return torch.zeros_like(weights).index_add_(0, groups, weights)[groups]
