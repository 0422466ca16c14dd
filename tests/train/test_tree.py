"""The token tree and the walk over it against brute force, over drawn samples and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from train.tree_cases import SHAPES, BruteForce, list_paths, make_row, samples

from loraloop.chat.render import Row
from loraloop.train.engine import list_parents
from loraloop.train.losses import Targets
from loraloop.train.tree import Block, TokenTree, build_tree, list_visits

many = settings(max_examples=80, deadline=None)
block_sizes = st.sampled_from([1, 2, 3, 5, 8, 1000])


def forward_blocks(tree: TokenTree, max_rows: int) -> list[tuple[Block, list[int]]]:
    """The blocks in the order of the walk, each with the rows on the stack when it is entered."""
    stack: list[Block] = []
    entered = []
    for visit in list_visits(tree, max_rows):
        if visit.forward:
            entered.append((visit.block, [row for block in stack for row in range(block.start, block.stop)]))
            stack.append(visit.block)
        else:
            assert stack.pop() is visit.block
    assert not stack
    return entered


# --- the tree ---------------------------------------------------------------------------------------------------------------


@many
@given(samples())
def test_every_prefix_that_matters_is_one_row_and_no_other_is(rows: list[Row]) -> None:
    tree, truth = build_tree(rows), BruteForce.of(rows)
    paths = list_paths(tree)
    assert len(paths) == len(set(paths)) == tree.n_rows
    assert set(paths) == truth.prefixes
    assert tree.positions.tolist() == [len(path) - 1 for path in paths]
    assert tree.n_pairs == sum(map(len, truth.prefixes))
    assert tree.longest_path == max(map(len, truth.prefixes), default=0)
    assert tree.n_logical == sum(len(row.ids) for row in rows)


@many
@given(samples())
def test_every_supervised_token_of_every_sample_is_a_target_of_its_own_row(rows: list[Row]) -> None:
    tree = build_tree(rows)
    paths = list_paths(tree)
    columns = zip(tree.target_rows, tree.target_tokens, tree.target_weights, tree.target_samples, strict=True)
    found = sorted((paths[row], int(token), float(weight), int(sample)) for row, token, weight, sample in columns)
    assert found == BruteForce.of(rows).targets
    assert tree.target_rows.tolist() == sorted(tree.target_rows.tolist())


@many
@given(samples())
def test_nodes_are_as_long_as_can_be_and_siblings_begin_with_different_tokens(rows: list[Row]) -> None:
    tree = build_tree(rows)
    waiting = [tree.roots]
    while waiting:
        siblings = waiting.pop()
        firsts = [int(tree.tokens[node.row]) for node in siblings]
        assert len(set(firsts)) == len(firsts)
        for node in siblings:
            assert node.end > node.start
            assert len(node.children) != 1
            assert node.n_rows == node.end - node.start + sum(child.n_rows for child in node.children)
            waiting.append(tuple(node.children))


@many
@given(samples(), st.randoms(use_true_random=False))
def test_order_of_the_samples_changes_neither_rows_nor_targets(rows: list[Row], chance) -> None:
    order = list(range(len(rows)))
    chance.shuffle(order)
    one, other = build_tree(rows), build_tree([rows[index] for index in order])
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.positions.tolist() == other.positions.tolist()
    assert sorted(zip(one.target_rows, one.target_tokens, one.target_weights, one.target_samples, strict=True)) == sorted(
        zip(other.target_rows, other.target_tokens, other.target_weights, np.array(order)[other.target_samples], strict=True)
    )


def test_tokens_are_compared_as_numbers_of_any_size() -> None:
    tree = build_tree([make_row([first, 1, 1]) for first in (70_000, 300, 255, 256, 2**31)])
    assert tree.tokens.tolist() == [255, 1, 256, 1, 300, 1, 70_000, 1, 2**31, 1]


@pytest.mark.parametrize("rows", [[], [make_row([3])], [make_row([1, 2, 3], [1.0, 0.0, 0.0])], [make_row([])]], ids=str)
def test_samples_without_a_supervised_token_give_an_empty_tree_and_an_empty_walk(rows: list[Row]) -> None:
    tree = build_tree(rows)
    assert (tree.n_rows, tree.longest_path, tree.n_pairs, tree.roots) == (0, 0, 0, ())
    assert len(tree.target_rows) == 0
    assert list_visits(tree, 8) == []


def test_what_follows_the_last_supervised_token_is_not_computed() -> None:
    assert build_tree([make_row([1, 2, 3, 4, 5, 6], [0.0, 0.0, 1.0, 0.5, 0.0, 0.0])]).tokens.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("shape", "n_rows", "n_targets"),
    [("duplicates", 11, 39), ("nested, a leaf of no tokens", 11, 11 + 8 + 6 + 2), ("several targets at a branch", 7, 7 * 5)],
)
def test_rows_are_shared_and_targets_are_not(shape: str, n_rows: int, n_targets: int) -> None:
    tree = build_tree(SHAPES[shape])
    assert (tree.n_rows, len(tree.target_rows)) == (n_rows, n_targets)


# --- the walk ---------------------------------------------------------------------------------------------------------------


@many
@given(samples(), block_sizes)
def test_the_walk_enters_every_row_once_in_order_and_leaves_every_block_after_all_behind_it(rows: list[Row], max_rows: int) -> None:
    tree = build_tree(rows)
    entered = forward_blocks(tree, max_rows)  # checks the order of leaving
    assert [row for block, _ in entered for row in range(block.start, block.stop)] == list(range(tree.n_rows))
    assert all(0 < block.n_rows <= max_rows and block.depth == len(path) for block, path in entered)


@many
@given(samples(), block_sizes)
def test_every_row_sees_its_own_path_and_nothing_else(rows: list[Row], max_rows: int) -> None:
    tree = build_tree(rows)
    paths = list_paths(tree)
    for block, path in forward_blocks(tree, max_rows):
        for row in range(block.n_rows):
            seen = [*path, *(block.start + other for other in range(row + 1) if block.ends[other] > row)]
            assert tuple(tree.tokens[seen]) == paths[block.start + row]


@many
@given(samples(), block_sizes)
def test_segments_are_the_same_visibility_in_squares_and_rectangles(rows: list[Row], max_rows: int) -> None:
    for block, _ in forward_blocks(build_tree(rows), max_rows):
        at = 0
        for start, stop, end in block.segments():
            assert start == at < stop <= end <= block.n_rows
            assert block.ends[start:stop].tolist() == [end] * (stop - start)
            at = stop
        assert at == block.n_rows


@many
@given(samples(), block_sizes, st.integers(1, 4))
def test_parents_are_the_rows_above_on_the_own_path(rows: list[Row], max_rows: int, n_above: int) -> None:
    tree = build_tree(rows)
    for block, path in forward_blocks(tree, max_rows):
        parents = list_parents(block, n_above)
        assert parents.shape == (n_above, block.n_rows)
        for row in range(block.n_rows):
            places = [*range(len(path)), *(block.depth + other for other in range(row) if block.ends[other] > row)]
            assert parents[:, row].tolist() == ([-1] * n_above + places)[: -n_above - 1 : -1]


def test_without_a_convolution_there_are_no_parents() -> None:
    (block, _), *_ = forward_blocks(build_tree([make_row([1, 2, 3])]), 8)
    assert list_parents(block, 0).shape == (0, 2)


@many
@given(samples(), block_sizes)
def test_the_targets_of_the_blocks_are_those_of_the_tree(rows: list[Row], max_rows: int) -> None:
    tree = build_tree(rows)
    found: list[tuple[int, int, float]] = []
    for block, _ in forward_blocks(tree, max_rows):
        factors = np.arange(1.0, tree.n_samples + 1)
        targets = Targets.of(tree, block, factors)
        at = targets.rows[targets.of_row] + block.start
        found += zip(at.tolist(), targets.tokens.tolist(), targets.weights.tolist(), strict=True)
        assert targets.pulls.tolist() == (targets.weights.numpy() * factors[targets.samples.numpy()]).tolist()
        sums = [float(targets.pulls[targets.of_row == row].sum()) for row in range(len(targets.rows))]
        assert targets.row_pulls.tolist() == pytest.approx(sums)
        assert Targets.of(tree, block, None).pulls is None
    assert found == list(zip(tree.target_rows.tolist(), tree.target_tokens.tolist(), tree.target_weights.tolist(), strict=True))


def test_siblings_that_fit_share_a_block_and_a_node_that_does_not_is_cut_in_equal_parts() -> None:
    rows = [make_row([*range(10), leaf, 0, 0]) for leaf in (11, 12, 13)]  # a trunk of 10 rows, three leaves of 2
    assert [(block.start, block.stop, block.depth) for block, _ in forward_blocks(build_tree(rows), 4)] == [
        (0, 3, 0),
        (3, 6, 3),
        (6, 10, 6),
        (10, 14, 10),
        (14, 16, 10),
    ]
    (whole, _), *others = forward_blocks(build_tree(rows), 16)
    assert (whole.start, whole.stop, others) == (0, 16, [])
    assert list(whole.segments()) == [(0, 10, 16), (10, 12, 12), (12, 14, 14), (14, 16, 16)]
