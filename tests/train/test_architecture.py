"""Which models the tree engine reads, why it refuses others, that those train on the dense engine, and that PEFT's model stays whole."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny import make_config
from train.tree_cases import SHAPES, VOCABULARY, units_of
from train.tree_models import CONFIGS, NAMES, make_arguments, make_twins, twins

from loraloop.train import loop
from loraloop.train.architecture import find_obstacle, read_architecture
from loraloop.train.choice import loop_settings, open_engine
from loraloop.train.dense import DenseEngine
from loraloop.train.engine import TreeEngine
from loraloop.train.memory import Load
from loraloop.train.objectives import Likelihood
from loraloop.training_record import TrainingEvent

ROWS = SHAPES["branches of branches"]
LOAD = Load.of([[row] for row in ROWS], len(ROWS))
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def adapted(config: Any, change: Callable[[Any], object] = lambda _: None, **lora: Any) -> Any:
    """A tiny model with an adapter, and something done to it."""
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 4.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_config(config), peft.LoraConfig(**settings))
    change(model)
    return model


def tiny(architecture: str = "llama", **changes: Any) -> Any:
    return make_config(architecture, **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, **changes})


def add_another(model: Any) -> None:
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])


def cap_logits(model: Any) -> None:
    model.get_base_model().config.final_logit_softcapping = 30.0


def train_a_norm(model: Any) -> None:
    model.get_base_model().get_decoder().norm.weight.requires_grad_(True)


OBSTACLES: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (lambda: adapted(tiny(), use_dora=True), "uses a variant of LoRA"),
    "trained biases": (lambda: adapted(tiny("qwen2"), bias="lora_only"), "base_layer.bias is trained and is no LoRA matrix"),
    "biases of its own": (lambda: adapted(tiny("qwen2"), lora_bias=True, target_modules=["q_proj"]), "trains a bias"),
    "modules to save": (lambda: adapted(tiny(), modules_to_save=["norm"]), "is trained and is no LoRA matrix"),
    "the head": (
        lambda: adapted(tiny(tie_word_embeddings=False), target_modules=["q_proj", "lm_head"]),
        "head is not a plain linear layer",
    ),
    "embeddings": (lambda: adapted(tiny(), target_modules=["q_proj", "embed_tokens"]), "is a Embedding, not a plain linear layer"),
    "new tokens": (lambda: adapted(tiny(), trainable_token_indices=[1, 2], target_modules=["q_proj"]), "is trained|head is not"),
    "another architecture": (
        lambda: adapted(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCABULARY), fan_in_fan_out=True),
        "gpt2 has no proven tree path; llama, qwen2, qwen3, lfm2 have",
    ),
    "sliding window": (
        lambda: adapted(tiny("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)),
        "layers with sliding-window attention",
    ),
    "rotations that depend on the sequence": (lambda: adapted(tiny(rope_parameters=DYNAMIC)), "rotary embedding of type dynamic"),
    "another activation": (lambda: adapted(tiny(hidden_act="gelu")), "its activation is gelu, not silu"),
    "dropout of attention": (lambda: adapted(tiny("qwen3", attention_dropout=0.1)), "drops attention weights out"),
    "capped logits": (lambda: adapted(tiny(), cap_logits), "scales or caps its logits"),
    "a trained norm": (lambda: adapted(tiny(), train_a_norm), "norm.weight is trained and is no LoRA matrix"),
    "two adapters": (lambda: adapted(tiny(), add_another), "has not exactly one active adapter"),
}
UNTRAINABLE: dict[str, Callable[[Any], object]] = {
    "merged": lambda model: model.merge_adapter(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("name", OBSTACLES)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
def test_what_has_no_proven_path_trains_on_the_dense_engine_with_a_warning_that_says_why(name: str) -> None:
    make, reason = OBSTACLES[name]
    model, heard = make(), []
    arguments = make_arguments(lr=0.01, max_steps=2)
    engine = open_engine(model, LOAD, arguments, heard.append)
    assert isinstance(engine, DenseEngine)
    (warning,) = [event.message for event in heard if event.event == "warning"]
    assert warning.startswith("every sample is computed by itself (dense engine): ")
    assert find_obstacle(model) in warning
    assert re.search(reason, warning), warning
    losses = loop.train(loop.Run(model, engine, Likelihood()), units_of(ROWS), loop_settings(arguments), heard.append).losses
    assert losses[1][1] < losses[0][1]


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_an_adapter_that_is_not_at_work_is_not_read(name: str) -> None:
    assert "has not exactly one active adapter" in str(find_obstacle(adapted(tiny(), UNTRAINABLE[name])))


@pytest.mark.parametrize("name", NAMES)
def test_proven_architectures_get_the_tree_engine_unless_the_dense_one_is_asked_for(name: str) -> None:
    heard: list[TrainingEvent] = []
    engine = open_engine(copy.deepcopy(twins(name).plain), LOAD, make_arguments(), heard.append)
    assert isinstance(engine, TreeEngine)
    assert [event.event for event in heard] == ["note"]
    assert str(heard[0].message).startswith("tree engine, kernels: torch (the native kernels are for bfloat16); blocks of ")
    assert isinstance(open_engine(copy.deepcopy(twins(name).plain), LOAD, make_arguments(engine="dense"), heard.append), DenseEngine)


def test_bfloat16_models_with_heads_that_the_native_kernels_cannot_do_train_in_torch() -> None:
    both, heard = make_twins(tiny("llama", head_dim=24), torch.bfloat16), []
    arguments = make_arguments(lr=0.01, max_steps=2)
    engine = open_engine(both.fused, LOAD, arguments, heard.append)
    assert "kernels: torch (the native kernels are not for heads of 24 values)" in str(heard[0].message)
    losses = loop.train(loop.Run(both.fused, engine, Likelihood()), units_of(ROWS), loop_settings(arguments), lambda _: None).losses
    assert losses[1][1] < losses[0][1]


# --- PEFT's model after it was read -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "qwen2", "lfm2"])
def read(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A PEFT model, and the same after the tree engine has read it and trained it for some steps."""
    both = make_twins(CONFIGS[request.param](), torch.float32)
    model = both.fused
    arguments = make_arguments(lr=0.01, max_steps=3)
    loop.train(loop.Run(model, both.engine(), Likelihood()), units_of(ROWS), loop_settings(arguments), lambda _: None)
    return both.plain, model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ROWS[0].ids])).logits


