"""One engine in a process of its own: loads, warms up, times its steps, and writes what came of it as JSON.

Started by `bench.train`, or by hand: `python -m bench.worker dense workload.json adapter.safetensors model-folder result.json`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, get_args

from bench.counts import ModelShape
from bench.steps import SHARING, Dtype, EngineResult, Job, StepClock, StepPlan
from bench.workload import Workload
from loraloop import base_model
from loraloop.files import write_atomic

UNTUNED = ("trl-tuned", "trl-default")
"""Engines whose process keeps the system's allocator as it is."""
RANK, ALPHA = 16, 32.0


def main() -> None:
    """Parse, run, write."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m bench.worker", description=__doc__)
    parser.add_argument("engine")
    for name in ("workload", "adapter", "model", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--dtype", choices=("auto", *get_args(Dtype)), default="auto")
    parser.add_argument("--plan", type=StepPlan.model_validate_json, default=StepPlan())
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of PEFT, about the next major version of transformers
    tuned = arguments.engine not in UNTUNED and base_model.tune_process()  # before torch loads
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import safetensors.torch
    import torch

    base = base_model.resolve_base(str(arguments.model))
    dtype = precision_of(arguments.engine, arguments.dtype)
    model = load(base, dtype)
    initial = safetensors.torch.load_file(arguments.adapter)
    workload = Workload.load(arguments.workload)
    startup_seconds = time.monotonic() - started
    clock = run(arguments.engine, model, base, Job(workload, arguments.plan, initial))
    peak = peak_rss_mb()
    safetensors.torch.save_file(clock.first_gradient, arguments.output.with_suffix(".safetensors"))
    result = EngineResult(
        engine=arguments.engine,
        first_loss=clock.first_loss if clock.first_loss is not None else float("nan"),
        losses=clock.losses,
        step_seconds=clock.step_seconds,
        step_tokens=sum(len(row.ids) for row in workload.timed_rows(shares=arguments.engine in SHARING)),
        gradient_norm=clock.gradient_norm(),
        reference_seconds=clock.reference_seconds,
        peak_rss_mb=peak,
        startup_seconds=startup_seconds,
        threads=torch.get_num_threads(),
        tuned_allocator=tuned,
        batch_size=arguments.plan.batch_size,
        autocast=arguments.plan.autocast,
        dtype=dtype,
        model_shape=ModelShape.of(model),
    )
    write_atomic(arguments.output, result.model_dump_json())


def precision_of(engine: str, wanted: base_model.Dtype) -> Dtype:
    """Float32 for trl-default, as TRL loads a base model; else what is wanted, `auto` being what loraloop trains in on this machine."""
    return "float32" if engine == "trl-default" else base_model.choose_dtype(wanted, "cpu")


def load(base: base_model.BaseModel, dtype: Dtype) -> Any:
    """The base model with a fresh LoRA adapter, whose B matrices are zero."""
    from loraloop.train.loop import new_adapter

    return new_adapter(base_model.load_model(base, dtype), RANK, ALPHA, 0.0, seed=0)


def run(engine: str, model: Any, base: base_model.BaseModel, job: Job) -> StepClock:
    """Hand over to the engine of that name."""
    if engine.startswith("trl-"):
        from bench import engine_trl

        return engine_trl.run(engine, model, base_model.load_tokenizer(base), job)
    from bench import engine_loraloop

    return engine_loraloop.run(engine, model, job)


def peak_rss_mb() -> float:
    """The most resident memory this process has had, in MiB: VmHWM where the system has it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        from loraloop.train.loop import peak_memory_mb

        return float(peak_memory_mb())
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    sys.exit(main())
