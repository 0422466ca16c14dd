"""The training loop in float64 on tiny models: its loss and gradient against a separate, plain computation, row by row."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train.tree_cases import units_of

from loraloop.chat.render import Row
from loraloop.errors import LoraTrainerError
from loraloop.train import dense, loop
from loraloop.train.architecture import has_plain_head
from loraloop.train.dense import DenseEngine
from loraloop.train.loop import LoopSettings
from loraloop.train.objectives import Likelihood
from loraloop.training_record import TrainingEvent

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

ARCHITECTURES = ("llama", "qwen3", "lfm2")
Loader = Callable[..., Any]


def make_rows(lengths: tuple[int, ...] = (9, 40, 17, 23, 31, 12), seed: int = 0) -> list[Row]:
    """Random tokens; each row starts with context, then tokens of weight 1 or 0.5 and more context."""
    draw = random.Random(seed)
    rows = []
    for number, length in enumerate(lengths):
        weights = [0.0] * 4 + [draw.choice([0.0, 0.5, 1.0]) for _ in range(length - 5)] + [1.0]
        rows.append(Row(ids=[draw.randrange(256) for _ in range(length)], weights=weights, text="", episode_id=f"episode {number}"))
    return rows


def make_settings(**changes: Any) -> LoopSettings:
    fields = {"epochs": 1, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": 0.01, "warmup_ratio": 0.1}
    return LoopSettings(**{**fields, "max_grad_norm": 1.0, "max_steps": None, "seed": 0, **changes})


@pytest.fixture
def load(tiny_model: Callable[[str], Path]) -> Loader:
    """A tiny model in float64 with an adapter that is not zero, in training mode, so that every part of it has a gradient."""

    def make(architecture: str = "llama", dropout: float = 0.0, seed: int = 0, *, fresh: bool = False) -> Any:
        import torch
        import transformers

        base = transformers.AutoModelForCausalLM.from_pretrained(str(tiny_model(architecture)), dtype=torch.float64)
        model = loop.new_adapter(base, 4, 8.0, dropout, seed)
        if not fresh:
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        return model.train()

    return make


def gradient(model: Any, work: Callable[[], object]) -> Any:
    """All adapter gradients that `work` leaves, as one vector."""
    import torch

    model.zero_grad(set_to_none=True)
    work()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad])


def run(model: Any, rows: list[Row], settings: LoopSettings, emit: Callable[[TrainingEvent], None]) -> list[tuple[int, float]]:
    engine = DenseEngine(model, settings.batch_size)
    return loop.train(loop.Run(model, engine, Likelihood()), units_of(rows), settings, emit).losses


def mean_loss(engine: DenseEngine, rows: list[Row]) -> float:
    return Likelihood().measure(engine, units_of(rows)).loss


def relative(found: Any, expected: Any) -> float:
    return float((found - expected).norm() / expected.norm())


def plain_loss(model: Any, row: Row) -> Any:
    """sum of w * -log p over one row, from the model's own logits, token after token."""
    import torch

    log_p = torch.log_softmax(model(input_ids=torch.tensor([row.ids])).logits[0], dim=-1)
    return sum(-log_p[at - 1, token] * weight for at, (token, weight) in enumerate(zip(row.ids, row.weights, strict=True)) if at and weight)


def plain_gradient(model: Any, rows: list[Row]) -> Any:
    def work() -> None:
        total = sum(sum(row.weights[1:]) for row in rows)
        for row in rows:
            (plain_loss(model, row) / total).backward()

    return gradient(model, work)


# --- the gradient of a window ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_does_not_depend_on_how_the_window_is_cut_and_is_that_of_separate_rows(load: Loader, architecture: str) -> None:
    model, rows = load(architecture), make_rows()
    truth = plain_gradient(model, rows)
    assert float(truth.norm()) > 1e-3
    for batch_size in (1, 2, 3, 4, 6, 100):
        assert relative(gradient(model, lambda size=batch_size: DenseEngine(model, size).backward(rows)), truth) <= 1e-10
    shuffled = random.Random(0).sample(rows, len(rows))
    assert relative(gradient(model, lambda: DenseEngine(model, 2).backward(shuffled)), truth) <= 1e-10


