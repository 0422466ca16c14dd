"""loraloop's own engines, one optimizer step at a time: `dense` as the plain reference, `tree` with shared prefixes once.

Both train rows by Likelihood and pairs by Preference, as `python -m loraloop.train` does. The base model's log-probabilities of pairs
are computed before the clock runs, and what that took is kept beside.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.steps import BETA, SHARING, Job, StepClock, adapter_parameters, reset_adapter
from bench.workload import BenchRow
from loraloop.chat.rows import Unit
from loraloop.train.architecture import read_architecture
from loraloop.train.arithmetic import choose_arithmetic
from loraloop.train.dense import DenseEngine
from loraloop.train.engine import TreeEngine
from loraloop.train.memory import Load, make_plan
from loraloop.train.objectives import Engine, Likelihood, Objective, Preference
from loraloop.train.reference import Reference, open_reference


def run(engine: str, model: Any, job: Job) -> StepClock:
    """Warm up, take the check's step, and time steps, each part from the initial adapter with a new optimizer."""
    workload, plan = job.workload, job.plan
    parameters = adapter_parameters(model)
    clock = StepClock(plan, parameters)
    model.train()

    def take_steps(units: Sequence[Unit], is_done: Callable[[float], bool]) -> None:
        reset_adapter(parameters, job.initial)
        optimizer = torch.optim.AdamW([parameter for _, parameter in parameters], lr=plan.learning_rate, weight_decay=0.0)
        done = False
        while not done:
            clock.begin()
            loss = objective.backward(computes, units, 0).loss
            clock.keep_gradient()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = is_done(loss)

    warm_up, check, timed = (
        to_units(rows, pairs=workload.is_preference)
        for rows in (workload.warm_up_rows, workload.check_rows, workload.timed_rows(shares=engine in SHARING))
    )
    computes = _open_engine(engine, model, timed, plan.batch_size)
    objective: Objective = Likelihood()
    if workload.is_preference:
        objective = Preference(measure_reference(computes, warm_up), BETA)
    take_steps(warm_up, lambda _: True)
    clock.first_gradient.clear()
    if workload.is_preference:
        started = time.perf_counter()
        reference = measure_reference(computes, timed)
        clock.reference_seconds = time.perf_counter() - started
        objective = Preference(reference, BETA)
    if len(check) < len(timed):
        take_steps(check, lambda loss: clock.end(loss) or True)
        clock.restart()
    take_steps(timed, clock.end)
    return clock


def to_units(rows: Sequence[BenchRow], *, pairs: bool) -> list[Unit]:
    """What one loss is of each: a row, or a pair of them."""
    own = [row.to_row() for row in rows]
    if pairs:
        return [Unit((better, worse), 1) for better, worse in zip(own[::2], own[1::2], strict=True)]
    return [Unit((row,), 1) for row in own]


def measure_reference(engine: Engine, units: Sequence[Unit]) -> Reference:
    """The base model's log-probabilities of all rows, computed at once and kept nowhere."""
    rows = [row for unit in units for row in unit.rows]
    n_tokens = sum(unit.n_tokens for unit in units)
    with tempfile.TemporaryDirectory() as folder:
        return open_reference(engine, rows, Path(folder), "bench", lambda _: None, chunk_tokens=n_tokens)


def _open_engine(engine: str, model: Any, units: Sequence[Unit], batch_size: int) -> Engine:
    """An engine, made ready for `model` as `python -m loraloop.train` would for these units."""
    if engine == "dense":
        return DenseEngine(model, batch_size)
    architecture = read_architecture(model)
    plan, words = make_plan(architecture, Load.of([unit.rows for unit in units], len(units)), None)
    arithmetic, why_not = choose_arithmetic(architecture.dtype, architecture.head_sizes)
    sys.stderr.write(f"tree: {arithmetic.name}{f' ({why_not})' if why_not else ''}, {words}\n")
    return TreeEngine(architecture, plan, arithmetic)
