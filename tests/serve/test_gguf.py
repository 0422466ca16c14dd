"""Adapters as GGUF files: what is in them, and that each kind of bad adapter is refused with its reason and never raises."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
from random_adapters import make_adapter
from safetensors.numpy import load_file, save_file
from tiny import make_model

from loraloop.errors import ServingError
from loraloop.serve.gguf import GgufBase, check_adapter, permute_rows, read_base, write_adapter
from loraloop.serve.gguf_base import write_base

WEIGHTS = "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[GgufBase, dict[str, Any]]]:
    """A tiny base model of each architecture, and its configuration."""
    folder = tmp_path_factory.mktemp("bases")
    made = {}
    for architecture in ("llama", "qwen2", "qwen3"):
        model = make_model(architecture, folder / architecture)
        write_base(model, folder / f"{architecture}.gguf")
        made[architecture] = (read_base(folder / f"{architecture}.gguf"), json.loads((model / "config.json").read_text()))
    return made


@pytest.fixture
def adapter(bases: dict[str, tuple[GgufBase, dict[str, Any]]], tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", bases["llama"][1], 1)


def configure(**changes: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def rewrite(adapter: Path) -> None:
        loaded = load_file(adapter / WEIGHTS)
        change(loaded)
        save_file(loaded, adapter / WEIGHTS)

    return rewrite


def put(name: str, *shape: int, value: float = 1.0) -> Callable[[Path], None]:
    return tensors(lambda loaded: loaded.update({name: np.full(shape, value, np.float32)}))


def pickle_only(adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")


def cut_off(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-100])


def header_only(adapter: Path) -> None:
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda adapter: (adapter / name).write_bytes(data) and None


def add_head(adapter: Path) -> None:
    put("base_model.model.lm_head.lora_A.weight", 4, 64)(adapter)
    put("base_model.model.lm_head.lora_B.weight", 258, 4)(adapter)


def add_embeddings(adapter: Path) -> None:
    put("base_model.model.model.embed_tokens.lora_A.weight", 4, 64)(adapter)
    put("base_model.model.model.embed_tokens.lora_B.weight", 258, 4)(adapter)


def overflow(adapter: Path) -> None:
    put(f"{Q}.lora_B.weight", 64, 4, value=3e38)(adapter)
    configure(lora_alpha=400)(adapter)


def add_unknown(adapter: Path) -> None:
    put("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", 4, 64)(adapter)
    put("base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight", 64, 4)(adapter)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "dora": (configure(use_dora=True), "DoRA"),
    "dora_tensor": (put(f"{Q}.lora_magnitude_vector", 64), "magnitude of DoRA"),
    "bias": (configure(bias="lora_only"), "trains biases"),
    "lora_bias": (configure(lora_bias=True), "trains a bias"),
    "bias_tensor": (put(f"{Q}.lora_B.bias", 64), "not a matrix of LoRA"),
    "modules_to_save": (configure(modules_to_save=["lm_head"]), "replaces whole modules"),
    "saved_module": (put("base_model.model.lm_head.weight", 258, 64), "not a matrix of LoRA"),
    "pissa": (configure(init_lora_weights="pissa_niter_16"), "changes the base model's weights"),
    "olora": (configure(init_lora_weights="olora"), "changes the base model's weights"),
    "loftq": (configure(init_lora_weights="loftq"), "changes the base model's weights"),
    "init_is_a_list": (configure(init_lora_weights=["gaussian"]), "changes the base model's weights"),
    "alora": (configure(alora_invocation_tokens=[1, 2]), "aLoRA"),
    "layer_replication": (configure(layer_replication=[[0, 2]]), "repeats layers"),
    "token_rows": (configure(trainable_token_indices=[3]), "rows of the embeddings"),
    "transposed": (configure(fan_in_fan_out=True), "transposed"),
    "code": (configure(auto_map={"AutoModel": "evil.Model"}), "code of its own"),
    "later_setting": (configure(use_something_new=True), "use_something_new=True, which is not understood"),
    "another_type": (configure(peft_type="IA3"), "of the type 'IA3'"),
    "rank_is_text": (configure(r="eight"), "r is 'eight'"),
    "rank_is_zero": (configure(r=0), "r is 0"),
    "alpha_is_infinite": (configure(lora_alpha=float("inf")), "lora_alpha is inf"),
    "pattern_is_a_list": (configure(alpha_pattern=["q_proj"]), "alpha_pattern is"),
    "rank_differs": (configure(rank_pattern={"q_proj": 8}), "has rank 4, and adapter_config.json says 8"),
    "target_without_matrices": (configure(target_modules=["q_proj", "up_proj"]), "names up_proj as a target"),
    "gap": (
        tensors(lambda loaded: [loaded.pop(name) for name in list(loaded) if name.startswith(Q)]),
        "q_proj has no matrices in layers 0",
    ),
    "half": (tensors(lambda loaded: loaded.pop(f"{Q}.lora_A.weight")), "half of its matrices"),
    "another_shape": (put(f"{Q}.lora_B.weight", 96, 4), r"is for a layer of shape \(96, 64\)"),
    "no_matrix": (put(f"{Q}.lora_B.weight", 256), "do not fit together"),
    "halves_differ": (put(f"{Q}.lora_B.weight", 64, 5), "do not fit together"),
    "not_a_number": (put(f"{Q}.lora_A.weight", 4, 64, value=float("nan")), "not finite"),
    "infinite": (put(f"{Q}.lora_B.weight", 64, 4, value=float("inf")), "not finite"),
    "overflow": (overflow, "times its scale 100"),
    "integers": (tensors(lambda loaded: loaded.update({f"{Q}.lora_A.weight": np.ones((4, 64), np.int32)})), "is of I32"),
    "unknown_layer": (add_unknown, "which this base model does not have"),
    "embeddings": (add_embeddings, "no linear layer"),
    "tied_head": (add_head, r"lm_head, which in this base model is the embeddings \(tied\)"),
    "another_name": (put("model.layers.0.self_attn.q_proj.lora_A.weight", 4, 64), "not a matrix of LoRA"),
    "pickle": (pickle_only, r"pickled \(adapter_model.bin\)"),
    "cut_off": (cut_off, "cut off"),
    "header_only": (header_only, "cut off"),
    "empty": (write(WEIGHTS, b""), "cut off"),
    "no_tensors": (tensors(dict.clear), "no LoRA matrices"),
    "garbage": (write(WEIGHTS, b"\xff" * 64), "cannot be read"),
    "weights_are_missing": (lambda adapter: (adapter / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    "config_is_missing": (lambda adapter: (adapter / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "config_is_no_json": (write("adapter_config.json", b"{"), "cannot be read"),
    "config_is_a_list": (write("adapter_config.json", b"[]"), "is list, expected an object"),
    "config_is_deep": (write("adapter_config.json", b"[" * 100_000), "cannot be read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_adapter_is_refused_with_its_reason(
    kind: str, adapter: Path, bases: dict[str, tuple[GgufBase, dict[str, Any]]], tmp_path: Path
) -> None:
    base, _ = bases["llama"]
    assert check_adapter(adapter, base) == []
    spoil, reason = BAD[kind]
    spoil(adapter)
    findings = check_adapter(adapter, base)
    assert 1 <= len(findings) <= 2, "what is wrong, and not what follows from it"
    with pytest.raises(ServingError, match=reason):
        write_adapter(adapter, base, tmp_path / "out.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"], "no file, and nothing beside it"


def test_all_reasons_are_told(adapter: Path, bases: dict[str, tuple[GgufBase, dict[str, Any]]]) -> None:
    for kind in ("dora", "lora_bias", "unknown_layer", "infinite"):
        BAD[kind][0](adapter)
    assert len(check_adapter(adapter, bases["llama"][0], trained_on="f" * 64)) == 5


def test_folder_that_there_is_not_is_a_finding(bases: dict[str, tuple[GgufBase, dict[str, Any]]], tmp_path: Path) -> None:
    assert check_adapter(tmp_path / "nothing", bases["llama"][0]) == [
        "adapter_config.json is missing",
        "adapter_model.safetensors is missing",
    ]


def test_unproven_architecture_is_refused(adapter: Path, bases: dict[str, tuple[GgufBase, dict[str, Any]]]) -> None:
    gemma = replace(bases["llama"][0], architecture="gemma3")
    assert check_adapter(adapter, gemma) == ["the base model's architecture is 'gemma3'; adapters are proven for llama, qwen2, qwen3 only"]


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf_package.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {tensor.name: tensor.data for tensor in reader.tensors}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_file_holds_the_folded_matrices(architecture: str, bases: dict[str, tuple[GgufBase, dict[str, Any]]], tmp_path: Path) -> None:
    base, config = bases[architecture]
    adapter = make_adapter(tmp_path / "adapter", config, 1)
    configure(use_rslora=True, lora_alpha=3, alpha_pattern={"v_proj": 6}, base_model_name_or_path="/home/somebody/base")(adapter)
    write_adapter(adapter, base, tmp_path / "one.gguf", version="agent@0123456789ab")
    write_adapter(adapter, base, tmp_path / "two.gguf", version="agent@0123456789ab")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert b"somebody" not in (tmp_path / "one.gguf").read_bytes()
    fields, found = read(tmp_path / "one.gguf")
    assert fields["general.architecture"] == architecture
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert "adapter.lora.alpha" not in fields
    assert (fields["loraloop.version"], fields["loraloop.base.sha256"]) == ("agent@0123456789ab", base.sha256)
    stored = load_file(adapter / WEIGHTS)
    assert len(found) == len(stored)
    q = np.float32(3 / 2) * stored[f"{Q}.lora_B.weight"]  # alpha / sqrt(4)
    heads = q.reshape(4, 2, 8, 4)
    expected = np.stack([heads[:, 0], heads[:, 1]], axis=2).reshape(64, 4) if architecture == "llama" else q
    assert np.array_equal(found["blk.0.attn_q.weight.lora_b"], expected)
    assert np.array_equal(found["blk.0.attn_q.weight.lora_a"], stored[f"{Q}.lora_A.weight"])
    assert np.array_equal(found["blk.0.attn_v.weight.lora_b"], np.float32(3) * stored[f"{Q.replace('q_proj', 'v_proj')}.lora_B.weight"])


def test_bfloat16_and_float16_become_the_same_numbers(
    adapter: Path, bases: dict[str, tuple[GgufBase, dict[str, Any]]], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    for dtype in (torch.bfloat16, torch.float16):
        loaded = {name: tensor.to(dtype) for name, tensor in load_torch(adapter / WEIGHTS).items()}
        save_torch(loaded, adapter / WEIGHTS)
        write_adapter(adapter, bases["llama"][0], tmp_path / "out.gguf")
        _, found = read(tmp_path / "out.gguf")
        assert np.array_equal(found["blk.0.attn_q.weight.lora_a"], loaded[f"{Q}.lora_A.weight"].float().numpy())


def test_rows_are_put_as_llama_cpp_has_them() -> None:
    assert permute_rows(np.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("n_bytes", [0, 3, 64, 5000])
def test_base_file_that_is_cut_off_is_told(n_bytes: int, bases: dict[str, tuple[GgufBase, dict[str, Any]]], tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    path.write_bytes(bases["llama"][0].path.read_bytes()[:n_bytes])
    with pytest.raises(ServingError, match="not a GGUF file of a language model, or cut off"):
        read_base(path)
