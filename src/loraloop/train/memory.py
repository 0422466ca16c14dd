"""How a tree is computed within a memory limit: rows of a block, and what layers keep for their backward pass.

What a run needs follows from its longest sample, not from the number of samples: the walk over a tree holds one path at a time. The
estimate counts what is kept for each row of a path, what a block needs while it is computed, and the head; the lab book compares it
with what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loraloop.chat.render import Row
from loraloop.errors import LoraTrainerError
from loraloop.train.architecture import Architecture
from loraloop.train.buffers import Keep
from loraloop.train.engine import Plan
from loraloop.train.layers import Layer
from loraloop.train.losses import HEAD_ROWS

MAX_BLOCK_ROWS = 4096
SHARE_OF_FREE = 0.8
RUNTIME_BYTES = 64 << 20
"""What torch takes for itself at its first products and optimizer step: code, threads, packed weights."""
_OPTIONS = tuple(Plan(rows, keep) for keep in reversed(Keep) for rows in (MAX_BLOCK_ROWS, 2048, 1024, 512, 256))
"""From the fastest to the one that needs least (docs/lab-book.md)."""


@dataclass(frozen=True)
class Need:
    """Bytes that a plan takes besides what the process has now."""

    path: int
    """Kept for the rows of the longest path and of a block at its end."""
    block: int
    """While a block is computed."""
    head: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.path + self.block + self.head + self.optimizer


@dataclass(frozen=True)
class Load:
    """How much there is to compute, in tokens."""

    longest: int
    """Of the longest row."""
    largest: int
    """Of all rows that are computed at once, in the largest step or measurement."""

    @classmethod
    def of(cls, steps: Sequence[Sequence[Row]], window: int, measured: Sequence[Row] = ()) -> Load:
        """The load of `steps`, each the rows of one unit, `window` of which make an optimizer step; `measured` are computed at once."""
        sizes = sorted((sum(len(row.ids) for row in rows) for rows in steps), reverse=True)
        longest = max(len(row.ids) for row in (*(row for rows in steps for row in rows), *measured))
        return cls(longest, max(sum(sizes[:window]), sum(len(row.ids) for row in measured)))


def make_plan(architecture: Architecture, load: Load, max_memory: int | None, *, coming: int = 0) -> tuple[Plan, str]:
    """The fastest plan that stays within `max_memory` bytes of this process (80 % of what is free when None), and words about it.

    `coming` are the bytes of weights that are not loaded yet. Raises LoraTrainerError with the numbers when the longest row cannot be
    trained within the limit.
    """
    used, limit = _limit(max_memory)
    used += coming
    longest, largest = load.longest, load.largest
    for plan in _OPTIONS:
        need = estimate(architecture, plan, longest, largest)
        if limit is None or used + need.total <= limit:
            whole = _whole_rows(architecture, plan, largest, None if limit is None else limit - used)
            made = replace(plan, path_rows=_held_rows(plan, longest, largest), whole_rows=whole)
            return made, _describe(plan, used + need.total, limit, longest)
    parts = f"{_mb(used)} for the model, {_mb(need.path)} for the row, {_mb(need.block)} for a block of {plan.block_rows} tokens"
    raise LoraTrainerError(
        f"the longest row has {longest} tokens and needs {_mb(used + need.total)} ({parts}, {_mb(need.head)} for the head), "
        f"and the limit is {_mb(limit or 0)}; raise --max-memory, lower max_seq_length, or use a smaller base model"
    )


def check_plan(architecture: Architecture, plan: Plan, load: Load, max_memory: int | None) -> str:
    """Words about a plan that was made earlier. Raises LoraTrainerError with the numbers when there is no room for it now."""
    used, limit = _limit(max_memory)
    total = used + estimate(architecture, plan, load.longest, load.largest).total
    if limit is not None and total > limit:
        raise LoraTrainerError(
            f"the training that is gone on with needs {_mb(total)} as it was planned, and the limit is {_mb(limit)}; free memory, raise "
            "--max-memory, or make a new plan by --force, with which the adapter may differ by rounding"
        )
    return _describe(plan, total, limit, load.longest)


def _limit(max_memory: int | None) -> tuple[int, int | None]:
    """(bytes that this process has and torch is about to take, bytes that it may have)."""
    used = resident_bytes() + RUNTIME_BYTES
    free = free_bytes()
    return used, max_memory if max_memory is not None else used + int(SHARE_OF_FREE * free) if free is not None else None


def estimate(architecture: Architecture, plan: Plan, longest: int, largest: int) -> Need:
    """What `plan` needs for steps whose longest row has `longest` tokens and whose rows have `largest` together."""
    block = min(plan.block_rows, largest)
    held = _held_rows(plan, longest, largest)
    element = architecture.dtype.itemsize
    kept = sum(_kept_values(layer, plan.keep) for layer in architecture.layers) * element
    shared = sum(math.prod(layer.mixer.shared_shape) for layer in architecture.layers) * (element + max(element, 4))
    passing = max(_passing_values(layer, plan.keep) for layer in architecture.layers) * max(element, 4)
    vocabulary, hidden = architecture.head.shape
    adapters = [adapter for linear in architecture.linears for adapter in linear.adapters]
    trained = sum((adapter.a.numel() + adapter.b.numel()) * adapter.a.itemsize for adapter in adapters)
    return Need(
        path=held * (kept + shared),
        block=block * (passing + hidden * element * 8),  # of the hidden size: the last output, and what the head makes of and for it
        head=HEAD_ROWS * vocabulary * (element + 2 * max(element, 4)),
        optimizer=3 * trained,  # gradient and two moments
    )


def _whole_rows(architecture: Architecture, plan: Plan, largest: int, room: int | None) -> int:
    """Rows of the largest tree that fits into `room` bytes as one block, no more than `largest`; found by halving."""
    low, high = 0, largest + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = room is None or estimate(architecture, replace(plan, block_rows=middle), middle, middle).total <= room
        low, high = (middle, high) if fits else (low, middle)
    return low


def _held_rows(plan: Plan, longest: int, largest: int) -> int:
    """Rows held at one time: those of the longest path, and siblings in a block at its end."""
    return min(longest + min(plan.block_rows, largest), largest)


def resident_bytes() -> int:
    """Memory that this process has now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    import resource

    return pages * resource.getpagesize()


