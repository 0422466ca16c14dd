"""What a step is made of: tokens, distinct prefixes, visible query-key pairs, and the floating-point operations that are useful.

Written apart from loraloop's own prefix tree, so that the benchmark does not trust what it measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.workload import BenchRow
from loraloop.episode import Frozen

FLOPS_RULE = (
    "per computed token: 4 x parameters of the adapted linear layers (forward and dX) + 6 x r x (in + out) of each (LoRA: forward, dX, "
    "dA, dB); per visible query-key pair and layer: (4 forward + 10 backward) x head size x query heads; per distinct supervised row: "
    "4 x hidden x vocabulary; each computed token once, norms, activations, padding, recomputation and masked positions not counted"
)


class Counts(Frozen):
    """What has to be computed for the rows of a step, by an engine that shares equal prefixes or by one that does not."""

    logical_tokens: int
    computed_tokens: int
    """Distinct prefixes where sharing, else the logical tokens; padding is never counted."""
    pairs: int
    """Query-key pairs that causal attention sees."""
    head_rows: int
    """Positions whose logits the loss needs, each once."""

    @property
    def token_ratio(self) -> float:
        """Logical tokens for each computed one."""
        return self.logical_tokens / self.computed_tokens


def count_shared(rows: Sequence[BenchRow]) -> Counts:
    """Every distinct prefix once: a token is shared when it and all before it are equal."""
    children: dict[tuple[int, int], int] = {}  # (node, token) -> node; the root is 0
    depths = [0]
    head_rows: set[int] = set()
    for row in rows:
        node = 0
        for token, weight in zip(row.ids, row.weights, strict=True):
            if weight > 0 and node:
                head_rows.add(node)
            parent, node = node, children.setdefault((node, token), len(depths))
            if node == len(depths):
                depths.append(depths[parent] + 1)
    return Counts(
        logical_tokens=sum(len(row.ids) for row in rows),
        computed_tokens=len(depths) - 1,
        pairs=sum(depths),
        head_rows=len(head_rows),
    )


def count_separate(rows: Sequence[BenchRow]) -> Counts:
    """Every row for itself."""
    lengths = [len(row.ids) for row in rows]
    return Counts(
        logical_tokens=sum(lengths),
        computed_tokens=sum(lengths),
        pairs=sum(length * (length + 1) // 2 for length in lengths),
        head_rows=sum(weight > 0 for row in rows for weight in row.weights[1:]),
    )


class ModelShape(Frozen):
    """The sizes that FLOPs follow from."""

    linear_params: int
    """Of the adapted linear layers."""
    lora_width: int
    """Sum of in + out over them."""
    rank: int
    attention_width: int
    """Head size x query heads, summed over the layers with attention."""
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """The shape of a model with a LoRA adapter."""
        linears = [module for module in model.modules() if hasattr(module, "lora_A") and "default" in module.lora_A]
        if not linears:
            raise ValueError("the model has no adapted linear layer")
        config = model.get_base_model().config
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        return cls(
            linear_params=sum(module.in_features * module.out_features for module in linears),
            lora_width=sum(module.in_features + module.out_features for module in linears),
            rank=linears[0].r["default"],
            attention_width=head_size * config.num_attention_heads * sum("attention" in kind for kind in kinds),
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
        )

    def useful_flops(self, counts: Counts) -> float:
        """Of one step, after FLOPS_RULE."""
        per_token = 4 * self.linear_params + 6 * self.rank * self.lora_width
        attention = 14 * self.attention_width * counts.pairs
        return float(per_token * counts.computed_tokens + attention + 4 * self.hidden * self.vocabulary * counts.head_rows)
