"""Tiny models for the tree engine, and their loss and gradient sample by sample, from transformers, PEFT and autograd alone."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tiny import make_config
from train.tree_cases import VOCABULARY

from loraloop.chat.render import Row
from loraloop.train.architecture import Architecture, find_obstacle, read_architecture
from loraloop.train.arguments import TrainArguments, parse_arguments
from loraloop.train.arithmetic import TorchArithmetic
from loraloop.train.buffers import Keep
from loraloop.train.engine import Plan, TreeEngine

CONVOLUTIONS = ["conv", "conv", "full_attention", "conv"]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _config("llama"),
    "llama, biases, yarn": lambda: _config("llama", attention_bias=True, mlp_bias=True, rope_parameters=YARN),
    "qwen2": lambda: _config("qwen2"),
    "qwen3": lambda: _config("qwen3"),
    "lfm2": lambda: _config("lfm2", num_hidden_layers=4, layer_types=CONVOLUTIONS, conv_L_cache=3),
    "lfm2, wider, biases": lambda: _config("lfm2", num_hidden_layers=4, layer_types=CONVOLUTIONS, conv_L_cache=4, conv_bias=True),
}
NAMES = tuple(CONFIGS)


def _config(architecture: str, **changes: Any) -> Any:
    return make_config(architecture, **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, **changes})


@dataclass(frozen=True)
class Gradient:
    """What an engine gives for a step."""

    loss: float
    vector: torch.Tensor
    """Every LoRA gradient, one behind the other, in float64."""

    def apart(self, other: Gradient) -> float:
        """The relative difference from `other`, of gradients or loss, whichever is larger."""
        gradients = float((self.vector - other.vector).norm() / other.vector.norm())
        return max(gradients, abs(self.loss - other.loss) / abs(other.loss))


@dataclass(frozen=True)
class Twins:
    """A PEFT model that nobody has touched, and another with the same weights that the tree engine reads."""

    plain: Any
    fused: Any
    architecture: Architecture

    def truth(self, rows: Sequence[Row]) -> Gradient:
        """Loss and gradient of the samples one by one, by the model's own forward and autograd."""
        return plain_gradient(self.plain, rows)

    def engine(self, plan: Plan | None = None, arithmetic: TorchArithmetic | None = None, seed: int = 0) -> TreeEngine:
        """The tree engine for the second model."""
        return TreeEngine(self.architecture, plan or Plan(), arithmetic or TorchArithmetic(), seed)

    def tree(self, rows: Sequence[Row], plan: Plan | None = None, **how: Any) -> Gradient:
        """Loss and gradient by the tree engine."""
        engine = self.engine(plan, **how)
        return take_gradient(self.fused, lambda: engine.backward(rows))


PLANS = [Plan(1, Keep.INPUTS), *(Plan(4, keep) for keep in Keep), *(Plan(1000, keep) for keep in Keep)]
"""Row by row, in small blocks, everything in one; with every level of what is kept."""


def make_twins(config: Any, dtype: torch.dtype = torch.float64, seed: int = 0, **lora: Any) -> Twins:
    """A random model with a LoRA adapter that is not zero; no bias, norm or matrix has a value that hides its part."""
    import peft
    import transformers

    torch.manual_seed(seed)
    base = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.15 + (parameter.dim() == 1))
    settings = {"r": 4, "lora_alpha": 6.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    plain = peft.get_peft_model(base, peft.LoraConfig(**settings)).train()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    fused = copy.deepcopy(plain)
    assert find_obstacle(fused) is None
    if dtype == torch.float64:
        compute_norms_in_float64(plain)
    return Twins(plain, fused, read_architecture(fused))


@functools.cache
def twins(name: str, dtype: torch.dtype = torch.float64) -> Twins:
    """The model of a name in CONFIGS, made once."""
    return make_twins(CONFIGS[name](), dtype)


def make_arguments(**changes: Any) -> TrainArguments:
    """What the command line gives when nothing but `changes` is said."""
    told = ["--data", __file__, "--output", "unused", "--model", "unused"]
    return replace(parse_arguments(told), **changes)


def compute_norms_in_float64(model: Any) -> None:
    """Transformers' norms go through float32, whatever the model's type: as a reference they must not."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = types.MethodType(forward, module)


def take_gradient(model: Any, work: Callable[[], float]) -> Gradient:
    """The loss that `work` gives and the gradients that it leaves."""
    model.zero_grad(set_to_none=True)
    loss = work()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return Gradient(loss, torch.cat([gradient.flatten() for gradient in gradients]).double())


def plain_gradient(model: Any, rows: Sequence[Row]) -> Gradient:
    """sum(w * nll) / sum(w) over separate samples, and its gradient."""
    total = sum(sum(row.weights[1:]) for row in rows)

    def work() -> float:
        loss = 0.0
        for row in rows:
            logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
            log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
            nll = -log_p[torch.arange(len(row.ids) - 1), row.ids[1:]]
            part = (nll * torch.tensor(row.weights[1:], dtype=nll.dtype)).sum() / total
            part.backward()
            loss += float(part.detach())
        return loss

    return take_gradient(model, work)
