"""The dense training loop: LoRA with AdamW on rows of token ids, the loss on supervised tokens only.

The gradient of a step is that of sum(w * nll) / sum(w) over the whole accumulation window, so it does not depend on how the window
is cut into micro-batches. Rows are padded on the right: with causal models padding changes no row. Order of rows, initial adapter
and dropout follow from the seed alone.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraloop.chat.render import Row
from loraloop.errors import LoraTrainerError
from loraloop.training_record import TrainingEvent

if TYPE_CHECKING:
    import torch

HEAD_CHUNK = 1024
"""Supervised positions whose logits exist at one time: this many times the vocabulary, in float32."""
MICRO_BATCH_TOKENS = 2048
"""A micro-batch holds no more padded tokens than this, unless one row alone has more."""


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs to know; see `train.arguments` for units and ranges."""

    epochs: int
    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    warmup_ratio: float
    max_grad_norm: float
    max_steps: int | None
    seed: int


def new_adapter(model: Any, rank: int, alpha: float, dropout: float, seed: int) -> Any:
    """`model` with a fresh LoRA adapter on every linear layer but the head; its weights follow from `seed`."""
    import peft
    import torch

    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def train(model: Any, rows: Sequence[Row], settings: LoopSettings, emit: Callable[[TrainingEvent], None]) -> list[tuple[int, float]]:
    """Train the adapter of `model` in place; gives (step, loss) for every step.

    Raises LoraTrainerError at a loss or gradient that is not finite, naming the step and its episodes.
    """
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    steps = count_steps(len(rows), settings)
    history: list[tuple[int, float]] = []
    started, n_tokens = time.monotonic(), 0
    model.train()
    torch.manual_seed(settings.seed)
    for step, (epoch, window) in enumerate(_windows(len(rows), settings, steps), 1):
        rate = settings.learning_rate * schedule(step - 1, steps, settings.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = [rows[index] for index in window]
        loss = _backward(model, batch, settings.batch_size)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm))
        _check_finite(step, loss, norm, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append((step, loss))
        n_tokens += sum(len(row.ids) for row in batch)
        seconds = time.monotonic() - started
        emit(
            TrainingEvent(
                event="step",
                step=step,
                steps=steps,
                epoch=epoch,
                loss=loss,
                learning_rate=rate,
                tokens_per_s=n_tokens / seconds,
                eta_s=seconds / step * (steps - step),
                memory_mb=peak_memory_mb(),
            )
        )
    return history


def mean_loss(model: Any, rows: Sequence[Row], batch_size: int) -> float:
    """Mean negative log-likelihood over the supervised tokens of `rows`, weighted, without dropout."""
    import torch

    was_training = model.training
    model.eval()
    total = weight = 0.0
    with torch.no_grad():
        for batch in micro_batches(rows, batch_size):
            batch_loss, batch_weight = _summed_loss(model, batch)
            total += float(batch_loss)
            weight += batch_weight
    model.train(was_training)
    return total / weight


def count_steps(n_rows: int, settings: LoopSettings) -> int:
    """Optimizer steps in all: one for each window of batch_size x gradient_accumulation rows, no more than max_steps."""
    per_epoch = math.ceil(n_rows / (settings.batch_size * settings.gradient_accumulation))
    steps = per_epoch * settings.epochs
    return min(steps, settings.max_steps) if settings.max_steps else steps


def schedule(step: int, steps: int, warmup_ratio: float) -> float:
    """The factor on the learning rate at `step` (from 0): linear warm-up, then a cosine down to 0 behind the last step."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def micro_batches(rows: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    """Rows of like length together, at most `batch_size` of them and MICRO_BATCH_TOKENS padded tokens."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(row.ids) > MICRO_BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def peak_memory_mb() -> int:
    """The most resident memory this process has had, in MiB."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 << 20) if sys.platform == "darwin" else peak // 1024


def _windows(n_rows: int, settings: LoopSettings, steps: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch, row indices) of each optimizer step; each epoch is a permutation that follows from (seed, epoch)."""
    size = settings.batch_size * settings.gradient_accumulation
    done = 0
    for epoch in range(settings.epochs):
        order = list(range(n_rows))
        random.Random(f"{settings.seed}:{epoch}").shuffle(order)
        for start in range(0, n_rows, size):
            if done == steps:
                return
            yield epoch, order[start : start + size]
            done += 1


def _backward(model: Any, window: Sequence[Row], batch_size: int) -> float:
    """Add the gradient of the window's mean loss, and give that loss."""
    weight = sum(sum(row.weights[1:]) for row in window)
    loss = 0.0
    for batch in micro_batches(window, batch_size):
        part = _summed_loss(model, batch)[0] / weight
        part.backward()  # type: ignore[no-untyped-call]
        loss += float(part.detach())
    return loss


def _check_finite(step: int, loss: float, norm: float, batch: Sequence[Row]) -> None:
    """Raises LoraTrainerError before an update that would spoil the adapter."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        names = ", ".join(sorted({row.episode_id or "?" for row in batch}))
        what = f"the loss of step {step} is {loss}, the norm of its gradient {norm}"
        raise LoraTrainerError(f"{what}; its samples came from {names}. Lower the learning rate or look at them")


def _summed_loss(model: Any, batch: Sequence[Row]) -> tuple[torch.Tensor, float]:
    """(sum of w * nll, sum of w) over the supervised tokens of a micro-batch."""
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
    return (nll * factors.to(nll.dtype)).sum(), float(factors.sum())


def _negative_log_likelihood(model: Any, ids: torch.Tensor, predicts: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of each target, in float32 at least; logits are made at the positions that need them only, a chunk at a time."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint

    def precise(logits: torch.Tensor) -> torch.Tensor:
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not _has_plain_head(causal.config):
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


def _has_plain_head(config: Any) -> bool:
    """Whether logits are the head's output and nothing more; models that scale or cap them go through their own forward."""
    plain = {"final_logit_softcapping": (None,), "logits_scaling": (None, 1, 1.0), "logit_scale": (None, 1, 1.0)}
    return all(getattr(config, name, None) in values for name, values in plain.items())
