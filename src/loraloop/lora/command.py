"""The command line of a training process: the contract that every training script keeps, and what only loraloop's own is told."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Self

from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.lora.runs import Run
from loraloop.training_data import Method


@dataclass(frozen=True)
class Paths:
    """Where a training process reads and writes."""

    data: Path
    output: Path
    """The adapter's folder, which is not there yet."""
    held_out: Path | None = None
    checkpoints: Path | None = None
    adapter: Path | None = None
    """To go on from."""
    resume: bool = False
    force: bool = False

    @classmethod
    def of_run(cls, run: Run, output_dir: Path, adapter: Path | None, *, resume: bool, force: bool) -> Self:
        """Those of a run."""
        held_out = run.path / "held_out.jsonl"
        is_there = run.plan.held_out_sha256 is not None
        data, output = run.path / "train.jsonl", output_dir / run.id
        return cls(data, output, held_out if is_there else None, run.checkpoints, adapter, resume, force)


def build_argv(config: LoraTrainerConfig, options: TrainOptions, paths: Paths, method: Method) -> list[str]:
    """Interpreter, script, the contract's arguments; behind them loraloop's own, which a `train_script` never sees."""
    python = str(config.python_path or sys.executable)
    script = [str(config.train_script)] if config.train_script is not None else ["-m", "loraloop.train"]
    contract = {
        "--data": paths.data,
        "--output": paths.output,
        "--model": config.base_model,
        "--rank": config.lora_rank,
        "--alpha": _plain_number(config.lora_alpha),
        "--dropout": _plain_number(config.lora_dropout),
        "--epochs": config.epochs,
        "--batch-size": config.batch_size,
        "--grad-accum": config.gradient_accumulation,
        "--lr": _plain_number(config.learning_rate),
        "--max-seq-length": config.max_seq_length,
    }
    argv = [python, *script, *(str(part) for pair in contract.items() for part in pair)]
    if config.train_script is not None:
        return argv
    argv += options.to_argv(method)
    for option, path in (("--held-out", paths.held_out), ("--checkpoints", paths.checkpoints), ("--adapter", paths.adapter)):
        argv += [option, str(path)] if path is not None else []
    return argv + (["--resume"] if paths.resume else []) + (["--force"] if paths.force else [])


def _plain_number(value: float) -> str:
    """Shortest decimal text without an exponent: 32.0 is `32`, 2e-4 is `0.0002`."""
    return format(Decimal(repr(float(value))).normalize(), "f")
