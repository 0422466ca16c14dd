"""`--verify`: it lets a right engine train, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train.tree_cases import SHAPES, random_rows, units_of
from train.tree_models import CONFIGS, NAMES, Twins, make_arguments, make_twins

from loraloop.chat.rows import Unit
from loraloop.errors import LoraTrainerError
from loraloop.train import engine
from loraloop.train.__main__ import main
from loraloop.train.arithmetic import choose_arithmetic
from loraloop.train.choice import verify
from loraloop.train.dense import DenseEngine
from loraloop.train.tree import TokenTree, build_tree
from loraloop.training_record import TrainingEvent

ROWS = random_rows(1)


def messages(both: Twins, dtype: torch.dtype = torch.float32, **changes: Any) -> list[str]:
    heard: list[TrainingEvent] = []
    verify(both.fused, both.engine(arithmetic=choose_arithmetic(dtype)[0]), units_of(ROWS), make_arguments(**changes), heard.append)
    assert {event.event for event in heard} == {"note"}
    return [str(event.message) for event in heard]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_engine_passes_and_leaves_neither_gradients_nor_other_weights(name: str, dtype: torch.dtype) -> None:
    both = make_twins(CONFIGS[name](), dtype, lora_dropout=0.3)
    before = {key: tensor.clone() for key, tensor in both.fused.state_dict().items()}
    (message,) = messages(both, dtype)
    assert message.startswith(f"verified on the {len(ROWS)} samples of the first step: loss ")
    assert all(parameter.grad is None for parameter in both.fused.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in both.fused.state_dict().items())


def test_the_samples_of_the_first_step_are_taken() -> None:
    (message,) = messages(make_twins(CONFIGS["llama"](), torch.float32), batch_size=2, grad_accum=1)
    assert message.startswith("verified on the 2 samples of the first step")


def siblings(tree: TokenTree) -> TokenTree:
    return replace(tree, positions=tree.positions + (np.arange(tree.n_rows) > 3))


def weights(tree: TokenTree) -> TokenTree:
    return replace(tree, target_weights=np.ones_like(tree.target_weights))


@pytest.mark.parametrize("wrong", [siblings, weights])
@pytest.mark.parametrize("name", ["llama", "lfm2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_engine_is_stopped(
    name: str, wrong: Callable[[TokenTree], TokenTree], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = make_twins(CONFIGS[name](), dtype)
    monkeypatch.setattr(engine, "build_tree", lambda rows: wrong(build_tree(rows)))
    with pytest.raises(LoraTrainerError, match=r"differ: loss .* gradients .* apart .*Nothing was trained; use --engine dense"):
        messages(both, dtype)


@pytest.mark.parametrize("matrix", ["a", "b"])
def test_a_wrong_gradient_of_either_matrix_is_stopped_before_the_first_step(matrix: str) -> None:
    """B is zero then, and with it every gradient of A."""
    both = make_twins(CONFIGS["qwen3"](), torch.float32)
    with torch.no_grad():
        for name, parameter in both.fused.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    messages(both)
    linear = both.architecture.linears[0]
    right = linear.adapters[0]
    linear.adapters[0] = replace(right, **{matrix: torch.nn.Parameter(getattr(right, matrix).detach().clone())})  # its gradient is lost
    with pytest.raises(LoraTrainerError, match="differ"):
        messages(both)


def test_what_is_not_a_number_is_stopped() -> None:
    both = make_twins(CONFIGS["llama"](), torch.float32)
    both.architecture.layers[0].mlp.norm.weight[0] = torch.nan
    with pytest.raises(LoraTrainerError, match="nan"):
        messages(both)


def test_a_pair_whose_sides_are_nearly_the_same_is_no_fault_of_the_engine() -> None:
    """Their gradients must not cancel out, so that rounding is all that is compared."""
    both, heard = make_twins(CONFIGS["llama"](), torch.float32), []
    verify(both.fused, both.engine(), [Unit((ROWS[0], ROWS[0]), 1)], make_arguments(method="dpo"), heard.append)
    assert str(heard[0].message).startswith("verified on the 1 samples")


def test_the_dense_engine_has_nothing_to_be_compared_with() -> None:
    both, heard = make_twins(CONFIGS["llama"](), torch.float32), []
    verify(both.fused, DenseEngine(both.fused, 1), units_of(ROWS), make_arguments(), heard.append)
    assert [event.message for event in heard] == ["nothing to verify: the dense engine is what the tree engine is compared with"]


@pytest.mark.parametrize("right", [True, False])
def test_the_command_trains_after_it_verified_and_saves_nothing_when_it_did_not(
    right: bool, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if not right:
        monkeypatch.setattr(engine, "build_tree", lambda rows: siblings(build_tree(rows)))
    turns = [("user", "Say hello"), ("assistant", "Hello there.")]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"conversations": [{"role": role, "content": content} for role, content in turns]}) + "\n")
    told = ["--data", str(data), "--output", str(tmp_path / "out"), "--model", str(tiny_model("qwen2")), "--verify", "--epochs", "1"]
    assert main([*told, "--dtype", "float32"]) == (0 if right else 1)
    captured = capfd.readouterr()
    assert ("verified on the 1 samples" in captured.out) == right
    assert ('"event":"step"' in captured.out) == right
    assert (tmp_path / "out").exists() == right
    assert ("LoraTrainerError: --verify: the tree engine and the dense engine differ" in captured.err) != right


def test_shapes_of_every_kind_pass() -> None:
    both, heard = make_twins(CONFIGS["lfm2"](), torch.float32), []
    for rows in SHAPES.values():
        verify(both.fused, both.engine(), units_of(rows), make_arguments(), heard.append)
    assert len(heard) == len(SHAPES)
