"""A LoRA adapter in PEFT's files, read without PEFT and torch: its pairs of matrices with their scales, and all that is wrong with it.

Only plain LoRA of linear layers passes: everything else changes the answer in a way that no server adds to its base model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""How PEFT begins the name of each tensor; what follows is the base model's own name of the module."""

FloatArray = npt.NDArray[np.float32]

_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_INERT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "eva_config"),
}
"""Settings that are read here, or that say nothing about the answer of what was trained; every other one must be empty or false."""
_REASONS = {
    "use_dora": "DoRA (use_dora) rescales the base model's own weights",
    "lora_bias": "it trains a bias (lora_bias)",
    "modules_to_save": "it replaces whole modules of the base model (modules_to_save)",
    "alora_invocation_tokens": "it is switched on by tokens (aLoRA, alora_invocation_tokens)",
    "layer_replication": "it repeats layers of the base model (layer_replication)",
    "trainable_token_indices": "it changes rows of the embeddings (trainable_token_indices)",
    "target_parameters": "it adapts bare parameters, not linear layers (target_parameters)",
    "fan_in_fan_out": "its matrices are transposed (fan_in_fan_out)",
    "auto_map": "it brings code of its own (auto_map), which is never run",
}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base model as it is; PiSSA, OLoRA, LoftQ, CorDA and LoRA-GA change its weights."""


@dataclass(frozen=True)
class LoraPair:
    """The change of one linear layer: y = Wx + scale · B(Ax)."""

    module: str
    """The base model's name of the layer, such as `model.layers.0.self_attn.q_proj`."""
    a: FloatArray  # (rank, in)
    b: FloatArray  # (out, rank)
    scale: float
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA, as the patterns have it for this module."""


@dataclass(frozen=True)
class PeftAdapter:
    """What could be read of an adapter, and a phrase for each thing that keeps it from being served."""

    pairs: tuple[LoraPair, ...]
    """Sorted by module; complete and finite when there are no findings."""
    findings: tuple[str, ...]
    config: Mapping[str, Any]


def read_adapter(folder: Path) -> PeftAdapter:
    """Read the adapter in `folder`. Never raises for files that are bad: that is among the findings."""
    config, findings = _read_config(folder / CONFIG_FILE)
    tensors, unreadable = _read_tensors(folder)
    findings += unreadable
    pairs = []
    for module, halves in sorted(_sort_halves(tensors, findings).items()):
        if len(halves) == 1:
            findings.append(f"{module} has half of its matrices only (lora_{next(iter(halves))})")
        elif any(half.ndim != 2 for half in halves.values()) or halves["A"].shape[0] != halves["B"].shape[1]:
            findings.append(f"{module}: lora_A {halves['A'].shape} and lora_B {halves['B'].shape} do not fit together")
        else:
            pairs += [pair for pair in [_make_pair(module, halves, config, findings)] if pair]
    if not unreadable and not pairs and not findings:
        findings.append(f"{WEIGHTS_FILE} holds no LoRA matrices")
    return PeftAdapter(tuple(pairs), tuple(findings), config)


def _read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, [f"{CONFIG_FILE} is missing"]
    except (OSError, ValueError, RecursionError) as error:
        return {}, [f"{CONFIG_FILE} cannot be read ({error})"]
    if not isinstance(config, dict):
        return {}, [f"{CONFIG_FILE} is {type(config).__name__}, expected an object"]
    return config, list(_check_config(config))


def _check_config(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"it is of the type {config.get('peft_type')!r}, expected 'LORA'"
    for name in ("r", "lora_alpha"):
        if not _is_positive(config.get(name)):
            yield f"{name} is {config.get(name)!r}, expected a positive number"
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(_is_positive(value) for value in pattern.values()):
            yield f"{name} is {pattern!r}, expected a positive number for each module"
    if config.get("bias", "none") != "none":
        yield f"it trains biases (bias={config['bias']!r})"
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_INITS:
        yield f"its way to begin (init_lora_weights={start!r}) changes the base model's weights; save it converted to plain LoRA"
    told = sorted((name, value) for name, value in config.items() if value and name not in _INERT)
    yield from (_REASONS.get(name, f"it has the setting {name}={value!r}, which is not understood") for name, value in told)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _read_tensors(folder: Path) -> tuple[dict[str, FloatArray], list[str]]:
    path = folder / WEIGHTS_FILE
    try:
        raw = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except FileNotFoundError:
        pickled = sorted(file.name for file in folder.glob("adapter_model*") if file.suffix in {".bin", ".pt", ".pth", ".pkl"})
        if pickled:
            return {}, [f"its weights are pickled ({', '.join(pickled)}), which can run code when read; save them as safetensors"]
        return {}, [f"{WEIGHTS_FILE} is missing"]
    except (OSError, SafetensorError) as error:
        return {}, [f"{WEIGHTS_FILE} cannot be read, or is cut off ({error})"]
    tensors, findings = {}, []
    for name, entry in raw:
        values = to_float32(entry["data"], entry["dtype"])
        if values is None:
            findings.append(f"{name} is of {entry['dtype']}, expected F32, F16 or BF16")
        else:
            tensors[name] = values.reshape(entry["shape"])
    return tensors, findings


def to_float32(data: bytes | bytearray | npt.NDArray[np.uint8], dtype: str) -> FloatArray | None:
    """The numbers of a tensor in a safetensors file, flat; None for a type that weights of a language model do not have."""
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    if dtype not in kinds:
        return None
    with np.errstate(over="ignore"):  # infinity, which is found later
        return np.frombuffer(data, kinds[dtype]).astype(np.float32)


def _sort_halves(tensors: Mapping[str, FloatArray], findings: list[str]) -> dict[str, dict[str, FloatArray]]:
    modules: dict[str, dict[str, FloatArray]] = {}
    for name, values in sorted(tensors.items()):
        if match := _KEY.fullmatch(name):
            modules.setdefault(match["module"], {})[match["half"]] = values
        elif "lora_magnitude_vector" in name:
            findings.append(f"{name}: a magnitude of DoRA, which rescales the base model's own weights")
        else:
            findings.append(f"{name}: not a matrix of LoRA for a linear layer")
    return modules


def _make_pair(module: str, halves: Mapping[str, FloatArray], config: Mapping[str, Any], findings: list[str]) -> LoraPair | None:
    a, b = halves["A"], halves["B"]
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        findings.append(f"{module} has values that are not finite")
        return None
    rank, alpha = (_find_own(config, kind, module) for kind in ("rank", "alpha"))
    if not _is_positive(rank) or not _is_positive(alpha):
        return None  # said of the configuration already
    if a.shape[0] != rank:
        findings.append(f"{module} has rank {a.shape[0]}, and {CONFIG_FILE} says {rank}")
        return None
    return LoraPair(module, a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _find_own(config: Mapping[str, Any], kind: str, module: str) -> Any:
    """The rank or alpha of `module`: of the first key of the pattern that it ends with, as PEFT reads it, else the general one."""
    pattern = config.get(f"{kind}_pattern") or {}
    if isinstance(pattern, dict):
        for key, value in pattern.items():
            try:
                if re.match(rf"(.*\.)?({key})$", module):
                    return value
            except re.error:
                continue
    return config.get("r" if kind == "rank" else "lora_alpha")
