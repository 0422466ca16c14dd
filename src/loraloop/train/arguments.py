"""The command line of the training process: the contract that every training script keeps, and options of our own."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from loraloop.base_model import Dtype
from loraloop.chat.length import LONG_POLICIES, LongPolicy
from loraloop.training_data import METHODS, Method

EngineName = Literal["tree", "dense"]
PreferenceLoss = Literal["sigmoid", "ipo"]
"""sigmoid is the loss of Rafailov et al. 2023, ipo that of Azar et al. 2023."""


@dataclass(frozen=True)
class TrainArguments:
    """Everything one training run is told."""

    data: Path
    output: Path
    model: str
    rank: int
    alpha: float
    dropout: float
    epochs: int
    batch_size: int
    grad_accum: int
    lr: float
    max_seq_length: int
    held_out: Path | None
    seed: int
    dtype: Dtype
    max_steps: int | None
    warmup_ratio: float
    max_grad_norm: float
    held_out_tokens: int
    engine: EngineName
    max_memory: int | None
    verify: bool
    long: LongPolicy
    method: Method
    beta: float
    loss: PreferenceLoss
    desirable_weight: float
    undesirable_weight: float
    adapter: Path | None
    checkpoints: Path | None
    checkpoint_every: int | None
    resume: bool
    force: bool
    time_limit: float | None
    eval_every: int | None
    early_stop: int | None
    wait: bool
    check: bool


def parse_arguments(argv: Sequence[str] | None = None) -> TrainArguments:
    """The arguments, checked for their ranges; prints what is wrong and exits with 2 otherwise."""
    parser = _parser()
    arguments = TrainArguments(**vars(parser.parse_args(argv)))
    for ok, complaint in (
        (arguments.rank >= 1, f"--rank {arguments.rank}: expected at least 1"),
        (0 < arguments.alpha < math.inf, f"--alpha {arguments.alpha:g}: expected a finite number above 0"),
        (0 <= arguments.dropout < 1, f"--dropout {arguments.dropout:g}: expected 0 <= dropout < 1"),
        (arguments.epochs >= 1, f"--epochs {arguments.epochs}: expected at least 1"),
        (arguments.batch_size >= 1, f"--batch-size {arguments.batch_size}: expected at least 1"),
        (arguments.grad_accum >= 1, f"--grad-accum {arguments.grad_accum}: expected at least 1"),
        (0 < arguments.lr < 1, f"--lr {arguments.lr:g}: expected 0 < lr < 1"),
        (arguments.max_seq_length >= 16, f"--max-seq-length {arguments.max_seq_length}: expected at least 16"),
        (arguments.held_out_tokens >= 1, f"--held-out-tokens {arguments.held_out_tokens}: expected at least 1"),
        (0 <= arguments.seed < 2**63, f"--seed {arguments.seed}: expected 0 <= seed < 2^63"),
        (arguments.max_steps is None or arguments.max_steps >= 1, f"--max-steps {arguments.max_steps}: expected at least 1"),
        (0 <= arguments.warmup_ratio < 1, f"--warmup-ratio {arguments.warmup_ratio:g}: expected 0 <= ratio < 1"),
        (arguments.max_grad_norm > 0, f"--max-grad-norm {arguments.max_grad_norm:g}: expected more than 0"),
        (arguments.max_memory is None or arguments.max_memory >= 1, f"--max-memory {arguments.max_memory}: expected at least 1 byte"),
        (0 < arguments.beta < math.inf, f"--beta {arguments.beta:g}: expected a finite number above 0"),
        *(
            (0 < weight < math.inf, f"--{name}-weight {weight:g}: expected a finite number above 0")
            for name, weight in (("desirable", arguments.desirable_weight), ("undesirable", arguments.undesirable_weight))
        ),
        *(
            (value is None or 0 < value < math.inf, f"--{name} {value}: expected more than 0")
            for name, value in (
                ("checkpoint-every", arguments.checkpoint_every),
                ("time-limit", arguments.time_limit),
                ("eval-every", arguments.eval_every),
                ("early-stop", arguments.early_stop),
            )
        ),
        (arguments.checkpoints is not None or not arguments.resume, "--resume: say of which --checkpoints"),
        (arguments.held_out is not None or arguments.early_stop is None, "--early-stop: give --held-out samples to stop by"),
        (arguments.adapter is None or arguments.adapter.is_dir(), f"--adapter {arguments.adapter}: no such folder"),
        (arguments.data.is_file(), f"--data {arguments.data}: no such file"),
        (arguments.held_out is None or arguments.held_out.is_file(), f"--held-out {arguments.held_out}: no such file"),
    ):
        if not ok:
            parser.error(complaint)
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loraloop.train",
        description="Train a LoRA adapter on a JSON Lines file of conversations and write it in PEFT's format.",
        epilog="example: python -m loraloop.train --data train.jsonl --output adapter --model ./SmolLM2-135M-Instruct --lr 1e-3\n"
        'a line of the file: {"conversations": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    contract = parser.add_argument_group("the contract that any training script keeps")
    contract.add_argument("--data", type=Path, required=True, help="the JSON Lines file of samples")
    contract.add_argument("--output", type=Path, required=True, help="the adapter's folder; must not exist yet")
    contract.add_argument("--model", required=True, help="base model: hub id, folder, or .gguf file")
    contract.add_argument("--rank", type=int, default=16, help="LoRA rank, at least 1 (16)")
    contract.add_argument("--alpha", type=float, default=32.0, help="LoRA alpha; the adapter is scaled by alpha / rank (32)")
    contract.add_argument("--dropout", type=float, default=0.05, help="LoRA dropout, 0 <= dropout < 1 (0.05)")
    contract.add_argument("--epochs", type=int, default=3, help="passes over the data (3)")
    contract.add_argument("--batch-size", type=int, default=4, help="rows of a micro-batch, at most (4)")
    contract.add_argument("--grad-accum", type=int, default=4, help="micro-batches of an optimizer step (4)")
    contract.add_argument("--lr", type=float, default=2e-4, help="peak learning rate of AdamW (0.0002)")
    contract.add_argument("--max-seq-length", type=int, default=2048, help="tokens of a row, at most (2048)")
    own = parser.add_argument_group("loraloop's own")
    own.add_argument("--held-out", type=Path, help="samples to measure the loss on before and after, never trained on")
    own.add_argument("--held-out-tokens", type=int, default=20_000, help="tokens to measure on, rows of all samples in turn (20000)")
    own.add_argument("--seed", type=int, default=0, help="of adapter, order and dropout (0)")
    own.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the base weights (auto)")
    own.add_argument("--max-steps", type=int, help="end after this many optimizer steps")
    own.add_argument("--warmup-ratio", type=float, default=0.1, help="share of the steps in which the rate rises (0.1)")
    own.add_argument("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm (1)")
    own.add_argument("--engine", choices=["tree", "dense"], default="tree", help="tree computes shared tokens once; dense is plain (tree)")
    own.add_argument("--max-memory", type=int, help="bytes that the process may take (80 %% of what is free)")
    own.add_argument(
        "--long", choices=LONG_POLICIES, default="window", help="samples above --max-seq-length: windows, cut, or refused (window)"
    )
    own.add_argument("--method", choices=METHODS, default="sft", help="how the samples are trained (sft)")
    own.add_argument("--beta", type=float, default=0.1, help="dpo, kto: how closely the model stays to its reference (0.1)")
    own.add_argument("--loss", choices=get_args(PreferenceLoss), default="sigmoid", help="dpo: the loss of a pair (sigmoid)")
    own.add_argument("--desirable-weight", type=float, default=1.0, help="kto: of a desirable sample's loss (1)")
    own.add_argument("--undesirable-weight", type=float, default=1.0, help="kto: of an undesirable sample's loss (1)")
    own.add_argument("--adapter", type=Path, help="train on from this adapter, instead of from a fresh one; rank and alpha must be its own")
    own.add_argument("--time-limit", type=float, help="seconds after which no further step is begun; the adapter is saved as it is then")
    own.add_argument("--eval-every", type=int, help="steps between measurements on --held-out (with --early-stop a tenth of all)")
    own.add_argument("--early-stop", type=int, help="end with the best adapter after this many measurements without a lower held-out loss")
    own.add_argument("--checkpoints", type=Path, help="a folder for checkpoints; without one a training that is killed begins anew")
    own.add_argument("--checkpoint-every", type=int, help="steps between checkpoints (as often as takes 1 %% of the time)")
    own.add_argument("--resume", action="store_true", help="go on behind the newest whole checkpoint, to the very same adapter")
    own.add_argument("--force", action="store_true", help="with --resume: although data, settings, versions or machine have changed")
    own.add_argument("--wait", action="store_true", help="wait while another training uses the device")
    own.add_argument("--check", action="store_true", help="only look whether the training can start, and what it would take")
    own.add_argument("--verify", action="store_true", help="compute the first step with both engines, and stop when they differ")
    return parser
