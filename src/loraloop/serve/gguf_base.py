"""A base model for llama.cpp: a folder with safetensors and a byte-level BPE tokenizer becomes one GGUF file.

For Llama, Qwen2 and Qwen3, whose conversion is proven by test; anything else is refused with the way out, never converted nearly right.
Weights keep their numbers exactly unless another type is asked for. Needs neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
from gguf.utility import SafetensorsLocal

from loraloop.base_model import resolve_base
from loraloop.errors import ServingError
from loraloop.files import new_file
from loraloop.serve.gguf import PERMUTED, SOURCE_KEY, name_map, permute_rows
from loraloop.serve.gguf_vocabulary import add_vocabulary
from loraloop.serve.peft_adapter import to_float32

GgufDtype = Literal["auto", "float32", "float16", "bfloat16"]

_TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
}
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WAY_OUT = "convert it with llama.cpp's convert_hf_to_gguf.py and give the GGUF file"


def write_base(folder: Path, target: Path, dtype: GgufDtype = "auto") -> None:
    """Write the model in `folder` as the GGUF file `target`; with `auto` each matrix keeps the type that it is stored in.

    The same folder gives the same bytes. Raises ServingError for a model that cannot be converted exactly, and BaseModelError for a folder
    that holds none; then there is no file.
    """
    sha256 = resolve_base(str(folder)).sha256
    with _as_serving_error(folder):
        config = json.loads((folder / "config.json").read_bytes())
        _check_config(config)
        tensors = _list_tensors(folder, config)
        with new_file(target) as aside:
            writer = gguf.GGUFWriter(aside, config["model_type"])
            writer.add_type("model")
            writer.add_string(SOURCE_KEY, sha256)
            _add_config(writer, config)
            add_vocabulary(writer, folder, int(config["vocab_size"]))
            _write_tensors(writer, tensors, config, dtype)


@contextmanager
def _as_serving_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ServingError(f"base model {folder}: cannot be converted to GGUF ({reason}); {_WAY_OUT}") from error


def _check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError for what is not proven to be the same in llama.cpp."""
    architecture, kinds = config.get("model_type"), config.get("architectures") or []
    if architecture not in PERMUTED or not all(str(kind).endswith("ForCausalLM") for kind in kinds):
        raise ValueError(f"its architecture is {architecture!r} {kinds}; converted here are causal models of {', '.join(PERMUTED)}")
    if config.get("use_sliding_window"):
        raise ValueError("it looks through a sliding window (use_sliding_window)")
    if config.get("quantization_config"):
        raise ValueError("its weights are quantised (quantization_config)")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"its activation is {config['hidden_act']!r}, expected 'silu'")
    kind = _rope(config).get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"its rotary embedding is scaled in the way {kind!r}, expected 'default'")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, which lie in one of three places by the age of the file."""
    scaling = config.get("rope_scaling") or {}
    given = {"rope_type": scaling.get("type", "default"), **scaling, **(config.get("rope_parameters") or {})}
    return {"rope_theta": config.get("rope_theta", 10000.0), **given}


def _head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_config(writer: Any, config: Mapping[str, Any]) -> None:
    heads, head = int(config["num_attention_heads"]), _head_size(config)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(_rope(config)["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))


def _list_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The stored tensors by GGUF's names, in their order. Raises ValueError for unknown, missing and doubled ones."""
    names = name_map(config["model_type"], int(config["num_hidden_layers"]))
    is_tied = bool(config.get("tie_word_embeddings"))
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in SafetensorsLocal(file).tensors.items():
            if name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and is_tied):
                continue
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise ValueError(f"its tensor {name} has no place in a GGUF file")
            if found in tensors:
                raise ValueError(f"its tensor {name} is there twice")
            tensors[found] = tensor
    needed = ["token_embd.weight", "output_norm.weight", *([] if is_tied else ["output.weight"])]
    parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    needed += [f"blk.{layer}.{part}.weight" for layer in range(int(config["num_hidden_layers"])) for part in parts]
    if missing := [name for name in needed if name not in tensors]:
        raise ValueError(f"{len(missing)} of its tensors are missing: {', '.join(missing[:3])}")
    return tensors


def _write_tensors(writer: Any, tensors: Mapping[str, Any], config: Mapping[str, Any], dtype: GgufDtype) -> None:
    """One tensor at a time, so that a model larger than the memory can be converted."""
    types = {name: _choose_type(name, tensor, dtype) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        n_bytes = int(np.prod(tensor.shape)) * (4 if types[name] is _TYPES["float32"] else 2)
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), n_bytes, raw_dtype=types[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            writer.write_tensor_data(_convert(name, tensor, config, types[name]))
    finally:
        writer.close()


def _choose_type(name: str, tensor: Any, dtype: GgufDtype) -> Any:
    if tensor.dtype not in _STORED:
        raise ValueError(f"its tensor {name} is of {tensor.dtype}, expected {', '.join(_STORED)}")
    if len(tensor.shape) == 1:  # norms and biases, which llama.cpp wants so
        return _TYPES["float32"]
    return _TYPES[_STORED[tensor.dtype] if dtype == "auto" else dtype]


def _convert(name: str, tensor: Any, config: Mapping[str, Any], kind: Any) -> npt.NDArray[Any]:
    values = to_float32(tensor.mmap_bytes(), tensor.dtype)
    if values is None or not np.isfinite(values).all():
        raise ValueError(f"its tensor {name} has values that are not finite")
    values = values.reshape(tensor.shape)
    if PERMUTED[config["model_type"]] and (".attn_q." in name or ".attn_k." in name):
        heads = config["num_attention_heads"] if ".attn_q." in name else config.get("num_key_value_heads") or config["num_attention_heads"]
        values = permute_rows(values, int(heads)).astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        converted: npt.NDArray[Any] = gguf.quants.quantize(values, kind)
    if kind is _TYPES["float16"] and not np.isfinite(converted).all():
        raise ValueError(f"its tensor {name} has values beyond float16; take float32 or bfloat16")
    return converted
