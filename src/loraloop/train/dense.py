"""The plain engine: samples padded into micro-batches, through the model's own forward and autograd. The reference for the tree engine.

Rows are padded on the right: with causal models padding changes no row. The gradient of a window is that of sum(w * nll) / sum(w)
over all of it, however it is cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from loraloop.chat.render import Row
from loraloop.train.architecture import has_plain_head
from loraloop.train.tree import Floats

if TYPE_CHECKING:
    import torch

HEAD_CHUNK = 1024
"""Supervised positions whose logits exist at one time: this many times the vocabulary, in float32."""
MICRO_BATCH_TOKENS = 2048
"""A micro-batch holds no more padded tokens than this, unless one row alone has more."""


class DenseEngine:
    """Computes every token of every sample. Works for any causal model and any adapter that PEFT can train."""

    name = "dense"

    def __init__(self, model: Any, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self.n_computed = 0
        """Tokens computed in the last call, padding not among them."""

    def backward(self, rows: Sequence[Row], step: int = 0, *, training: bool = True) -> float:
        """Add the gradient of sum(w * nll) / sum(w) over `rows`, and give that loss.

        Dropout draws from torch's own generator; there is none when not `training`.
        """
        share = 1.0 / sum(sum(row.weights[1:]) for row in rows)
        return share * float(self.add_gradient(rows, [share] * len(rows), step if training else None).sum())

    def add_gradient(self, rows: Sequence[Row], coefficients: Sequence[float], step: int | None = None) -> Floats:
        """Add the gradient of the sum of coefficient * loss over `rows`, and give each row's loss, the sum of w * nll of its tokens.

        Without a `step` there is no dropout.
        """
        import torch

        self._set_mode(dropout=step is not None)
        losses = np.zeros(len(rows))
        for numbers in micro_batches(rows, self.batch_size):
            parts = _losses(self.model, [rows[number] for number in numbers])
            factors = torch.tensor([coefficients[number] for number in numbers], dtype=parts.dtype, device=parts.device)
            (parts * factors).sum().backward()  # type: ignore[no-untyped-call]
            losses[numbers] = parts.detach().cpu().numpy()
        self.n_computed = sum(len(row.ids) for row in rows)
        return losses

    def _set_mode(self, *, dropout: bool) -> None:
        """Transformers recomputes activations in training mode only, so with that there is none but for dropout."""
        recomputes = getattr(self.model, "is_gradient_checkpointing", False)
        self.model.train(dropout or recomputes)
        for module in self.model.modules():
            if not dropout and type(module).__name__ == "Dropout":
                module.eval()

    def add_gradient_by(self, rows: Sequence[Row], choose: Callable[[Floats], Sequence[float]]) -> Floats:
        """`add_gradient`, without dropout, with the coefficients that `choose` gives when it is told each row's loss.

        Rows are computed a second time, then without those whose coefficient is 0.
        """
        losses = self.measure(rows)
        n_computed = self.n_computed
        counted = [(row, coefficient) for row, coefficient in zip(rows, choose(losses), strict=True) if coefficient]
        self.add_gradient([row for row, _ in counted], [coefficient for _, coefficient in counted])
        self.n_computed += n_computed
        return losses

    def measure(self, rows: Sequence[Row], *, adapter: bool = True) -> Floats:
        """Each row's loss, the sum of w * nll of its tokens, without dropout and gradients; without the `adapter`, the base model's."""
        import torch

        was_training = self.model.training
        self.model.eval()
        losses = np.zeros(len(rows))
        with torch.no_grad(), nullcontext() if adapter else self.model.disable_adapter():
            for numbers in micro_batches(rows, self.batch_size):
                losses[numbers] = _losses(self.model, [rows[number] for number in numbers]).cpu().numpy()
        self.model.train(was_training)
        self.n_computed = sum(len(row.ids) for row in rows)
        return losses


def micro_batches(rows: Sequence[Row], batch_size: int) -> Iterator[list[int]]:
    """The numbers of rows of like length together, at most `batch_size` of them and MICRO_BATCH_TOKENS padded tokens."""
    batch: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number].ids)):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(rows[number].ids) > MICRO_BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _losses(model: Any, batch: Sequence[Row]) -> torch.Tensor:
    """(rows,) the sum of w * nll over the supervised tokens of each row of a micro-batch, in float64."""
    import torch

    device = next(model.parameters()).device
    length = max(len(row.ids) for row in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)  # (rows, tokens), padded with 0 on the right
    weights = torch.zeros(len(batch), length, dtype=torch.float64)  # (rows, tokens)
    for number, row in enumerate(batch):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        weights[number, : len(row.weights)] = torch.tensor(row.weights, dtype=torch.float64)
    ids, weights = ids.to(device), weights.to(device)
    predicts = weights[:, 1:] > 0  # (rows, tokens - 1): positions whose next token is supervised
    targets, factors = ids[:, 1:][predicts], weights[:, 1:][predicts]  # (supervised,)
    nll = _negative_log_likelihood(model, ids, predicts, targets)
    losses = torch.zeros(len(batch), dtype=torch.float64, device=device)
    return losses.index_add(0, predicts.nonzero()[:, 0], nll.double() * factors)


def _negative_log_likelihood(model: Any, ids: torch.Tensor, predicts: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of each target, in float32 at least; logits are made at the positions that need them only, a chunk at a time."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint

    def precise(logits: torch.Tensor) -> torch.Tensor:
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not has_plain_head(causal.config):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1][predicts]
        return cross_entropy(precise(logits), targets, reduction="none")
    head = causal.get_output_embeddings()
    hidden = causal.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][predicts]  # (supervised, hidden)

    def chunk_loss(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return cross_entropy(precise(head(rows)), wanted, reduction="none")

    if len(targets) <= HEAD_CHUNK:
        return chunk_loss(hidden, targets)
    parts = [
        checkpoint(chunk_loss, hidden[start : start + HEAD_CHUNK], targets[start : start + HEAD_CHUNK], use_reentrant=False)
        for start in range(0, len(targets), HEAD_CHUNK)
    ]
    return torch.cat(parts)
