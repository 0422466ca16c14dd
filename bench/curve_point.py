"""One point of a curve: generated samples that share a prefix of a given length, one optimizer step of them timed in a process of its own.

The token ids mean nothing; time and memory of a step do not depend on what they say. Started by `bench.curves`, or by hand:
`python -m bench.curve_point model-folder '{"curve": "ratio", "n_samples": 8, "length": 1024, "shared": 512}' result.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from bench.counts import count_shared
from bench.steps import adapter_parameters
from bench.train import DENSE_BATCH
from bench.worker import load, peak_rss_mb
from bench.workload import BenchRow
from loraloop import base_model
from loraloop.chat.render import Row
from loraloop.episode import Frozen
from loraloop.files import write_atomic

Curve = Literal["ratio", "size", "samples", "blocks"]
WARM_UP_SAMPLES = 12
"""The untimed step is over so many samples at most: enough to touch all memory that a path, a block and the head take."""
QUIET = 0.1
"""A step is taken again when others had more than this share of the machine's processor time, as often as there are steps to take."""
TRAINED_SHARE = 16
"""One token of so many is supervised: the last ones of each sample, as the agent's turn at the end of its history is."""


class Point(Frozen):
    """What one process measures."""

    curve: Curve
    engine: Literal["tree", "dense"] = "tree"
    n_samples: int
    length: int
    """Tokens of a sample."""
    shared: int
    """Tokens that all samples begin with; the next one differs between any two."""
    block_rows: int | None = None
    """Rows of a block, at most; None is what `memory.make_plan` takes."""
    repeats: int = 3
    """Timed steps that count, behind one that is not."""
    seed: int = 0


class PointResult(Frozen):
    """What came of it."""

    point: Point
    logical_tokens: int
    computed_tokens: int
    """Distinct prefixes for the tree engine, else the logical tokens; counted apart from the engine."""
    step_seconds: list[float]
    """Of the steps that count: those during which other processes computed least."""
    other_share: list[float]
    """Of the machine's processor time during each of them, what other processes had; 0 where the system does not say."""
    loading_rss_mb: float
    """The most resident memory until the model was loaded."""
    loaded_rss_mb: float
    """Resident memory then: libraries, base model, adapter."""
    peak_rss_mb: float
    """The most resident memory of the steps. Loading may have taken more, and is in it where the system cannot forget that."""
    plan: str
    """The engine's own words about how it computes."""

    @property
    def ratio(self) -> float:
        """Logical tokens for each computed one."""
        return self.logical_tokens / self.computed_tokens

    @property
    def seconds(self) -> float:
        """The median step."""
        return median(self.step_seconds)

    @property
    def logical_tokens_per_s(self) -> float:
        """In the median step."""
        return self.logical_tokens / self.seconds

    @property
    def computed_tokens_per_s(self) -> float:
        """In the median step."""
        return self.computed_tokens / self.seconds


