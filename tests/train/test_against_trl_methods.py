"""dpo and kto against TRL's own trainers: equal rows, adapter and reference give equal loss and gradients before the first step.

TRL's masks are right where a completion is the agent's alone, so there its collators are used as they are. Where tool results stand
between agent turns its trainer is given our mask, as in the benchmark.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.engine_loraloop import measure_reference
from bench.engine_trl import Clocked, list_arguments, listen, open_pairs_trainer
from bench.steps import StepClock, StepPlan, adapter_parameters, reset_adapter
from bench.workload import BenchRow
from loraloop import base_model
from loraloop.chat.rows import Unit
from loraloop.train import loop
from loraloop.train.architecture import read_architecture
from loraloop.train.arguments import PreferenceLoss
from loraloop.train.arithmetic import TorchArithmetic
from loraloop.train.dense import DenseEngine
from loraloop.train.engine import Plan, TreeEngine
from loraloop.train.objectives import Desirability, Engine, Objective, Preference, put_elsewhere
from loraloop.train.reference import open_reference

pytest.importorskip("trl", reason="TRL is not installed; it comes with the extra `bench`")

pytestmark = pytest.mark.filterwarnings("ignore")  # those of TRL and what it loads
TOLERANCE = 1e-5
"""Relative, in float32: of the loss, and of the gradient over all LoRA matrices."""
BETA = 0.3
MAX_LENGTH = 1000


def make_rows(n_pairs: int, *, own_tokens_only: bool) -> list[BenchRow]:
    """Two completions of each prompt, some of which begin alike; with tokens of others inside, or the agent's alone."""
    draw = random.Random(0)
    system = draw.choices(range(256), k=24)
    rows = []
    for number in range(n_pairs):
        prompt = [*system, *draw.choices(range(256), k=5 + 7 * number)]
        for side in range(2):
            completion = draw.choices(range(256), k=9 + 5 * number + 11 * side)
            own = [float(not own_tokens_only or index % 7 < 4) for index in range(len(completion))]
            rows.append(BenchRow(ids=(*prompt, *completion), weights=(*[0.0] * len(prompt), *own)))
    return rows


def kto_units() -> list[Unit]:
    """The agent's own completions, two of three desirable."""
    rows = [row.to_row() for row in make_rows(4, own_tokens_only=False)]
    random.Random(0).shuffle(rows)
    return [Unit((row,), int(number % 3 > 0), sample_number=number) for number, row in enumerate(rows, 1)]


def dense(model: Any) -> Engine:
    return DenseEngine(model, batch_size=2)


def tree(model: Any) -> Engine:
    return TreeEngine(read_architecture(model), Plan(block_rows=40), TorchArithmetic())


@pytest.fixture
def load(tiny_model: Callable[[str], Path]) -> Callable[[], Any]:
    """A tiny Llama in float32 with a fresh adapter: as it is, the base model."""

    def make() -> Any:
        base = base_model.resolve_base(str(tiny_model("llama")))
        return loop.new_adapter(base_model.load_model(base, "float32"), 4, 8.0, 0.0, 0).train()

    return make


@pytest.fixture
def tokenizer(tiny_model: Callable[[str], Path]) -> Any:
    return base_model.load_tokenizer(base_model.resolve_base(str(tiny_model("llama"))))