def test_base_weights_are_the_same_numbers_under_the_same_names(read: tuple[Any, Any]) -> None:
    before, after = (model.state_dict() for model in read)
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == ("lora_" not in name), name


def test_base_weights_are_read_where_they_are_computed_with() -> None:
    model = copy.deepcopy(twins("llama").plain)
    linear = read_architecture(model).linears[0]
    attention = model.get_base_model().get_decoder().layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        weight = projection.base_layer.weight
        assert weight.untyped_storage().data_ptr() == linear.weight.untyped_storage().data_ptr()
        assert not weight.requires_grad


def test_disabling_the_adapter_gives_the_base_model(read: tuple[Any, Any]) -> None:
    plain, model = read
    with plain.disable_adapter(), model.disable_adapter():
        assert torch.allclose(logits(plain.eval()), logits(model), rtol=1e-6, atol=1e-6)
    assert float((logits(plain) - logits(model)).abs().max()) > 1e-3


def test_a_saved_adapter_gives_the_same_logits_on_a_new_base(read: tuple[Any, Any], tmp_path: Path) -> None:
    plain, model = read
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = copy.deepcopy(plain).unload()
    again = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.allclose(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert float((logits(plain.eval()) - logits(model)).abs().max()) > 1e-3


def test_the_merged_model_can_be_saved_as_one(read: tuple[Any, Any], tmp_path: Path) -> None:
    expected = logits(read[1])
    merged = copy.deepcopy(read[1]).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.allclose(logits(transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))), expected, rtol=1e-4, atol=1e-4)
