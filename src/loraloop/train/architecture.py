"""Reads a PEFT model into layers that the tree engine computes, or says why it cannot.

Only what is proven (tests/train/test_exactness.py) is read: Llama, Qwen2, Qwen3 and LFM2 with plain LoRA on their linear layers.
Everything else is refused with its reason, and trains on the dense loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraloop.train.adapters import FusedLinear
from loraloop.train.layers import Attention, HeadShape, Layer, Mixer, Mlp, Norm, ShortConvolution

ARCHITECTURES = ("llama", "qwen2", "qwen3", "lfm2")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the sequence."""
PLAIN_HEAD = {"final_logit_softcapping": (None,), "logits_scaling": (None, 1, 1.0), "logit_scale": (None, 1, 1.0)}
"""Settings of models that change the head's output, with the values under which they do not."""


@dataclass(frozen=True)
class Architecture:
    """A model as the tree engine computes it. It shares all weights with the model that it was read from."""

    embed: torch.Tensor  # (vocabulary, hidden)
    rotary: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: torch.Tensor  # (vocabulary, hidden)
    linears: tuple[FusedLinear, ...]
    conv_size: int
    """Rows that a short convolution sees, its own among them; 1 without one."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weights."""
        return self.embed.dtype

    @property
    def head_sizes(self) -> set[int]:
        """Values of an attention head."""
        return {layer.mixer.shape.size for layer in self.layers if isinstance(layer.mixer, Attention)}


def find_obstacle(model: Any) -> str | None:
    """Why the tree engine cannot compute this PEFT model, in words for the user; None when it can."""
    causal = model.get_base_model()
    return _find_model_obstacle(causal.config) or _find_head_obstacle(causal) or _find_adapter_obstacle(model)


def read_architecture(model: Any) -> Architecture:
    """The layers of a model in which `find_obstacle` finds none."""
    causal = model.get_base_model()
    decoder, config = causal.get_decoder(), causal.config
    names = _LFM2 if config.model_type == "lfm2" else _LLAMA
    linears: list[FusedLinear] = []

    def fuse(*modules: nn.Module) -> FusedLinear:
        linears.append(FusedLinear(modules, key=len(linears)))
        return linears[-1]

    layers = tuple(_read_layer(layer, names, config, fuse) for layer in decoder.layers)
    convolutions = [len(layer.mixer.kernel[0]) for layer in layers if isinstance(layer.mixer, ShortConvolution)]
    return Architecture(
        embed=causal.get_input_embeddings().weight.detach(),
        rotary=decoder.rotary_emb,
        layers=layers,
        final_norm=_norm(getattr(decoder, names["final_norm"])),
        head=causal.get_output_embeddings().weight.detach(),
        linears=tuple(linears),
        conv_size=max(convolutions, default=1),
    )


def has_plain_head(config: Any) -> bool:
    """Whether logits are the head's output and nothing more; models that scale or cap them go through their own forward."""
    return all(getattr(config, name, None) in values for name, values in PLAIN_HEAD.items())


_LLAMA = {
    "mixer_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp": "mlp",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "output": "o_proj",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
    "final_norm": "norm",
}
_LFM2 = {
    "mixer_norm": "operator_norm",
    "mlp_norm": "ffn_norm",
    "mlp": "feed_forward",
    "gate": "w1",
    "up": "w3",
    "down": "w2",
    "output": "out_proj",
    "q_norm": "q_layernorm",
    "k_norm": "k_layernorm",
    "final_norm": "embedding_norm",
}


def _read_layer(layer: Any, names: dict[str, str], config: Any, fuse: Callable[..., FusedLinear]) -> Layer:
    norm = _norm(getattr(layer, names["mixer_norm"]))
    mixer: Mixer
    if hasattr(layer, "self_attn"):
        attention = layer.self_attn
        size = int(attention.head_dim)
        shape = HeadShape(config.num_attention_heads, config.num_key_value_heads, size, float(attention.scaling))
        head_norms = None
        if hasattr(attention, names["q_norm"]):
            head_norms = (_norm(getattr(attention, names["q_norm"])), _norm(getattr(attention, names["k_norm"])))
        qkv = fuse(attention.q_proj, attention.k_proj, attention.v_proj)
        mixer = Attention(norm, qkv, fuse(getattr(attention, names["output"])), head_norms=head_norms, shape=shape)
    else:
        convolution = layer.conv.conv
        bias = convolution.bias.detach() if convolution.bias is not None else None
        kernel = convolution.weight.detach().squeeze(1)
        mixer = ShortConvolution(norm, fuse(layer.conv.in_proj), fuse(layer.conv.out_proj), kernel, bias)
    mlp = getattr(layer, names["mlp"])
    gate_up = fuse(getattr(mlp, names["gate"]), getattr(mlp, names["up"]))
    return Layer(mixer, Mlp(_norm(getattr(layer, names["mlp_norm"])), gate_up, fuse(getattr(mlp, names["down"]))))


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), float(module.variance_epsilon))


def _find_model_obstacle(config: Any) -> str | None:
    """What of a model's configuration has no proven tree path."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    findings = (
        (config.model_type not in ARCHITECTURES, f"{config.model_type} has no proven tree path; {', '.join(ARCHITECTURES)} have"),
        (rope not in ROPE_TYPES, f"its rotary embedding of type {rope} depends on the sequence"),
        ("sliding_attention" in (getattr(config, "layer_types", None) or ()), "it has layers with sliding-window attention"),
        (getattr(config, "hidden_act", "silu") != "silu", f"its activation is {getattr(config, 'hidden_act', '')}, not silu"),
        (bool(getattr(config, "attention_dropout", 0.0)), "it drops attention weights out"),
    )
    return next((words for found, words in findings if found), None)


def _find_head_obstacle(causal: Any) -> str | None:
    head = causal.get_output_embeddings()
    if head.weight.device.type not in ("cpu", "meta"):  # meta: a model without weights, to plan with
        return "it is not on the CPU"
    if type(head) is not nn.Linear or head.bias is not None:
        return "its head is not a plain linear layer"
    return None if has_plain_head(causal.config) else "it scales or caps its logits"


def _find_adapter_obstacle(model: Any) -> str | None:
    """Why an adapter is not plain LoRA on frozen linear layers."""
    known: set[int] = set()
    for name, module in _lora_layers(model):
        if words := _find_layer_obstacle(module):
            return f"{name} {words}"
        adapter = module.active_adapters[0]
        known |= {id(module.lora_A[adapter].weight), id(module.lora_B[adapter].weight)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            return f"{name} is trained and is no LoRA matrix of a linear layer"
    return None


def _find_layer_obstacle(module: Any) -> str | None:
    """Why one of PEFT's layers is not plain LoRA."""
    if type(module.base_layer) is not nn.Linear:
        return f"is a {type(module.base_layer).__name__}, not a plain linear layer"
    if len(module.active_adapters) != 1 or module.merged or module.disable_adapters or module.active_adapters[0] not in module.lora_A:
        return "has not exactly one active adapter"
    adapter = module.active_adapters[0]
    if module.lora_variant.get(adapter) is not None or module.use_dora.get(adapter):
        return "uses a variant of LoRA"
    if module.lora_bias.get(adapter) or module.fan_in_fan_out:
        return "trains a bias or stores its weights transposed"
    return None


def _lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer"))
