"""LoRA adapters for llama.cpp: PEFT's files become one GGUF file, with everything folded into the matrices that llama.cpp has no word for.

llama.cpp's own converter writes one alpha for all modules and forgets rsLoRA; here each module's scale is multiplied into its B and alpha
is left out, which llama.cpp reads as 1. The rows of B of queries and keys are put into the order that the base model's converter gave
theirs. Needs neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from loraloop.errors import ServingError
from loraloop.files import file_sha256, new_file
from loraloop.serve.peft_adapter import FloatArray, LoraPair, PeftAdapter, read_adapter
from loraloop.training_record import RECORD_FILE, TrainingRecord

PERMUTED = {"llama": True, "qwen2": False, "qwen3": False}
"""Of each architecture that is proven by test: whether a GGUF file has the rows of its queries and keys in an order of its own."""
SOURCE_KEY = "loraloop.source.sha256"
"""In a base model that was converted here: the hash of the folder it came from, as a training records it."""

_LAYER = re.compile(r"(.*?layers\.)(\d+)(\..+)")


@dataclass(frozen=True)
class GgufBase:
    """A base model in a GGUF file, as far as an adapter has to fit it."""

    path: Path
    sha256: str
    """Of the file's bytes."""
    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    shapes: Mapping[str, tuple[int, ...]]
    """(out, in) of each tensor, by GGUF's name."""
    known_as: frozenset[str]
    """Every hash that stands for this very model: of the file, and of the folder it was converted from where that is known."""


def read_base(path: Path) -> GgufBase:
    """Read what a GGUF file says of its model, not its weights. Raises ServingError when it is none that can be served with adapters."""
    try:
        reader = gguf.GGUFReader(path)
        architecture = str(_get(reader, "general.architecture"))
        n_layers, n_heads, n_kv_heads = (
            int(_get(reader, f"{architecture}.{name}")) for name in ("block_count", "attention.head_count", "attention.head_count_kv")
        )
        shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
        source = reader.get_field(SOURCE_KEY)
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ServingError(f"base model {path}: not a GGUF file of a language model, or cut off ({error})") from error
    sha256 = file_sha256(path)
    known_as = {sha256} | ({str(source.contents())} if source else set())
    return GgufBase(path, sha256, architecture, n_layers, n_heads, n_kv_heads, shapes, frozenset(known_as))


def check_adapter(adapter: Path, base: GgufBase, trained_on: str | None = None) -> list[str]:
    """Everything for which the adapter in `adapter` cannot be served on `base`, a phrase each; never raises for a bad file.

    `trained_on` is the hash of the base model that it was trained on; where it is None, what the adapter's own record says counts.
    """
    return _check(adapter, read_adapter(adapter), base, trained_on)