def free_bytes() -> int | None:
    """Bytes that can be had without swapping, or None where the system does not say."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _kept_values(layer: Layer, keep: Keep) -> int:
    """Values kept for a row until its backward pass."""
    hidden = layer.mlp.gate_up.n_inputs
    values = hidden
    if keep >= Keep.MIXER:
        values += hidden + layer.mixer.kept_values
    return values + (layer.mlp.gate_up.weight.shape[0] if keep >= Keep.PRODUCTS else 0)


def _passing_values(layer: Layer, keep: Keep) -> int:
    """Values that exist for a row while a layer goes backward, those that are computed again among them."""
    mlp = layer.mlp
    again = _kept_values(layer, Keep.PRODUCTS) - _kept_values(layer, keep)
    return again + 2 * mlp.gate_up.weight.shape[1] + 2 * mlp.down.weight.shape[1] + 2 * mlp.gate_up.weight.shape[0]


def _describe(plan: Plan, total: int, limit: int | None, longest: int) -> str:
    kept = {
        Keep.PRODUCTS: "nothing wide is computed twice",
        Keep.MIXER: "the MLP is computed twice",
        Keep.INPUTS: "layers are computed twice",
    }
    of = f" of {_mb(limit)}" if limit is not None else ""
    return f"blocks of {plan.block_rows} tokens, {kept[plan.keep]}: about {_mb(total)}{of} for rows of up to {longest} tokens"


def _mb(n_bytes: int) -> str:
    return f"{n_bytes >> 20} MB"