@pytest.fixture(params=[1, 6], ids=["adapter 1", "adapter 6"])
def adapter(load: Callable[[], Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    """Weights whose B is not zero, so that all gradients are there and the reference is not the model itself.

    With the first, answers to other questions have become likelier than the base model has them, with the second less likely.
    """
    import torch

    values = {name: parameter.detach().clone() for name, parameter in adapter_parameters(load())}
    torch.manual_seed(request.param)
    for name, value in values.items():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    return values


def take_first_step(trainer: Any, adapter: dict[str, Any]) -> StepClock:
    """Loss and gradient of TRL's first step from `adapter`; the trainer's reference is what its model was before."""
    parameters = [(name, parameter) for name, parameter in adapter_parameters(trainer.model) if name in adapter]
    assert len(parameters) == len(adapter)
    reset_adapter(parameters, adapter)
    trainer.args.num_train_epochs = 1
    trainer.clock = StepClock(StepPlan(steps=1, min_seconds=0), parameters)
    trainer.train()
    clock: StepClock = trainer.clock
    return clock


def assert_equal_step(model: Any, objective: Objective, engine: Engine, units: Sequence[Unit], expected: StepClock) -> None:
    """The objective's loss and gradient are those of the clock."""
    loss = objective.backward(engine, units, 0).loss
    assert loss == pytest.approx(expected.first_loss, rel=TOLERANCE)
    gradients = {name: parameter.grad for name, parameter in adapter_parameters(model)}
    assert gradients.keys() == expected.first_gradient.keys()
    assert len(gradients) == 2 * 2 * 7  # A and B of seven linear layers in two blocks
    apart = sum(float(((gradients[name] - value) ** 2).sum()) for name, value in expected.first_gradient.items())
    size = sum(float((value**2).sum()) for value in expected.first_gradient.values())
    assert size > 0
    assert (apart / size) ** 0.5 <= TOLERANCE
    for name, value in expected.first_gradient.items():
        assert float(value.norm()) > 0, name


@pytest.mark.parametrize("engine", [dense, tree])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("mask", ["of TRL", "ours"])
def test_dpo_equals_that_of_trl_before_its_first_step(
    load: Callable[[], Any], tokenizer: Any, adapter: dict[str, Any], *, engine: Callable[[Any], Engine], loss: PreferenceLoss, mask: str
) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = make_rows(4, own_tokens_only=mask == "ours")
    plan = StepPlan(batch_size=2)  # two micro-batches
    trainer = open_pairs_trainer("trl-tuned", load(), tokenizer, rows, plan, loss=loss, beta=BETA)
    if mask == "of TRL":
        trainer.data_collator = DataCollatorForPreference(pad_token_id=0)
    expected = take_first_step(trainer, adapter)
    ours = load()
    units = [Unit((better.to_row(), worse.to_row()), 1) for better, worse in zip(rows[::2], rows[1::2], strict=True)]
    computes = engine(ours)
    reset_adapter(adapter_parameters(ours), adapter)

    assert_equal_step(ours, Preference(measure_reference(computes, units), BETA, loss), computes, units, expected)


@pytest.mark.parametrize("engine", [dense, tree])
def test_kto_equals_that_of_trl_before_its_first_step(
    load: Callable[[], Any], tokenizer: Any, adapter: dict[str, Any], *, engine: Callable[[Any], Engine], tmp_path: Path
) -> None:
    units = kto_units()
    rows = [unit.rows[0] for unit in units]
    elsewhere = put_elsewhere(units, MAX_LENGTH)
    assert len(elsewhere) == len(units)
    weights = {"desirable_weight": 1.4, "undesirable_weight": 0.6}
    trainer = open_kto_trainer(load(), tokenizer, units, [elsewhere[unit.sample_number].ids for unit in units], weights)
    expected = take_first_step(trainer, adapter)
    ours = load()
    computes = engine(ours)
    reset_adapter(adapter_parameters(ours), adapter)
    reference = open_reference(computes, [*rows, *elsewhere.values()], tmp_path, "test", lambda _: None, chunk_tokens=200)
    assert_equal_step(ours, Desirability(reference, elsewhere, BETA, **weights), computes, units, expected)


def open_kto_trainer(model: Any, tokenizer: Any, units: Sequence[Unit], others: Sequence[list[int]], weights: dict[str, float]) -> Any:
    """TRL's KTOTrainer with all of `units` as one batch, and `others` as what it estimates its divergence from."""
    import datasets
    import trl

    class Trainer(Clocked, trl.KTOTrainer):  # type: ignore[misc]  # TRL has no types
        """TRL's own, whose data is tokenised already and has its other completions."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    starts = [next(index for index, weight in enumerate(unit.rows[0].weights) if weight) for unit in units]
    columns = {
        "prompt_ids": [unit.rows[0].ids[:start] for unit, start in zip(units, starts, strict=True)],
        "completion_ids": [unit.rows[0].ids[start:] for unit, start in zip(units, starts, strict=True)],
        "KL_completion_ids": [ids[start:] for ids, start in zip(others, starts, strict=True)],
        "label": [bool(unit.n_better) for unit in units],
    }
    arguments = list_arguments("trl-tuned", StepPlan(batch_size=len(units)), len(units))
    args = trl.KTOConfig(**arguments, **weights, beta=BETA, remove_unused_columns=False)
    dataset = datasets.Dataset.from_dict(columns)
    return listen(Trainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer))


def test_of_both_adapters_one_has_gained_on_other_answers_and_one_has_lost(
    load: Callable[[], Any], adapter: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """So that kto is compared where its estimate counts, and where it would be below 0."""
    units = kto_units()
    others = list(put_elsewhere(units, MAX_LENGTH).values())
    model = load()
    engine = dense(model)
    base = engine.measure(others)
    reset_adapter(adapter_parameters(model), adapter)
    gained = float((base - engine.measure(others)).mean())
    assert (gained > 0.1) == ("adapter 1" in request.node.name)
    assert abs(gained) > 0.1