def test_gradient_would_tell_a_mean_of_means_from_the_mean(load: Loader) -> None:
    """The check above can fail: normalising each micro-batch by itself, as many loops do, is another gradient."""
    model, rows = load(), make_rows()

    def mean_of_means() -> None:
        for row in rows:
            (plain_loss(model, row) / sum(row.weights[1:]) / len(rows)).backward()

    assert relative(gradient(model, mean_of_means), plain_gradient(model, rows)) > 1e-2


def test_gradient_does_not_depend_on_the_token_limit_of_a_micro_batch(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = load(), make_rows()
    truth = plain_gradient(model, rows)
    monkeypatch.setattr(dense, "MICRO_BATCH_TOKENS", 50)
    assert relative(gradient(model, lambda: DenseEngine(model, 6).backward(rows)), truth) <= 1e-10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_is_the_same_with_the_head_in_chunks(load: Loader, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = load(architecture), make_rows()
    truth = gradient(model, lambda: DenseEngine(model, 6).backward(rows))
    loss = DenseEngine(model, 6).backward(rows)
    for chunk in (1, 7, 16):
        monkeypatch.setattr(dense, "HEAD_CHUNK", chunk)
        assert relative(gradient(model, lambda: DenseEngine(model, 6).backward(rows)), truth) <= 1e-12
        assert DenseEngine(model, 6).backward(rows) == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_is_the_same_with_activations_recomputed(load: Loader, architecture: str) -> None:
    model, rows = load(architecture), make_rows()
    truth = gradient(model, lambda: DenseEngine(model, 3).backward(rows))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert relative(gradient(model, lambda: DenseEngine(model, 3).backward(rows)), truth) <= 1e-12


def test_models_that_change_the_heads_output_go_through_their_own_forward(load: Loader) -> None:
    model, rows = load(), make_rows()
    truth = gradient(model, lambda: DenseEngine(model, 3).backward(rows))
    assert has_plain_head(model.get_base_model().config)
    model.get_base_model().config.final_logit_softcapping = 30.0  # Llama's forward does not know it, so nothing else changes
    assert not has_plain_head(model.get_base_model().config)
    assert relative(gradient(model, lambda: DenseEngine(model, 3).backward(rows)), truth) <= 1e-12


# --- the loss ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_on_the_right_changes_no_row(load: Loader, architecture: str) -> None:
    import torch

    model, (short, long) = load(architecture).eval(), make_rows((9, 40))
    silent = Row(ids=long.ids, weights=[0.0] * len(long.ids), text="")
    with torch.no_grad():
        alone = float(dense._losses(model, [short])[0])
        padded = float(dense._losses(model, [short, silent])[0])
        assert padded == pytest.approx(alone, rel=1e-12)
        assert alone == pytest.approx(float(plain_loss(model, short)), rel=1e-12)


def test_loss_is_the_weighted_mean_over_supervised_tokens(load: Loader) -> None:
    import torch

    model, rows = load().eval(), make_rows()
    with torch.no_grad():
        summed = sum(float(plain_loss(model, row)) for row in rows)
    mean = summed / sum(sum(row.weights[1:]) for row in rows)
    for batch_size in (1, 4):
        assert mean_loss(DenseEngine(model, batch_size), rows) == pytest.approx(mean, rel=1e-12)
    model.train()
    assert DenseEngine(model, 2).backward(rows) == pytest.approx(mean, rel=1e-12)


def test_weights_count_against_one_another_only(load: Loader) -> None:
    model, rows = load(), make_rows((20, 20))
    halves = [Row(ids=row.ids, weights=[weight * 0.3 for weight in row.weights], text="") for row in rows]
    truth = gradient(model, lambda: DenseEngine(model, 2).backward(rows))
    assert relative(gradient(model, lambda: DenseEngine(model, 2).backward(halves)), truth) <= 1e-10
    # a power of two, as the models' own norms compute in float32, where a factor of 3 is rounded
    heavy = [Row(ids=rows[0].ids, weights=[weight * 4 for weight in rows[0].weights], text=""), rows[1]]
    four_times = plain_gradient(model, [*[rows[0]] * 4, rows[1]])
    assert relative(gradient(model, lambda: DenseEngine(model, 2).backward(heavy)), four_times) <= 1e-10
    assert relative(truth, four_times) > 0.1


def test_tokens_without_weight_give_no_gradient_as_targets(load: Loader) -> None:
    model, (row,) = load(), make_rows((20,))
    last = Row(ids=row.ids, weights=[0.0] * 19 + [1.0], text="")
    changed = Row(ids=[*row.ids[:19], 7], weights=[0.0] * 18 + [1.0, 0.0], text="")
    kept = Row(ids=row.ids, weights=[0.0] * 18 + [1.0, 0.0], text="")
    assert (
        relative(
            gradient(model, lambda: DenseEngine(model, 1).backward([changed])),
            gradient(model, lambda: DenseEngine(model, 1).backward([kept])),
        )
        <= 1e-12
    )
    assert (
        relative(
            gradient(model, lambda: DenseEngine(model, 1).backward([last])), gradient(model, lambda: DenseEngine(model, 1).backward([kept]))
        )
        > 0.1
    )


def test_measuring_uses_no_dropout_and_leaves_the_mode_as_it_was(load: Loader) -> None:
    rows = make_rows()
    model = load(dropout=0.5)
    assert (
        mean_loss(DenseEngine(model, 2), rows)
        == mean_loss(DenseEngine(model, 2), rows)
        == pytest.approx(mean_loss(DenseEngine(load(), 2), rows), rel=1e-12)
    )
    assert model.training
    model.eval()
    mean_loss(DenseEngine(model, 2), rows)
    assert not model.training


# --- the adapter ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapter_is_on_every_linear_layer_but_the_head_and_is_all_that_trains(load: Loader, architecture: str) -> None:
    import torch

    model = load(architecture, fresh=True)
    linear = {
        name for name, module in model.get_base_model().named_modules() if isinstance(module, torch.nn.Linear) and "lora_" not in name
    }
    adapted = {name.rsplit(".lora_A", 1)[0] for name, _ in model.get_base_model().named_modules() if name.endswith("lora_A.default")}
    assert {name.removesuffix(".base_layer") for name in linear} - {"lm_head"} == adapted
    assert adapted
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_first_weights_of_the_adapter_follow_from_the_seed(load: Loader) -> None:
    def first(seed: int) -> list[Any]:
        return [parameter.detach().clone() for parameter in load(seed=seed, fresh=True).parameters() if parameter.requires_grad]

    assert all(bool((one == two).all()) for one, two in zip(first(5), first(5), strict=True))
    assert any(bool((one != two).any()) for one, two in zip(first(5), first(6), strict=True))


def test_a_fresh_adapter_changes_nothing(load: Loader) -> None:
    model, rows = load(fresh=True).eval(), make_rows()
    before = mean_loss(DenseEngine(model, 2), rows)
    with model.disable_adapter():
        assert mean_loss(DenseEngine(model, 2), rows) == before


# --- the loop ---------------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_of_what_is_trained_and_leaves_the_base_alone(load: Loader) -> None:
    model, rows = load(fresh=True), make_rows((20, 24))
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    heard: list[TrainingEvent] = []
    history = run(model, rows, make_settings(epochs=15), heard.append)
    assert [step for step, _ in history] == list(range(1, 16))
    assert history[-1][1] < history[0][1] - 0.3
    assert mean_loss(DenseEngine(model, 2), rows) < history[0][1] - 0.3
    assert all(bool((parameter == base[name]).all()) for name, parameter in model.named_parameters() if name in base)
    assert [(event.event, event.step, event.steps, event.loss) for event in heard] == [("step", step, 15, loss) for step, loss in history]
    assert [event.epoch for event in heard] == list(range(15))
    assert heard[-1].eta_s == 0
    assert all(event.tokens_per_s and event.memory_mb for event in heard)


def test_every_update_has_the_rate_of_its_step_a_clipped_gradient_and_no_weight_decay(load: Loader) -> None:
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    seen: list[tuple[float, float, float]] = []

    def look(optimizer: Any, *_: Any) -> None:
        (group,) = optimizer.param_groups
        norm = torch.cat([parameter.grad.flatten() for parameter in group["params"]]).norm()
        seen.append((group["lr"], float(norm), group["weight_decay"]))

    hook = register_optimizer_step_pre_hook(look)
    try:
        run(load(), make_rows(), make_settings(epochs=4, max_grad_norm=0.001, warmup_ratio=0.25), lambda _: None)
    finally:
        hook.remove()
    assert [rate for rate, _, _ in seen] == [pytest.approx(0.01 * loop.schedule(step, 12, 0.25)) for step in range(12)]
    assert [norm for _, norm, _ in seen] == [pytest.approx(0.001, rel=1e-2)] * 12
    assert {decay for _, _, decay in seen} == {0.0}


def test_training_with_dropout_follows_from_the_seed(load: Loader) -> None:
    import torch

    def history(seed: int, n_drawn: int) -> list[tuple[int, float]]:
        model = load(dropout=0.3)
        torch.rand(n_drawn)  # whoever drew before does not matter
        return run(model, make_rows(), make_settings(seed=seed), lambda _: None)

    assert history(3, 0) == history(3, 5)
    assert history(3, 0) != history(4, 0)


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
def test_loss_that_is_not_a_number_stops_at_its_step_and_names_the_episodes(load: Loader, architecture: str) -> None:
    import torch

    model, rows = load(architecture), make_rows((9, 10, 11))
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(math.nan)
    heard: list[TrainingEvent] = []
    with pytest.raises(LoraTrainerError, match=r"the loss of step 1 is nan, .*episode \d, episode \d\. Lower the learning rate"):
        run(model, rows, make_settings(), heard.append)
    assert heard == []


def test_a_row_without_an_episode_is_named_by_the_number_of_its_sample(load: Loader) -> None:
    import torch

    model, (row,) = load(), make_rows((9,))
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(math.nan)
    nameless = dataclasses.replace(row, episode_id=None, sample_number=4)
    with pytest.raises(LoraTrainerError, match=r"its samples came from sample 4\. Lower"):
        run(model, [nameless], make_settings(), lambda _: None)


def test_gradient_that_is_not_finite_stops_before_it_spoils_the_adapter(load: Loader) -> None:
    model, rows = load(fresh=True), make_rows((9,))
    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    first.register_hook(lambda grad: grad * math.inf)
    before = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(LoraTrainerError, match=r"the norm of its gradient (nan|inf)"):
        run(model, rows, make_settings(), lambda _: None)
    now = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(bool((one == two).all()) for one, two in zip(before, now, strict=True))


# --- order, steps and schedule ----------------------------------------------------------------------------------------------


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own() -> None:
    settings = make_settings(epochs=3, batch_size=2, gradient_accumulation=2)
    windows = list(loop.windows(10, settings, loop.count_steps(10, settings)))
    assert [len(window) for _, window in windows] == [4, 4, 2] * 3
    orders = [list(itertools.chain(*(window for number, window in windows if number == epoch))) for epoch in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert windows == list(loop.windows(10, settings, 9))
    assert windows != list(loop.windows(10, make_settings(epochs=3, gradient_accumulation=2, seed=1), 9))


@pytest.mark.parametrize(
    ("n_rows", "changes", "steps"),
    [
        (10, {}, 5),
        (11, {}, 6),
        (1, {"epochs": 3}, 3),
        (10, {"gradient_accumulation": 4, "epochs": 2}, 4),
        (10, {"max_steps": 3}, 3),
        (10, {"max_steps": 99}, 5),
    ],
)
def test_number_of_steps(n_rows: int, changes: dict[str, int], steps: int) -> None:
    settings = make_settings(**changes)
    assert loop.count_steps(n_rows, settings) == steps
    assert len(list(loop.windows(n_rows, settings, steps))) == steps


def test_rate_rises_to_its_peak_then_falls_on_a_cosine_and_never_reaches_zero() -> None:
    rates = [loop.schedule(step, 20, 0.2) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[4:] == [pytest.approx(0.5 * (1 + math.cos(math.pi * n / 16))) for n in range(16)]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] > 0
    assert [loop.schedule(0, 1, ratio) for ratio in (0, 0.1, 0.9)] == [1.0, 1.0, 1.0]
    assert [loop.schedule(step, 2, 0) for step in range(2)] == [1.0, 0.5]


def test_micro_batches_hold_like_lengths_within_both_limits() -> None:
    rows = make_rows((*random.Random(0).choices(range(6, 3000), k=40), 9000))
    batches = [[rows[number] for number in batch] for batch in dense.micro_batches(rows, 3)]
    assert sorted(id(row) for batch in batches for row in batch) == sorted(id(row) for row in rows)
    for batch in batches:
        assert len(batch) <= 3
        assert len(batch) == 1 or len(batch) * max(len(row.ids) for row in batch) <= dense.MICRO_BATCH_TOKENS
    lengths = [len(row.ids) for batch in batches for row in batch]
    assert lengths == sorted(lengths)
