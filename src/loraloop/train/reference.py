"""What the base model says of every row: computed once, shared prefixes once, and kept in the user's cache for the next run.

The reference of dpo and kto does not change while the adapter does, so its log-probabilities are a number a row. Where they are kept
is a hash of all that they follow from: the base model's weights, the arithmetic, and the rows' tokens and weights.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from loraloop.chat.render import Row
from loraloop.files import write_atomic
from loraloop.train.tree import Floats
from loraloop.training_record import TrainingEvent

Emit = Callable[[TrainingEvent], None]


class Measures(Protocol):
    """The part of an engine that a reference needs."""

    n_computed: int

    def measure(self, rows: Sequence[Row], *, adapter: bool = True) -> Floats:
        """Each row's loss."""
        ...


class Reference:
    """The summed w * nll of rows by the base model."""

    def __init__(self, losses: dict[bytes, float]) -> None:
        self._losses = losses

    def of(self, rows: Sequence[Row]) -> Floats:
        """(rows,) the base model's loss of each; KeyError for a row that it was not computed for."""
        return np.array([self._losses[_key(row)] for row in rows])


def open_reference(
    engine: Measures, rows: Sequence[Row], cache: Path, origin: str, emit: Emit, *, chunk_tokens: int, adapter: bool = False
) -> Reference:
    """The reference for `rows`: from the `cache` where it is there, else computed, and kept there.

    `origin` names all that the numbers follow from besides the rows. With `adapter` the model's is on: one that is trained on. Rows are
    computed in the order of their tokens, so that those that begin alike stand together, about `chunk_tokens` of them at a time.
    """
    by_key = {_key(row): row for row in rows}
    ordered = sorted(by_key, key=lambda key: by_key[key].ids)
    name = hashlib.blake2b(b"".join([origin.encode(), b"\0", *ordered]), digest_size=16).hexdigest()
    path = cache / f"{name}.json"
    kept = _load(path, len(ordered))
    if kept is not None:
        emit(TrainingEvent(event="note", message=f"the base model's log-probabilities of {len(kept)} rows are known from an earlier run"))
        return Reference(dict(zip(ordered, kept, strict=True)))
    losses = _compute(engine, [by_key[key] for key in ordered], emit, chunk_tokens, adapter=adapter)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(losses))
    except OSError as error:  # the next run computes them again
        emit(TrainingEvent(event="warning", message=f"the base model's log-probabilities cannot be kept in {path}: {error.strerror}"))
    return Reference(dict(zip(ordered, losses, strict=True)))


def _compute(engine: Measures, rows: Sequence[Row], emit: Emit, chunk_tokens: int, *, adapter: bool) -> list[float]:
    losses: list[float] = []
    started, n_computed = time.monotonic(), 0
    while len(losses) < len(rows):
        chunk: list[Row] = []
        n_tokens = 0
        for row in rows[len(losses) :]:
            if chunk and n_tokens + len(row.ids) > chunk_tokens:
                break
            chunk.append(row)
            n_tokens += len(row.ids)
        losses += engine.measure(chunk, adapter=adapter).tolist()
        n_computed += engine.n_computed
        seconds = time.monotonic() - started
        emit(
            TrainingEvent(
                event="reference",
                step=len(losses),
                steps=len(rows),
                tokens_per_s=n_computed / seconds,
                eta_s=seconds / len(losses) * (len(rows) - len(losses)),
            )
        )
    return losses


def _load(path: Path, n: int) -> list[float] | None:
    """`n` numbers, or None when the file is not there or is not what was written."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    is_whole = isinstance(found, list) and len(found) == n and all(isinstance(value, float) and np.isfinite(value) for value in found)
    return found if is_whole else None


def _key(row: Row) -> bytes:
    """A hash of a row's tokens and weights."""
    data = np.asarray(row.ids, "<u4").tobytes() + np.asarray(row.weights, "<f8").tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()
