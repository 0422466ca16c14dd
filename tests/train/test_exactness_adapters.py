"""Adapters of other forms than one rank on every layer: what is not adapted is computed too, what is scaled is scaled once."""

from __future__ import annotations

from typing import Any

import pytest
from train.tree_cases import SHAPES, random_rows
from train.tree_models import CONFIGS, make_twins, take_gradient

from loraloop.train.buffers import Keep
from loraloop.train.engine import Plan

LIMIT = 1e-12
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "queries and values": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "keys alone": ("qwen3", {"target_modules": ["k_proj"]}),
    "attention outputs alone": ("qwen2", {"target_modules": ["o_proj"]}),
    "up alone": ("llama", {"target_modules": ["up_proj"]}),
    "down alone, biases": ("llama, biases, yarn", {"target_modules": ["down_proj"]}),
    "gates of the convolution": ("lfm2", {"target_modules": ["in_proj", "k_proj"]}),
    "outputs of the convolution": ("lfm2, wider, biases", {"target_modules": ["out_proj", "w2"]}),
    "one layer alone": ("qwen2", {"layers_to_transform": [1], "target_modules": ["q_proj", "k_proj", "gate_proj", "down_proj"]}),
    "scaled by the root of the rank": ("llama", {"use_rslora": True, "r": 8}),
    "ranks and alphas of their own": (
        "qwen2",
        {"rank_pattern": {"k_proj": 2, "0.mlp.up_proj": 7, "down_proj": 1}, "alpha_pattern": {"v_proj": 11.0, "1.mlp.gate_proj": 0.5}},
    ),
    "larger than the layer": ("qwen3", {"r": 40}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradient_is_that_of_separate_samples(name: str) -> None:
    base, lora = ADAPTERS[name]
    both = make_twins(CONFIGS[base](), **lora)
    for rows in (SHAPES["branches of branches"], random_rows(1)):
        truth = both.truth(rows)
        assert float(truth.vector.norm()) > 1e-3
        for plan in (Plan(1000, Keep.PRODUCTS), Plan(4, Keep.MIXER), Plan(3, Keep.INPUTS)):
            assert both.tree(rows, plan).apart(truth) <= LIMIT


def test_only_matrices_of_the_adapter_get_a_gradient() -> None:
    both = make_twins(CONFIGS["qwen2"](), target_modules=["q_proj", "down_proj"])
    take_gradient(both.fused, lambda: both.engine().backward(SHAPES["weights"]))
    for name, parameter in both.fused.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
