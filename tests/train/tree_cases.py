"""Samples for the tree engine, drawn or made for one shape of tree, and what a tree of them must be, by brute force."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import strategies as st

from loraloop.chat.render import Row
from loraloop.chat.rows import Unit
from loraloop.train.tree import Node, TokenTree

VOCABULARY = 23
"""Tokens of the tiny models; drawn trees use the first few, so that they branch."""


def make_row(ids: list[int], weights: list[float] | None = None) -> Row:
    """A sample in which every token is supervised, unless told otherwise."""
    return Row(ids=ids, weights=[1.0] * len(ids) if weights is None else weights, text="")


def units_of(rows: list[Row]) -> list[Unit]:
    """Each row as an sft sample."""
    return [
        Unit((row,), 1, sample_number=row.sample_number or number, episode_ids=(row.episode_id,) if row.episode_id else ())
        for number, row in enumerate(rows, 1)
    ]


@st.composite
def samples(draw: st.DrawFn, most: int = 6, longest: int = 10) -> list[Row]:
    """Samples that share prefixes, nest, repeat, have no supervision at all, or are a single token."""
    tokens = st.integers(0, 2)
    pool = draw(st.lists(st.lists(tokens, min_size=1, max_size=longest), min_size=1, max_size=3))
    rows = []
    for _ in range(draw(st.integers(1, most))):
        start = draw(st.sampled_from(pool))
        ids = start[: draw(st.integers(1, len(start)))] + draw(st.lists(tokens, max_size=longest // 2))
        weights = draw(st.lists(st.sampled_from([0.0, 1.0, 0.5, 0.0, 3.0]), min_size=len(ids), max_size=len(ids)))
        rows.append(make_row(ids, weights))
    return rows


def supervised(rows: list[Row]) -> bool:
    """Whether there is anything to train on."""
    return any(weight > 0 for row in rows for weight in row.weights[1:])


def random_rows(seed: int, n_rows: int = 6, shared: int = 30, own: int = 12, vocabulary: int = VOCABULARY) -> list[Row]:
    """Samples that leave a common beginning at different tokens, and one of them once more."""
    draw = random.Random(seed)
    base = [draw.randrange(vocabulary) for _ in range(shared)]
    rows = []
    for _ in range(n_rows - 1):
        ids = base[: draw.randint(1, shared)] + [draw.randrange(vocabulary) for _ in range(draw.randint(3, own))]
        rows.append(make_row(ids, [draw.choice([0.0, 0.0, 1.0, 0.5]) for _ in ids[:-1]] + [1.0]))
    return [*rows, rows[0]]


def _shapes() -> dict[str, list[Row]]:
    draw = random.Random(7)

    def ids(n: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(n)]

    trunk, fork = ids(7), ids(5)
    deep = [ids(3) for _ in range(5)]
    return {
        "one sample": [make_row(ids(9))],
        "nothing shared": [make_row([first, *ids(6)]) for first in (1, 2, 3)],
        "branch at token 1": [make_row([5, follow, *ids(4)]) for follow in (1, 2, 3)],
        "one trunk, several branches": [make_row([*trunk, follow, *ids(5)]) for follow in (1, 2, 3)],
        "branches of branches": [
            make_row([*trunk, *fork[:k], follow, *ids(3)]) for k, follow in ((0, 22), (2, 21), (2, 20), (5, 19), (5, 18))
        ],
        "four deep": [make_row([token for part in deep[: depth + 1] for token in part] + ids(3)) for depth in range(5)],
        "duplicates": [make_row([*trunk, *fork])] * 3 + [make_row(trunk)],
        "nested, a leaf of no tokens": [make_row([*trunk, *fork]), make_row([*trunk, *fork[:2]]), make_row(trunk), make_row(trunk[:3])],
        "several targets at a branch": [make_row([*trunk, target]) for target in (1, 2, 3, 3, 4)],
        "supervised behind the branch only": [
            make_row([*trunk, *tail], [0.0] * len(trunk) + [1.0] * len(tail)) for tail in (ids(4), ids(6), ids(2))
        ],
        "weights": [
            make_row([*trunk, *tail], [draw.choice([0.0, 0.25, 2.0]) for _ in range(len(trunk) + 3)] + [1.0]) for tail in (ids(4), ids(4))
        ],
        "unsupervised and single tokens among them": [
            make_row([*trunk, *fork]),
            make_row([*trunk, 3], [0.0] * 8),
            make_row([4]),
            make_row([*trunk, 3, 4], [0.0] * 4 + [1.0] + [0.0] * 4),
        ],
    }


SHAPES = _shapes()


@dataclass(frozen=True)
class BruteForce:
    """What a tree is, from every prefix of every sample."""

    prefixes: set[tuple[int, ...]]
    """Those that predict a supervised token or lead to one: each is one row."""
    targets: list[tuple[tuple[int, ...], int, float, int]]
    """(prefix, token, weight, sample), sorted."""

    @classmethod
    def of(cls, rows: list[Row]) -> BruteForce:
        """From the samples."""
        prefixes, targets = set(), []
        for sample, row in enumerate(rows):
            at = [depth for depth in range(1, len(row.ids)) if row.weights[depth] > 0]
            targets += [(tuple(row.ids[:depth]), row.ids[depth], row.weights[depth], sample) for depth in at]
            prefixes |= {tuple(row.ids[: depth + 1]) for depth in range(max(at, default=0))}
        return cls(prefixes, sorted(targets))


def list_paths(tree: TokenTree) -> list[tuple[int, ...]]:
    """For each row of a tree the tokens from its root to itself."""
    paths: dict[int, tuple[int, ...]] = {}

    def walk(nodes: list[Node] | tuple[Node, ...], above: tuple[int, ...]) -> None:
        for node in nodes:
            path = above
            for row in range(node.row, node.row + node.end - node.start):
                path = (*path, int(tree.tokens[row]))
                assert row not in paths
                paths[row] = path
            walk(node.children, path)

    walk(tree.roots, ())
    return [paths[row] for row in range(tree.n_rows)]
