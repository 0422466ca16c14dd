"""The samples of one optimizer step as one tree of tokens, and its cutting into blocks that are computed one after another.

Samples are merged on token ids after each was tokenised whole, so a shared token is one row of the tree and is computed once.
Rows stand in depth-first preorder: a node's rows, then its subtrees. A sample ends with its last supervised token: what follows, and
that token itself as an input, can change no gradient. This module knows token ids and weights only; no torch, no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from loraloop.chat.render import Row

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]


@dataclass
class Node:
    """Tokens `start` to `end` (depths) of sample `sample`, followed by `children`; `row` is where they stand in the tree."""

    sample: int
    start: int
    end: int
    children: list[Node]
    row: int = 0
    n_rows: int = 0
    """Rows of the whole subtree, its own among them."""


@dataclass(frozen=True)
class TokenTree:
    """Every token of the samples once. One target for each supervised token of each sample, sorted by row."""

    tokens: Ints  # (rows,)
    positions: Ints  # (rows,) tokens before this one on its path
    roots: tuple[Node, ...]
    target_rows: Ints  # (targets,) the row whose output predicts the target
    target_tokens: Ints  # (targets,)
    target_weights: Floats  # (targets,)
    target_samples: Ints  # (targets,) index into the samples that the tree was built from
    n_samples: int
    """Samples that it was built from, also those without a supervised token."""
    n_logical: int
    """Tokens of the samples, counted once for each sample that has them."""

    @property
    def n_rows(self) -> int:
        """Tokens that are computed."""
        return len(self.tokens)

    @property
    def longest_path(self) -> int:
        """Tokens of the longest path from a root to a leaf."""
        return int(self.positions.max()) + 1 if self.n_rows else 0

    @property
    def n_pairs(self) -> int:
        """Visible pairs of a query and a key, each row with itself among them."""
        return int(self.positions.sum()) + self.n_rows


@dataclass(frozen=True)
class Block:
    """Rows `start` to `stop` of the tree, computed together behind the `depth` rows of their common path.

    A block with blocks below it is a part of one node. A block without may hold whole sibling subtrees.
    """

    start: int
    stop: int
    depth: int
    ends: Ints
    """(rows,) for each row, counted from `start`: behind the last row that may look at it, the end of its node's subtree."""

    @property
    def n_rows(self) -> int:
        """Rows computed."""
        return self.stop - self.start

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """(start, stop, end) of runs of rows that see one another causally and are seen up to `end`, counted from `start`."""
        cuts = [0, *(np.flatnonzero(np.diff(self.ends)) + 1).tolist(), self.n_rows]
        for start, stop in pairwise(cuts):
            yield start, stop, int(self.ends[start])


@dataclass(frozen=True)
class Visit:
    """One step of the walk over the blocks: into a block (`forward`) or out of it again, when all below it is done."""

    block: Block
    forward: bool


def build_tree(rows: Sequence[Row]) -> TokenTree:
    """The tree of `rows`; a row without a supervised token behind its first is not in it."""
    inputs = [_inputs(row) for row in rows]
    order = sorted(
        (number for number in range(len(rows)) if len(inputs[number])), key=lambda number: inputs[number].astype(">u4").tobytes()
    )
    roots = _merge(inputs, order)
    n_rows = _place(roots)
    tokens = np.empty(n_rows, np.int64)
    positions = np.empty(n_rows, np.int64)
    for node in _walk(roots):
        here = slice(node.row, node.row + node.end - node.start)
        tokens[here] = inputs[node.sample][node.start : node.end]
        positions[here] = np.arange(node.start, node.end)
    at, targets, weights, samples = _find_targets(rows, inputs, order)
    by_row = np.argsort(at, kind="stable")
    return TokenTree(
        tokens=tokens,
        positions=positions,
        roots=tuple(roots),
        target_rows=at[by_row],
        target_tokens=targets[by_row],
        target_weights=weights[by_row],
        target_samples=samples[by_row],
        n_samples=len(rows),
        n_logical=sum(len(row.ids) for row in rows),
    )


def list_visits(tree: TokenTree, max_rows: int) -> list[Visit]:
    """The walk over the tree in blocks of at most `max_rows` rows: every block is left after all that was entered behind it.

    Sibling subtrees that fit together are one block. A node whose subtree does not fit is computed by itself, in equal parts
    when it is too long, and its subtrees behind it.
    """
    visits: list[Visit] = []
    stack: list[tuple[tuple[Node, ...], int] | list[Visit]] = [(tree.roots, 0)]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            visits += item
            continue
        pending: list[tuple[tuple[Node, ...], int] | list[Visit]] = []
        for group in _groups(item[0], max_rows):
            if group[-1].row + group[-1].n_rows - group[0].row <= max_rows:
                block = _forest_block(group, item[1])
                pending.append([Visit(block, forward=True), Visit(block, forward=False)])
                continue
            (node,) = group
            blocks = _node_blocks(node, max_rows)
            pending.append([Visit(block, forward=True) for block in blocks])
            if node.children:
                pending.append((tuple(node.children), node.end))
            pending.append([Visit(block, forward=False) for block in reversed(blocks)])
        stack += reversed(pending)
    return visits


