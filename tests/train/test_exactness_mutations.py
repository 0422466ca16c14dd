"""The comparison with separate samples can fail: each way to compute a tree wrongly is found by a wide margin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from train.tree_cases import SHAPES, make_row, random_rows
from train.tree_models import CONFIGS, Gradient, Twins, make_twins, twins

from loraloop.chat.render import Row
from loraloop.train import engine
from loraloop.train.arithmetic import Pair, Saved, TorchArithmetic
from loraloop.train.engine import Plan
from loraloop.train.tree import Block, TokenTree, Visit, build_tree, list_visits

FOUND = 1e-3
"""Nine orders of magnitude above what rounding does."""
ROWS = random_rows(5)


@dataclass(frozen=True)
class Patch:
    """Puts something wrong in the place of one of the engine's functions."""

    monkeypatch: pytest.MonkeyPatch

    def tree(self, change: Callable[[TokenTree], TokenTree]) -> None:
        self.monkeypatch.setattr(engine, "build_tree", lambda rows: change(build_tree(rows)))

    def blocks(self, change: Callable[[Block], Block]) -> None:
        def visits(tree: TokenTree, max_rows: int) -> list[Visit]:
            changed: dict[int, Block] = {}
            return [
                Visit(changed.setdefault(visit.block.start, change(visit.block)), visit.forward) for visit in list_visits(tree, max_rows)
            ]

        self.monkeypatch.setattr(engine, "list_visits", visits)


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Patch:
    return Patch(monkeypatch)


def distance(both: Twins, plan: Plan, rows: Sequence[Row] = ROWS, arithmetic: TorchArithmetic | None = None) -> float:
    return both.tree(rows, plan, arithmetic=arithmetic).apart(both.truth(rows))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "lfm2"])
def test_patching_with_nothing_changed_is_found_right(name: str, patch: Patch) -> None:
    patch.tree(lambda tree: tree)
    patch.blocks(lambda block: block)
    assert max(distance(twins(name), Plan(rows)) for rows in (1, 8, 1000)) <= 1e-12


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "lfm2"])
def test_positions_off_by_one_behind_a_branch_are_found(name: str, patch: Patch) -> None:
    """Moving every position would change nothing: rotations are relative."""
    first = min(root.end for root in build_tree(ROWS).roots)
    patch.tree(lambda tree: replace(tree, positions=tree.positions + (tree.positions >= first)))
    assert min(distance(twins(name), Plan(rows)) for rows in (4, 1000)) > FOUND


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "lfm2"])
def test_a_row_that_sees_its_sibling_is_found(name: str, patch: Patch) -> None:
    patch.blocks(lambda block: replace(block, ends=np.full(block.n_rows, block.n_rows)))
    assert min(distance(twins(name), Plan(rows)) for rows in (40, 1000)) > FOUND


def test_a_node_whose_end_is_one_row_too_far_is_found(patch: Patch) -> None:
    patch.blocks(lambda block: replace(block, ends=np.minimum(block.ends + 1, block.n_rows)))
    assert distance(twins("llama"), Plan(1000)) > FOUND


def test_targets_counted_once_for_all_samples_are_found(patch: Patch) -> None:
    def once(tree: TokenTree) -> TokenTree:
        _, first = np.unique(np.stack([tree.target_rows, tree.target_tokens]), axis=1, return_index=True)
        kept = np.sort(first)
        columns = ("target_rows", "target_tokens", "target_weights", "target_samples")
        return replace(tree, **{column: getattr(tree, column)[kept] for column in columns})

    patch.tree(once)
    for shape in ("duplicates", "nested, a leaf of no tokens", "several targets at a branch"):
        assert distance(twins("llama"), Plan(), SHAPES[shape]) > FOUND, shape


def test_a_row_with_one_target_of_several_is_found(patch: Patch) -> None:
    def first_only(tree: TokenTree) -> TokenTree:
        _, kept = np.unique(tree.target_rows, return_index=True)
        columns = ("target_rows", "target_tokens", "target_weights", "target_samples")
        return replace(tree, **{column: getattr(tree, column)[kept] for column in columns})

    patch.tree(first_only)
    assert distance(twins("llama"), Plan(), SHAPES["several targets at a branch"]) > FOUND


def test_a_weight_left_out_is_found(patch: Patch) -> None:
    patch.tree(lambda tree: replace(tree, target_weights=np.ones_like(tree.target_weights)))
    assert distance(twins("llama"), Plan(), SHAPES["weights"]) > FOUND


