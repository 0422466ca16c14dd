"""What bfloat16 must not cost beyond its rounding: sure predictions, widths that are no multiple of 32, and a walk that failed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_config
from train.tree_cases import SHAPES, VOCABULARY, make_row, random_rows
from train.tree_models import make_twins, twins

from loraloop.train.adapters import FusedLinear
from loraloop.train.arithmetic import TorchArithmetic, choose_arithmetic
from loraloop.train.buffers import Scratch
from loraloop.train.losses import Targets, head_loss
from loraloop.train.tree import build_tree, list_visits


def _sure_head(sureness: float) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """(hidden, head, targets): each of the rows gives its targets a logit that is `sureness` above the others."""
    rows = [make_row([1, 2, 3, 4, 5]), make_row([1, 2, 3, 4, 5]), make_row([1, 2, 3, 6])]
    tree = build_tree(rows)
    targets = Targets.of(tree, list_visits(tree, 100)[0].block, np.full(3, 0.1))
    hidden = torch.zeros(len(targets.rows), 32, dtype=torch.bfloat16)
    hidden[targets.of_row, targets.tokens] = sureness
    head = torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(0)).mul(0.05)
    head[:, :VOCABULARY] += torch.eye(VOCABULARY)
    return hidden, head.bfloat16(), targets


@pytest.mark.parametrize("arithmetic", ["torch", "native"])
@pytest.mark.parametrize("sureness", [4.0, 8.0, 12.0])
def test_gradient_of_a_sure_prediction_is_rounded_once(sureness: float, arithmetic: str) -> None:
    """With softmax and target rounded by themselves, their difference was off by more than it is."""
    chosen = TorchArithmetic() if arithmetic == "torch" else choose_arithmetic(torch.bfloat16)[0]
    hidden, head, targets = _sure_head(sureness)
    logits = torch.mm(hidden, head.t())
    p = torch.softmax(logits.double(), -1) * targets.row_pulls.unsqueeze(-1)
    p.index_put_((targets.of_row, targets.tokens), -targets.pulls, accumulate=True)
    expected = p @ head.double()
    found = head_loss(hidden, targets, head, torch.zeros(3, dtype=torch.float64), chosen)
    assert found is not None
    assert float((found.double() - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("hidden", [40, 50, 80])
def test_memory_that_was_never_written_is_not_read(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory full of NaN, as it may be: a buffer's rows and the one behind them are numbers all the same."""
    linear = FusedLinear(_adapted(hidden), key=0)
    linear.refresh()
    fresh = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: fresh(*size, **options).fill_(torch.nan))
    x = Scratch(40, torch.bfloat16).take("x", 33, linear.width)
    x[:, :hidden] = torch.randn(33, hidden, generator=torch.Generator().manual_seed(0))
    linear.fill(x, _NO_DROPOUT)
    assert x.isfinite().all()


class _NoDropout:
    seed = None


_NO_DROPOUT: Any = _NoDropout()


def _adapted(hidden: int) -> list[Any]:
    config = make_config("llama", vocab_size=VOCABULARY, hidden_size=hidden, head_dim=16, num_attention_heads=2, num_hidden_layers=1)
    attention = make_twins(config, torch.bfloat16).plain.get_base_model().model.layers[0].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def test_a_walk_that_failed_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    both = twins("llama")
    rows, plan_rows = SHAPES["branches of branches"], random_rows(2)
    expected = both.tree(rows)
    engine = both.engine()
    with monkeypatch.context() as patch:
        patch.setattr(both.architecture.linears[0], "finish", _fail)  # the first layer is the last to go backward
        with pytest.raises(MemoryError):
            engine.backward(plan_rows)
    assert both.tree(rows).apart(expected) == 0


def _fail(*_: object) -> None:
    raise MemoryError
