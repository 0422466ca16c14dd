"""loraloop's own engines, one optimizer step at a time: `dense` as the plain reference, `tree` with shared prefixes once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.steps import SHARING, Job, StepClock, adapter_parameters, reset_adapter
from loraloop.chat.render import Row
from loraloop.train import loop

Step = Callable[[Any, Sequence[Row]], float]
"""Adds the gradient of the window's mean loss to the adapter's and gives that loss."""


def run(engine: str, model: Any, job: Job) -> StepClock:
    """Warm up, take the check's step, and time steps, each part from the initial adapter with a new optimizer."""
    workload, plan = job.workload, job.plan
    run_step = _open_step(engine, model, plan.batch_size)
    parameters = adapter_parameters(model)
    clock = StepClock(plan, parameters)
    model.train()

    def take_steps(rows: Sequence[Row], is_done: Callable[[float], bool]) -> None:
        reset_adapter(parameters, job.initial)
        optimizer = torch.optim.AdamW([parameter for _, parameter in parameters], lr=plan.learning_rate, weight_decay=0.0)
        done = False
        while not done:
            clock.begin()
            loss = run_step(model, rows)
            clock.keep_gradient()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = is_done(loss)

    warm_up, check, timed = (
        [row.to_row() for row in rows]
        for rows in (workload.warm_up_rows, workload.check_rows, workload.timed_rows(shares=engine in SHARING))
    )
    take_steps(warm_up, lambda _: True)
    clock.first_gradient.clear()
    if len(check) < len(timed):
        take_steps(check, lambda loss: clock.end(loss) or True)
        clock.restart()
    take_steps(timed, clock.end)
    return clock


def _open_step(engine: str, model: Any, batch_size: int) -> Step:
    """The step of an engine, made ready for `model`."""
    if engine == "dense":
        return lambda model, rows: loop._backward(model, rows, batch_size)  # noqa: SLF001  the step without the loop round it
    del model  # the tree engine is opened for the model here
    raise SystemExit(f"bench: loraloop has no engine {engine!r} in this version; leave it out of --engines")
