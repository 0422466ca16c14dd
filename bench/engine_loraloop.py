"""loraloop's own engines, one optimizer step at a time: `dense` as the plain reference, `tree` with shared prefixes once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.steps import SHARING, Job, StepClock, adapter_parameters, reset_adapter
from loraloop.chat.render import Row
from loraloop.train.architecture import read_architecture
from loraloop.train.arithmetic import choose_arithmetic
from loraloop.train.dense import DenseEngine
from loraloop.train.engine import TreeEngine
from loraloop.train.memory import Load, make_plan

Step = Callable[[Sequence[Row]], float]
"""Adds the gradient of the window's mean loss to the adapter's and gives that loss."""


def run(engine: str, model: Any, job: Job) -> StepClock:
    """Warm up, take the check's step, and time steps, each part from the initial adapter with a new optimizer."""
    workload, plan = job.workload, job.plan
    parameters = adapter_parameters(model)
    clock = StepClock(plan, parameters)
    model.train()

    def take_steps(rows: Sequence[Row], is_done: Callable[[float], bool]) -> None:
        reset_adapter(parameters, job.initial)
        optimizer = torch.optim.AdamW([parameter for _, parameter in parameters], lr=plan.learning_rate, weight_decay=0.0)
        done = False
        while not done:
            clock.begin()
            loss = run_step(rows)
            clock.keep_gradient()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = is_done(loss)

    warm_up, check, timed = (
        [row.to_row() for row in rows]
        for rows in (workload.warm_up_rows, workload.check_rows, workload.timed_rows(shares=engine in SHARING))
    )
    run_step = _open_step(engine, model, timed, plan.batch_size)
    take_steps(warm_up, lambda _: True)
    clock.first_gradient.clear()
    if len(check) < len(timed):
        take_steps(check, lambda loss: clock.end(loss) or True)
        clock.restart()
    take_steps(timed, clock.end)
    return clock


def _open_step(engine: str, model: Any, rows: Sequence[Row], batch_size: int) -> Step:
    """The step of an engine, made ready for `model` as `python -m loraloop.train` would for these rows."""
    if engine == "dense":
        return DenseEngine(model, batch_size).backward
    architecture = read_architecture(model)
    plan, words = make_plan(architecture, Load.of([rows], 1), None)
    arithmetic, why_not = choose_arithmetic(architecture.dtype, architecture.head_sizes)
    sys.stderr.write(f"tree: {arithmetic.name}{f' ({why_not})' if why_not else ''}, {words}\n")
    return TreeEngine(architecture, plan, arithmetic).backward