def test_a_branch_that_is_merged_one_token_too_late_is_found() -> None:
    """The tree of samples whose last common token was taken for different ones has the same gradient; of other tokens it has not."""
    trunk = [1, 2, 3, 4]
    rows = [make_row([*trunk, 5, 6, 7]), make_row([*trunk, 8, 9, 7])]
    wrong = [rows[0], make_row([*trunk, 5, 9, 7])]
    assert twins("llama").tree(wrong).apart(twins("llama").truth(rows)) > FOUND


@pytest.mark.parametrize("name", ["lfm2", "lfm2, wider, biases"])
@pytest.mark.parametrize("block_rows", [8, 1000])
def test_a_convolution_that_reads_the_row_before_instead_of_its_parent_is_found(
    name: str, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows_before(block: Block, n_above: int) -> np.ndarray:
        places = np.arange(block.depth, block.depth + block.n_rows)
        return np.stack([np.maximum(places - distance, -1) for distance in range(1, n_above + 1)])

    short_leaves = [make_row([1, 2, 3, 4, 5, leaf, 7]) for leaf in (8, 9, 10, 11)]
    assert distance(twins(name), Plan(block_rows), short_leaves) <= 1e-12
    monkeypatch.setattr(engine, "list_parents", rows_before)
    assert distance(twins(name), Plan(block_rows), short_leaves) > FOUND


def test_a_convolution_that_forgets_the_block_above_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine.list_parents
    monkeypatch.setattr(engine, "list_parents", lambda block, n: np.where(right(block, n) < block.depth, -1, right(block, n)))
    assert distance(twins("lfm2"), Plan(8)) > FOUND


class ForgetsDescendants(TorchArithmetic):
    """Gradients of keys and values stay in the block: what blocks below give to the path above them is dropped."""

    def attend_backward(self, d_out: torch.Tensor, saved: Saved, block: Block, *, scale: float, d_kv: Pair, d_q: torch.Tensor) -> None:
        above = [gradient[: block.depth].clone() for gradient in d_kv]
        super().attend_backward(d_out, saved, block, scale=scale, d_kv=d_kv, d_q=d_q)
        for gradient, kept in zip(d_kv, above, strict=True):
            gradient[: block.depth] = kept


class ForgetsItsPart(TorchArithmetic):
    """Each piece of a row's attention goes backward by its own log-sum-exp, not by the merged one."""

    def attend(self, q: torch.Tensor, kv: Pair, block: Block, *, scale: float, out: torch.Tensor) -> torch.Tensor:
        lse = super().attend(q, kv, block, scale=scale, out=out)
        alone = replace(block, depth=0)
        own = (kv[0][block.depth :], kv[1][block.depth :])
        return super().attend(q, own, alone, scale=scale, out=torch.empty_like(out)) if block.depth else lse


class NeverTurnsBack(TorchArithmetic):
    """The gradient of rotated keys and queries is rotated onwards."""

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool = False) -> None:  # noqa: ARG002
        super().rotate(x, cos, sin)


@pytest.mark.parametrize("wrong", [ForgetsDescendants, ForgetsItsPart, NeverTurnsBack])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "lfm2"])
def test_wrong_arithmetic_is_found(name: str, wrong: type[TorchArithmetic]) -> None:
    assert distance(twins(name), Plan(6), arithmetic=wrong()) > FOUND


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "lfm2"])
def test_a_wrong_scaling_of_one_adapter_is_found(name: str) -> None:
    both = make_twins(CONFIGS[name]())
    for linear in both.architecture.linears:
        right = linear.adapters[-1]
        linear.adapters[-1] = replace(right, scaling=right.scaling * 1.1)
        assert distance(both, Plan()) > FOUND
        linear.adapters[-1] = right
    assert distance(both, Plan()) <= 1e-12


def test_the_distance_counts_gradient_and_loss() -> None:
    one = Gradient(1.0, torch.tensor([3.0, 4.0]))
    assert one.apart(Gradient(1.0, torch.tensor([3.0, 4.0]))) == 0
    assert one.apart(Gradient(2.0, torch.tensor([3.0, 4.0]))) == 0.5
    assert one.apart(Gradient(1.0, torch.tensor([3.0, 0.0]))) == pytest.approx(4 / 3)
