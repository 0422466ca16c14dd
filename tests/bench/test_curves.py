"""The curves' samples share what they say, the points are those of the documents, and a real process measures one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from bench.counts import count_shared
from bench.curve_plots import draw_all
from bench.curve_point import Point, PointResult, find_shared, make_rows
from bench.curves import BLOCKS, CURVES, N_SHARING, RATIOS, CurveReport, fit_cost, list_points, run_point, tables
from bench.machine import Machine
from loraloop.train.tree import build_tree, list_visits

VOCABULARY = 300
LENGTH = 128
MACHINE = Machine(processor="p", cores=2, threads=2, memory_gb=1, gemm_gflops=1, gemm_shape=(1, 1, 1), versions={}, load_average=0)


def rows_of(point: Point) -> list:
    return make_rows(point.n_samples, point.length, point.shared, VOCABULARY, point.seed)


def result_of(point: Point) -> PointResult:
    """A made-up measurement: half a second, and a second for each LENGTH computed tokens."""
    n_logical = point.n_samples * point.length
    computed = count_shared(rows_of(point)).computed_tokens if point.engine == "tree" else n_logical
    seconds = 0.5 + computed / LENGTH
    return PointResult(
        point=point,
        logical_tokens=n_logical,
        computed_tokens=computed,
        step_seconds=[seconds, seconds * 9, seconds],
        loading_rss_mb=700,
        loaded_rss_mb=500,
        peak_rss_mb=1500,
        plan="",
    )


@pytest.fixture(scope="module")
def results() -> list[PointResult]:
    return [result_of(point) for curve in CURVES for point in list_points(curve, LENGTH)]


# --- samples ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_samples", "length", "shared"), [(1, 8, 3), (2, 8, 0), (5, 64, 63), (40, 33, 16)])
def test_any_two_samples_share_the_prefix_asked_for_and_no_more(n_samples: int, length: int, shared: int) -> None:
    rows = make_rows(n_samples, length, shared, VOCABULARY, seed=7)
    assert len(rows) == n_samples
    for one, other in combinations(rows, 2):
        assert one.ids[:shared] == other.ids[:shared]
        assert one.ids[shared] != other.ids[shared]
    for row in rows:
        assert len(row.ids) == len(row.weights) == length
        assert row.weights[-1] == 1.0
        assert sum(row.weights) == max(1, length // 16)
        assert all(0 <= token < VOCABULARY for token in row.ids)


def test_samples_follow_from_the_seed() -> None:
    assert make_rows(3, 16, 4, VOCABULARY, seed=1) == make_rows(3, 16, 4, VOCABULARY, seed=1)
    assert make_rows(3, 16, 4, VOCABULARY, seed=1) != make_rows(3, 16, 4, VOCABULARY, seed=2)


@pytest.mark.parametrize(("n_samples", "shared"), [(2, 16), (2, -1), (VOCABULARY + 1, 4)])
def test_samples_that_cannot_be_are_refused(n_samples: int, shared: int) -> None:
    with pytest.raises(ValueError, match="expected shared < length and at most 300 samples"):
        make_rows(n_samples, 16, shared, VOCABULARY, seed=0)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_ratio_is_the_one_asked_for(ratio: float) -> None:
    rows = make_rows(N_SHARING, 1024, find_shared(N_SHARING, 1024, ratio), VOCABULARY, seed=0)
    assert count_shared(rows).token_ratio == pytest.approx(ratio, rel=0.01)
    computed = build_tree([row.to_row() for row in rows]).n_rows
    assert computed == pytest.approx(sum(len(row.ids) for row in rows) / ratio, rel=0.01)


# --- points -----------------------------------------------------------------------------------------------------------------


def test_trees_have_the_sizes_asked_for_and_short_paths() -> None:
    trees = [build_tree([row.to_row() for row in rows_of(point)]) for point in list_points("size", LENGTH)]
    assert [tree.n_rows / LENGTH for tree in trees] == pytest.approx([1, 2, 4, 8, 16, 32], rel=0.15)
    assert {tree.longest_path for tree in trees} == {LENGTH - 1}


def test_more_samples_are_a_larger_tree_that_holds_no_more_at_a_time() -> None:
    held = set()
    sizes = []
    for point in list_points("samples", LENGTH):
        tree = build_tree([row.to_row() for row in rows_of(point)])
        sizes.append(tree.n_rows)
        held.add(max(visit.block.depth + visit.block.n_rows for visit in list_visits(tree, LENGTH)))
    assert sizes == sorted(sizes)
    assert sizes[-1] > 10 * sizes[0]
    assert len(held) == 1


def test_the_largest_block_alone_holds_the_whole_tree() -> None:
    n_blocks = []
    for point in list_points("blocks", LENGTH):
        tree = build_tree([row.to_row() for row in rows_of(point)])
        n_blocks.append(sum(visit.forward for visit in list_visits(tree, point.block_rows)))
    assert n_blocks == sorted(n_blocks, reverse=True)
    assert n_blocks[-1] == 1 < n_blocks[-2]
    assert len(n_blocks) == len(BLOCKS)


# --- results ----------------------------------------------------------------------------------------------------------------


def test_the_fit_finds_what_sharing_does_not_save(results: list[PointResult]) -> None:
    fit = fit_cost(results)
    assert fit is not None
    assert (fit.fixed, fit.shrinking) == pytest.approx((0.5, N_SHARING), rel=1e-6)
    assert fit.worst == pytest.approx(0, abs=1e-6)
    assert fit_cost([result for result in results if result.point.curve != "ratio"]) is None


def test_tables_have_every_point_and_say_which_block_is_packed(results: list[PointResult]) -> None:
    text = tables(CurveReport(points=results, fit=fit_cost(results), machine=MACHINE))
    lines = text.splitlines()
    assert sum(line.startswith("|") for line in lines) == len(results) + 2 * len(CURVES)
    assert "Seconds of a step = 0.50 + 8.00 / ratio, within 0% of every point." in lines
    assert [line.split("|")[1].strip() for line in lines if "packed" in line] == ["1,024 (packed)"]


def test_pictures_are_svg_with_labelled_axes_and_the_same_on_every_run(results: list[PointResult], tmp_path: Path) -> None:
    files = draw_all(results, tmp_path)
    assert [path.name for path in files] == ["tree-ratio.svg", "tree-size.svg", "tree-blocks.svg"]
    labels = {"tree-ratio.svg": "logical tokens/s", "tree-size.svg": "peak RSS (GiB)", "tree-blocks.svg": "computed tokens/s"}
    for path in files:
        text = path.read_text(encoding="utf-8")
        words = {"".join(element.itertext()).strip() for element in ET.fromstring(text).iter() if element.tag.endswith("text")}
        assert labels[path.name] in words
        assert path.with_suffix(".png").stat().st_size > 1000
        draw_all(results, tmp_path)
        assert path.read_text(encoding="utf-8") == text


def test_a_curve_that_was_not_measured_is_not_drawn(results: list[PointResult], tmp_path: Path) -> None:
    files = draw_all([result for result in results if result.point.curve == "blocks"], tmp_path)
    assert [path.name for path in files] == ["tree-blocks.svg"]


@pytest.mark.parametrize("engine", ["tree", "dense"])
def test_a_process_measures_a_point(engine: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    point = Point(curve="blocks", engine=engine, n_samples=3, length=32, shared=16, block_rows=20, repeats=2)
    result = run_point(tiny_model("llama"), point, tmp_path)
    assert result.point == point
    assert len(result.step_seconds) == 2
    assert min(result.step_seconds) > 0
    assert (result.logical_tokens, result.computed_tokens) == (96, 64 if engine == "tree" else 96)
    assert result.peak_rss_mb >= result.loaded_rss_mb > 100
    assert ("blocks of 20 tokens" in result.plan) == (engine == "tree")