def write_adapter(adapter: Path, base: GgufBase, target: Path, *, version: str = "", trained_on: str | None = None) -> None:
    """Write the PEFT adapter in the folder `adapter` as the GGUF file `target`, for `base`; `version` is its name there.

    The same adapter gives the same bytes. Raises ServingError, naming all that `check_adapter` finds, and then there is no file.
    """
    read = read_adapter(adapter)
    if findings := _check(adapter, read, base, trained_on):
        raise ServingError(f"adapter {adapter} cannot be served on {base.path.name}: {'; '.join(findings)}")
    with new_file(target) as aside:
        writer = gguf.GGUFWriter(aside, base.architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_string("loraloop.version", version)
        writer.add_string("loraloop.base.sha256", base.sha256)
        for pair in read.pairs:
            name = _find_target(pair.module, base)
            writer.add_tensor(f"{name}.lora_a", pair.a)
            writer.add_tensor(f"{name}.lora_b", _place_rows(_fold(pair), str(name), base))
        write_out(writer)


def write_out(writer: Any) -> None:
    """Write what a GGUFWriter was given, and close it."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def permute_rows(weight: npt.NDArray[Any], n_heads: int) -> npt.NDArray[Any]:
    """The rows of each head in the order that GGUF has for Llama: pairs that are rotated together side by side. (rows, …) -> the same."""
    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _check(adapter: Path, read: PeftAdapter, base: GgufBase, trained_on: str | None) -> list[str]:
    findings = list(read.findings)
    trained_on = trained_on or _find_recorded_base(adapter)
    if trained_on is not None and trained_on not in base.known_as:
        known = ", ".join(sorted(known[:12] for known in base.known_as))
        findings.append(f"it was trained on base model {trained_on[:12]}, and this is {known}; serve it on the one it was trained on")
    if base.architecture not in PERMUTED:
        return [*findings, f"the base model's architecture is {base.architecture!r}; adapters are proven for {', '.join(PERMUTED)} only"]
    findings += [problem for pair in read.pairs for problem in _check_pair(pair, base)]
    return findings + list(_find_gaps(read, base))


def _fold(pair: LoraPair) -> FloatArray:
    """B times its scale. (out, rank); infinite where it does not fit into a float32."""
    with np.errstate(over="ignore"):
        return np.asarray(np.float32(pair.scale) * pair.b)


def _place_rows(b: FloatArray, name: str, base: GgufBase) -> FloatArray:
    if PERMUTED[base.architecture] and ".attn_q." in name:
        return permute_rows(b, base.n_heads)
    if PERMUTED[base.architecture] and ".attn_k." in name:
        return permute_rows(b, base.n_kv_heads)
    return b


def _find_target(module: str, base: GgufBase) -> str | None:
    """GGUF's name of the weight of `module`, or None when the base model has no such weight."""
    name = name_map(base.architecture, base.n_layers).get_name(f"{module}.weight", try_suffixes=(".weight",))
    return str(name) if name in base.shapes else None


@lru_cache
def name_map(architecture: str, n_layers: int) -> Any:
    """The table, of the package gguf, of the names that tensors have in models of `architecture` and in GGUF."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, n_layers)


def _check_pair(pair: LoraPair, base: GgufBase) -> Iterator[str]:
    name = _find_target(pair.module, base)
    if name is None and pair.module == "lm_head":
        yield "it adapts lm_head, which in this base model is the embeddings (tied), and has no weight of its own"
    elif name is None:
        yield f"it adapts {pair.module}, which this base model does not have"
    elif len(base.shapes[name]) != 2 or "token_embd" in name:
        yield f"it adapts {pair.module}, which is no linear layer"
    elif (found := (pair.b.shape[0], pair.a.shape[1])) != base.shapes[name]:
        yield f"{pair.module} is for a layer of shape {found}, and this base model's is {base.shapes[name]}; it is of another base model"
    elif not np.isfinite(_fold(pair)).all():
        yield f"{pair.module} times its scale {pair.scale:g} is not finite"


def _find_gaps(read: PeftAdapter, base: GgufBase) -> Iterator[str]:
    """Modules that the adapter names as its targets and has no matrices of: what was trained would be served in part."""
    targets = read.config.get("target_modules")
    if not isinstance(targets, list) or read.findings:  # or what is wrong with a module would be told twice
        return
    picked = any(read.config.get(name) for name in ("layers_to_transform", "exclude_modules"))
    for target in targets:
        layers = set()
        modules = [pair.module for pair in read.pairs if pair.module == target or pair.module.endswith(f".{target}")]
        for module in modules:
            if match := _LAYER.fullmatch(module):
                layers.add(int(match[2]))
        missing = sorted(set(range(base.n_layers)) - layers) if layers else []
        if not modules:
            yield f"it names {target} as a target and has no matrices of it"
        elif missing and not picked and not _LAYER.fullmatch(str(target)):
            yield f"{target} has no matrices in layers {', '.join(map(str, missing))}"


def _find_recorded_base(adapter: Path) -> str | None:
    try:
        return TrainingRecord.model_validate_json((adapter / RECORD_FILE).read_bytes()).base_sha256
    except (OSError, ValueError):
        return None


def _get(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"it has no {key}")
    return field.contents()