def make_rows(n_samples: int, length: int, shared: int, vocabulary: int, seed: int) -> list[BenchRow]:
    """Samples of `length` tokens whose longest common prefix, of any two, has `shared` tokens.

    Raises ValueError when that cannot be: nothing is left to differ in, or there are fewer token ids than samples.
    """
    if not 0 <= shared < length or n_samples > vocabulary:
        raise ValueError(
            f"{n_samples} samples of {length} tokens with {shared} shared: expected shared < length and at most {vocabulary} samples"
        )
    draw = np.random.default_rng(seed)
    prefix = draw.integers(vocabulary, size=shared).tolist()
    branches = draw.permutation(vocabulary)[:n_samples].tolist()  # the first token that is a sample's own
    tails = draw.integers(vocabulary, size=(n_samples, length - shared - 1)).tolist()
    n_trained = max(1, length // TRAINED_SHARE)
    weights = (*[0.0] * (length - n_trained), *[1.0] * n_trained)
    return [BenchRow(ids=(*prefix, branch, *tail), weights=weights) for branch, tail in zip(branches, tails, strict=True)]


def find_shared(n_samples: int, length: int, ratio: float) -> int:
    """The shared prefix with which `n_samples` samples hold `ratio` logical tokens for each computed one, as nearly as may be.

    computed = shared + n (length - shared), and at least one token of each sample is its own.
    """
    shared = n_samples * length * (1 - 1 / ratio) / (n_samples - 1)
    return min(round(shared), length - 1)


def measure(model: Any, point: Point) -> PointResult:
    """Take the point's steps with a new optimizer: one to warm up, then those that are timed."""
    import torch

    rows = make_rows(point.n_samples, point.length, point.shared, model.get_base_model().config.vocab_size, point.seed)
    loading = peak_rss_mb()
    _forget_peak()
    loaded = peak_rss_mb()
    samples = [row.to_row() for row in rows]
    backward, plan = _open_engine(model, samples, point)
    optimizer = torch.optim.AdamW([parameter for _, parameter in adapter_parameters(model)], lr=1e-4, weight_decay=0.0)

    def step(some: Sequence[Row]) -> None:
        backward(some)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(samples[:WARM_UP_SAMPLES])
    steps: list[tuple[float, float]] = []  # (share of others, seconds)
    while len(steps) < 2 * point.repeats and sum(share <= QUIET for share, _ in steps) < point.repeats:
        steps.append(_time(lambda: step(samples)))
    steps = sorted(steps)[: point.repeats]
    n_logical = point.n_samples * point.length
    return PointResult(
        point=point,
        logical_tokens=n_logical,
        computed_tokens=count_shared(rows).computed_tokens if point.engine == "tree" else n_logical,
        step_seconds=[seconds for _, seconds in steps],
        other_share=[round(share, 3) for share, _ in steps],
        loading_rss_mb=round(loading, 1),
        loaded_rss_mb=round(loaded, 1),
        peak_rss_mb=round(peak_rss_mb(), 1),
        plan=plan,
    )


def _time(work: Callable[[], None]) -> tuple[float, float]:
    """(share of the machine's processor time that other processes had meanwhile, seconds)."""
    busy, own = _busy_seconds(), sum(os.times()[:2])
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    others = _busy_seconds() - busy - (sum(os.times()[:2]) - own)
    return max(0.0, others / seconds / (os.cpu_count() or 1)), seconds


def _busy_seconds() -> float:
    """Processor time that all processes have had; 0 where the system does not say."""
    try:
        user, nice, system, _, _, *more = map(int, Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:])
    except OSError:
        return 0.0
    return (user + nice + system + sum(more[:2])) / os.sysconf("SC_CLK_TCK")


def _open_engine(model: Any, rows: Sequence[Row], point: Point) -> tuple[Callable[[Sequence[Row]], float], str]:
    """(what computes the loss and gradient of some of `rows`, words about it)."""
    from loraloop.train.architecture import read_architecture
    from loraloop.train.arithmetic import choose_arithmetic
    from loraloop.train.dense import DenseEngine
    from loraloop.train.engine import TreeEngine
    from loraloop.train.memory import Load, make_plan

    model.train()
    if point.engine == "dense":
        dense = DenseEngine(model, DENSE_BATCH)
        return dense.backward, f"micro-batches of at most {DENSE_BATCH} rows"
    architecture = read_architecture(model)
    arithmetic, _ = choose_arithmetic(architecture.dtype)
    plan, words = make_plan(architecture, Load.of([rows], 1), None)
    if point.block_rows is not None:  # takes memory for what this tree needs, so that the comparison is of that and not of plans
        plan = replace(plan, block_rows=point.block_rows, path_rows=0)
        words = f"blocks of {plan.block_rows} tokens, keeping {plan.keep.name}"
    tree = TreeEngine(architecture, plan, arithmetic)
    return tree.backward, f"{arithmetic.name}: {words}"


def _forget_peak() -> None:
    """Let the most resident memory be what it is now (Linux): loading takes more than the steps of a small tree."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.curve_point", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("point", type=Point.model_validate_json)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of PEFT, about the next major version of transformers
    base_model.tune_process()  # before torch loads
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model = load(base_model.resolve_base(str(arguments.model)), "bfloat16")
    write_atomic(arguments.output, measure(model, arguments.point).model_dump_json())


if __name__ == "__main__":
    main()
