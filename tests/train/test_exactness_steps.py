"""Rounding: the tree engine in bfloat16 against float64, and whole trainings in float32 against the dense engine's."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_config
from train.tree_cases import random_rows, units_of
from train.tree_models import CONVOLUTIONS, compute_norms_in_float64, make_twins, plain_gradient

from loraloop.chat.render import Row
from loraloop.train import loop
from loraloop.train.architecture import read_architecture
from loraloop.train.arithmetic import TorchArithmetic, choose_arithmetic
from loraloop.train.buffers import Keep
from loraloop.train.dense import DenseEngine
from loraloop.train.engine import Plan, TreeEngine
from loraloop.train.objectives import Engine, Likelihood

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "lfm2": {"num_hidden_layers": 4, "layer_types": CONVOLUTIONS},
}
VOCABULARY = 64


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_no_farther_from_float64_than_peft_itself(name: str) -> None:
    """For torch's arithmetic and for the native kernels, where the machine has them."""
    both = make_twins(make_config(name, vocab_size=VOCABULARY, **FAMILIES[name]), torch.bfloat16)
    true = copy.deepcopy(both.plain).double()
    compute_norms_in_float64(true)
    for seed in range(2):
        rows = random_rows(seed, n_rows=8, shared=60, own=30, vocabulary=VOCABULARY)
        truth = plain_gradient(true, rows)
        of_peft = plain_gradient(both.plain, rows).apart(truth)
        assert of_peft > 1e-3
        for arithmetic in (TorchArithmetic(), choose_arithmetic(torch.bfloat16)[0]):
            for block_rows in (16, 1000):
                found = both.tree(rows, Plan(block_rows, Keep.MIXER), arithmetic=arithmetic)
                assert found.apart(truth) <= 1.5 * of_peft, (arithmetic.name, block_rows)


# --- whole trainings --------------------------------------------------------------------------------------------------------


def train(base: Any, rows: list[Row], engine: Callable[[Any], Engine], steps: int) -> tuple[torch.Tensor, list[float]]:
    """The adapter after `steps` steps of AdamW, as one vector, and the losses."""
    model = loop.new_adapter(copy.deepcopy(base), 4, 8.0, 0.0, 3)
    settings = loop.LoopSettings(steps, len(rows), 1, 1e-3, 0.1, 1.0, steps, 3)
    history = loop.train(loop.Run(model, engine(model), Likelihood()), units_of(rows), settings, lambda _: None)
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]), [loss for _, loss in history.losses]


@pytest.mark.parametrize("name", FAMILIES)
def test_fifty_steps_give_the_adapter_of_the_dense_engine_within_float32_rounding(name: str) -> None:
    """Another batch size, which is another order of sums, moves the dense engine's own adapter by 5e-7 of the way it went."""
    import transformers

    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(make_config(name, vocab_size=VOCABULARY, **FAMILIES[name]))
    rows = random_rows(8, n_rows=4, shared=16, own=8, vocabulary=VOCABULARY)
    dense, losses = train(base, rows, lambda model: DenseEngine(model, 4), 50)
    first, _ = train(base, rows, lambda model: DenseEngine(model, 4), 1)
    tree, tree_losses = train(base, rows, lambda model: TreeEngine(read_architecture(model), Plan(12), TorchArithmetic()), 50)
    assert losses[-1] < losses[0] - 0.3
    assert float((tree - dense).norm() / (dense - first).norm()) <= 1e-5
    assert tree_losses == pytest.approx(losses, rel=1e-6)


EPISODES = [
    [("system", "You cook with what is there."), ("user", "An egg, please."), ("assistant", "Boiled?"), *more]
    for more in (
        [("user", "Yes."), ("assistant", "Six minutes.")],
        [("user", "Yes."), ("assistant", "Six minutes."), ("user", "Salt?"), ("assistant", "A little.")],
        [("user", "No, fried."), ("assistant", "With butter.")],
        [("user", "No, fried."), ("assistant", "With oil.")],
        [],
    )
]


def test_the_training_process_writes_the_adapter_of_the_dense_engine(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    data = tmp_path / "data.jsonl"
    samples = [{"conversations": [{"role": role, "content": content} for role, content in turns]} for turns in EPISODES]
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    fixed = ["--data", data, "--model", tiny_model("lfm2"), "--dtype", "float32", "--dropout", "0", "--seed", "3", "--lr", "0.003"]
    size = ["--epochs", "10", "--batch-size", "4", "--grad-accum", "1"]
    started = {
        engine: subprocess.Popen(
            [sys.executable, "-m", "loraloop.train", *fixed, *size, "--engine", engine, "--output", tmp_path / engine],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "LORALOOP_LEASES": str(tmp_path / f"leases-{engine}")},  # side by side
        )
        for engine in ("tree", "dense")
    }
    for process in started.values():
        assert process.communicate(timeout=240)[1] is not None
        assert process.returncode == 0
    tree, dense = (load_file(tmp_path / engine / "adapter_model.safetensors") for engine in ("tree", "dense"))
    assert tree.keys() == dense.keys()
    for name, expected in dense.items():
        assert float((tree[name] - expected).norm() / expected.norm()) <= 1e-4, name
        assert float(expected.norm()) > 0
    records = {engine: json.loads((tmp_path / engine / "training_record.json").read_text()) for engine in ("tree", "dense")}
    assert [records[engine]["engine"] for engine in ("tree", "dense")] == ["tree", "dense"]
    assert records["tree"]["n_logical_tokens"] == records["dense"]["n_logical_tokens"] == records["dense"]["n_computed_tokens"]
    assert records["tree"]["n_computed_tokens"] < 0.8 * records["dense"]["n_computed_tokens"]
    assert records["tree"]["loss_history"] == [[step, pytest.approx(loss, rel=1e-5)] for step, loss in records["dense"]["loss_history"]]
