"""loraloop against TRL itself: equal rows and adapter give equal gradients before the first optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.steps import StepClock, StepPlan, adapter_parameters, reset_adapter
from bench.workload import BenchRow
from loraloop import base_model
from loraloop.chat.render import Row
from loraloop.train import loop
from loraloop.train.architecture import read_architecture
from loraloop.train.arithmetic import TorchArithmetic
from loraloop.train.dense import DenseEngine
from loraloop.train.engine import Plan, TreeEngine

pytest.importorskip("trl", reason="TRL is not installed; it comes with the extra `bench`")

pytestmark = pytest.mark.filterwarnings("ignore")  # those of TRL and what it loads
TOLERANCE = 1e-5
"""Relative, in float32, over all LoRA gradients."""


def make_rows() -> list[BenchRow]:
    """Five rows that share prefixes of several depths, with trained tokens on shared and own parts."""
    import random

    draw = random.Random(0)
    system, task = draw.choices(range(256), k=24), draw.choices(range(256), k=17)
    endings = [[*system, *task, *draw.choices(range(256), k=length)] for length in (9, 31, 4)]
    rows = [*endings, [*system, *draw.choices(range(256), k=12)], [*system, *task]]
    return [BenchRow(ids=tuple(ids), weights=tuple(float(index > 20 and index % 5 < 3) for index in range(len(ids)))) for ids in rows]


def dense(model: Any, rows: Sequence[Row]) -> float:
    return DenseEngine(model, batch_size=2).backward(rows)


def tree(model: Any, rows: Sequence[Row]) -> float:
    return TreeEngine(read_architecture(model), Plan(block_rows=40), TorchArithmetic()).backward(rows)


@pytest.fixture
def load(tiny_model: Callable[[str], Path]) -> Callable[[], Any]:
    """A tiny Llama in float32 with an adapter whose A and B both have gradients."""

    def make() -> Any:
        import torch

        base = base_model.resolve_base(str(tiny_model("llama")))
        model = loop.new_adapter(base_model.load_model(base, "float32"), 4, 8.0, 0.0, 0)
        torch.manual_seed(1)
        for name, parameter in adapter_parameters(model):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model.train()

    return make


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("engine", [dense, tree])
def test_gradients_equal_those_of_trl_before_its_first_step(
    load: Callable[[], Any], tiny_model: Callable[[str], Path], engine: Callable[[Any, Sequence[Row]], float], batch_size: int
) -> None:
    from bench.engine_trl import open_trainer

    rows = make_rows()
    ours, theirs = load(), load()
    initial = {name: parameter.detach().clone() for name, parameter in adapter_parameters(ours)}
    reset_adapter(adapter_parameters(theirs), initial)
    tokenizer = base_model.load_tokenizer(base_model.resolve_base(str(tiny_model("llama"))))
    plan = StepPlan(steps=1, min_seconds=0, batch_size=batch_size)
    trainer = open_trainer("trl-tuned", theirs, tokenizer, rows, plan)
    trainer.args.num_train_epochs = 1
    trainer.clock = StepClock(plan, adapter_parameters(theirs))
    trainer.train()

    loss = engine(ours, [row.to_row() for row in rows])

    expected = trainer.clock.first_gradient
    assert loss == pytest.approx(trainer.clock.first_loss, rel=TOLERANCE)
    gradients = {name: parameter.grad for name, parameter in adapter_parameters(ours)}
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 2 * 2 * 7  # A and B of seven linear layers in two blocks
    apart = sum(float(((gradients[name] - value) ** 2).sum()) for name, value in expected.items())
    size = sum(float((value**2).sum()) for value in expected.values())
    assert size > 0
    assert (apart / size) ** 0.5 <= TOLERANCE
    for name, value in expected.items():
        assert float(value.norm()) > 0, name
        assert float((gradients[name] - value).norm() / value.norm()) <= 10 * TOLERANCE, name