def _inputs(row: Row) -> Ints:
    """The tokens of `row` that are computed: those before its last supervised one."""
    supervised = np.flatnonzero(np.asarray(row.weights[1:]) > 0)
    return np.asarray(row.ids[: supervised[-1] + 1] if len(supervised) else [], np.int64)


def _merge(inputs: Sequence[Ints], order: Sequence[int]) -> list[Node]:
    """The radix tree of the samples, which `order` gives in lexicographic order: equal ones and prefixes stand next to each other."""
    top = Node(-1, 0, 0, [])
    path = [top]
    before = np.empty(0, np.int64)
    for sample in order:
        ids = inputs[sample]
        shared = _common_prefix(before, ids)
        while path[-1].start >= shared and len(path) > 1:
            path.pop()
        node = path[-1]
        if shared < len(ids):
            if shared < node.end:  # the new sample leaves in the middle of the node
                rest = Node(node.sample, shared, node.end, node.children)
                node.end, node.children = shared, [rest]
            if node is not top and not node.children:  # it only goes on where the one before ended
                node.sample, node.end = sample, len(ids)
            else:
                node.children.append(Node(sample, shared, len(ids), []))
                path.append(node.children[-1])
        before = ids
    return top.children


def _common_prefix(one: Ints, other: Ints) -> int:
    n = min(len(one), len(other))
    differ = np.flatnonzero(one[:n] != other[:n])
    return int(differ[0]) if len(differ) else n


def _walk(nodes: Sequence[Node]) -> Iterator[Node]:
    """Preorder."""
    stack = list(reversed(nodes))
    while stack:
        node = stack.pop()
        yield node
        stack += reversed(node.children)


def _place(roots: Sequence[Node]) -> int:
    """Give every node its row and the size of its subtree; gives the number of rows in all."""
    row = 0
    nodes = list(_walk(roots))
    for node in nodes:
        node.row = row
        row += node.end - node.start
    for node in reversed(nodes):
        node.n_rows = node.end - node.start + sum(child.n_rows for child in node.children)
    return row


def _find_targets(rows: Sequence[Row], inputs: Sequence[Ints], order: Sequence[int]) -> tuple[Ints, Ints, Floats, Ints]:
    """(row, token, weight, sample) of every supervised token of every sample."""
    found: list[tuple[Ints, Ints, Floats, Ints]] = []
    for sample, path in _paths(inputs, order):
        weights = np.asarray(rows[sample].weights, np.float64)[1 : len(path) + 1]
        depths = np.flatnonzero(weights > 0)
        found.append((path[depths], np.asarray(rows[sample].ids, np.int64)[depths + 1], weights[depths], np.full(len(depths), sample)))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64)
    at, tokens, weights, samples = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return at, tokens, weights, samples


def _paths(inputs: Sequence[Ints], order: Sequence[int]) -> Iterator[tuple[int, Ints]]:
    """(sample, the tree's row for each of its tokens); the second is only good until the next is asked for.

    In lexicographic order a sample's tokens that none before it had are the next rows of the preorder.
    """
    path = np.empty(max((len(inputs[sample]) for sample in order), default=0), np.int64)
    before, n_rows = np.empty(0, np.int64), 0
    for sample in order:
        ids = inputs[sample]
        shared = _common_prefix(before, ids)
        path[shared : len(ids)] = np.arange(n_rows, n_rows + len(ids) - shared)
        n_rows += len(ids) - shared
        yield sample, path[: len(ids)]
        before = ids


def _groups(siblings: Sequence[Node], max_rows: int) -> Iterator[list[Node]]:
    """Neighbours that fit into one block together; what does not fit stands alone."""
    group: list[Node] = []
    for node in siblings:
        if group and node.row + node.n_rows - group[0].row > max_rows:
            yield group
            group = []
        group.append(node)
    if group:
        yield group


def _forest_block(group: Sequence[Node], depth: int) -> Block:
    start = group[0].row
    stop = group[-1].row + group[-1].n_rows
    ends = np.empty(stop - start, np.int64)
    for node in _walk(group):
        ends[node.row - start : node.row - start + node.end - node.start] = node.row + node.n_rows - start
    return Block(start, stop, depth, ends)


def _node_blocks(node: Node, max_rows: int) -> list[Block]:
    """The rows of one node in equal parts."""
    n_rows = node.end - node.start
    n_parts = -(-n_rows // max_rows)
    cuts = [node.row + part * n_rows // n_parts for part in range(n_parts + 1)]
    return [Block(a, b, node.start + a - node.row, np.full(b - a, b - a)) for a, b in pairwise(cuts)]
