"""The tree engine in float64 against separate samples: every architecture, every shape of tree, blocks, what is kept, drawn trees."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from train.tree_cases import SHAPES, make_row, random_rows, samples, supervised
from train.tree_models import NAMES, PLANS, Gradient, take_gradient, twins

from loraloop.chat.render import Row
from loraloop.train.buffers import Keep
from loraloop.train.dense import DenseEngine
from loraloop.train.engine import Plan

LIMIT = 1e-12


@functools.cache
def truth(name: str, shape: str) -> Gradient:
    found = twins(name).truth(SHAPES[shape])
    assert float(found.vector.norm()) > 1e-2
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_separate_samples(name: str, shape: str) -> None:
    for plan in PLANS:
        assert twins(name).tree(SHAPES[shape], plan).apart(truth(name, shape)) <= LIMIT, plan


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(rows=samples(), block_rows=st.sampled_from([1, 2, 5, 1000]), keep=st.sampled_from(Keep))
def test_gradient_of_drawn_trees_is_that_of_separate_samples(name: str, rows: list[Row], block_rows: int, keep: Keep) -> None:
    assume(supervised(rows))
    assert twins(name).tree(rows, Plan(block_rows, keep)).apart(twins(name).truth(rows)) <= LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_longer_samples_in_uneven_blocks(name: str) -> None:
    rows = random_rows(3, n_rows=7, shared=70, own=40)
    expected = twins(name).truth(rows)
    for block_rows in (7, 16, 33, 64):
        assert twins(name).tree(rows, Plan(block_rows, Keep.MIXER)).apart(expected) <= LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_the_dense_engine_of_the_same_model_still_gives_the_same(name: str) -> None:
    """Its base weights are views of the fused buffers, and `norms` of transformers compute in float32, hence the wider limit."""
    rows, model = SHAPES["branches of branches"], twins(name).fused
    assert take_gradient(model, lambda: DenseEngine(model, 2).backward(rows)).apart(truth(name, "branches of branches")) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_measuring_gives_the_summed_loss_and_leaves_no_gradient(name: str) -> None:
    model = twins(name).fused
    for shape, rows in SHAPES.items():
        model.zero_grad(set_to_none=True)
        for block_rows in (1, 5, 1000):
            losses = twins(name).engine(Plan(block_rows)).measure(rows)
            assert len(losses) == len(rows)
            assert losses.sum() / sum(sum(row.weights[1:]) for row in rows) == pytest.approx(truth(name, shape).loss, rel=LIMIT)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_add_up_over_calls() -> None:
    one, two = SHAPES["weights"], SHAPES["branches of branches"]
    engine, model = twins("llama").engine(Plan(4)), twins("llama").fused
    both = take_gradient(model, lambda: engine.backward(one) + engine.backward(two))
    parts = [twins("llama").truth(rows) for rows in (one, two)]
    assert both.apart(Gradient(parts[0].loss + parts[1].loss, parts[0].vector + parts[1].vector)) <= LIMIT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", Keep)
def test_an_engine_that_computed_other_trees_before_gives_the_same_bits(name: str, keep: Keep) -> None:
    """Memory is taken once and used again, by trees that need less or more of it."""
    both = twins(name)
    used = both.engine(Plan(5, keep))
    for rows in (SHAPES["one sample"], random_rows(4, shared=40), SHAPES["four deep"], SHAPES["nested, a leaf of no tokens"]):
        used.measure(random_rows(6))
        again = take_gradient(both.fused, lambda rows=rows: used.backward(rows))
        fresh = both.tree(rows, Plan(5, keep))
        assert again.loss == fresh.loss
        assert torch.equal(again.vector, fresh.vector)


def test_a_duplicate_counts_as_often_as_it_is_there() -> None:
    rows = SHAPES["weights"]
    weights = [1.0, 3.0]
    heavy = [make_row(row.ids, [weight * factor for weight in row.weights]) for row, factor in zip(rows, weights, strict=True)]
    again = [rows[0], *[rows[1]] * 3]
    assert twins("qwen3").tree(again).apart(twins("qwen3").truth(heavy)) <= LIMIT
    assert twins("qwen3").tree(again).apart(twins("qwen3").truth(rows)) > 1e-2


def test_engine_counts_the_tokens_that_it_computed() -> None:
    engine = twins("llama").engine()
    engine.backward(SHAPES["duplicates"])
    assert engine.n_computed == 11
