"""Random adapters with a clear effect, in PEFT's own files, made without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_adapter(folder: Path, config: dict[str, Any], seed: int, *, rank: int = 4, strength: float = 0.05) -> Path:
    """An adapter of the attention of a Llama-like model, whose `config.json` is `config`, in `folder`.

    `strength` is the standard deviation of each product's change for one unit of its input: 0.05 changes what a small model says.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    out = {
        "q_proj": heads * head,
        "k_proj": config["num_key_value_heads"] * head,
        "v_proj": config["num_key_value_heads"] * head,
        "o_proj": hidden,
    }
    draw = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, rows in out.items():
            columns = heads * head if name == "o_proj" else hidden
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{path}.lora_A.weight"] = draw.normal(0, 1 / np.sqrt(columns), (rank, columns)).astype(np.float32)
            tensors[f"{path}.lora_B.weight"] = draw.normal(0, strength, (rows, rank)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": list(ATTENTION),
        "bias": "none",
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
