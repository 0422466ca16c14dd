"""The curves as pictures: tree-ratio, tree-size and tree-blocks, each as SVG and PNG. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.curve_point import Curve, PointResult

BLUE, ORANGE, GREY = "#27518f", "#c2571a", "#8a8f98"


def draw_all(results: Sequence[PointResult], folder: Path) -> list[Path]:
    """Draw what was measured, and give the SVG files; a picture whose curve is missing is not drawn."""
    import matplotlib as mpl

    mpl.use("Agg")
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "loraloop", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    drawn = []
    with mpl.rc_context(style):
        for name, curve, draw in (
            ("tree-ratio", "ratio", draw_ratio),
            ("tree-size", "size", draw_size),
            ("tree-blocks", "blocks", draw_blocks),
        ):
            if any(result.point.curve == curve for result in results):
                figure = draw(results)
                figure.tight_layout()
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                figure.savefig(folder / f"{name}.png", dpi=120)
                drawn.append(folder / f"{name}.svg")
    return drawn


def draw_ratio(results: Sequence[PointResult]) -> Any:
    """Logical tokens/s against the token ratio: tree, what sharing could give at best, and the dense engine."""
    figure, (axes,) = _panels(1)
    tree = _of(results, "ratio", "tree")
    ratios = [result.ratio for result in tree]
    ideal = [tree[0].logical_tokens_per_s * ratio / ratios[0] for ratio in ratios]
    axes.plot(ratios, ideal, "--", color=GREY, linewidth=1, label="ideal: a shared token costs nothing")
    axes.plot(ratios, [result.logical_tokens_per_s for result in tree], "o-", color=BLUE, label="tree engine")
    for result in _of(results, "ratio", "dense"):
        axes.axhline(result.logical_tokens_per_s, color=ORANGE, label="dense engine, whatever the ratio")
    axes.set_xlabel("token ratio: logical tokens for each computed one")
    axes.set_ylabel("logical tokens/s")
    _from_zero(axes)
    axes.legend(frameon=False)
    return figure


def draw_size(results: Sequence[PointResult]) -> Any:
    """Computed tokens/s against the size of the tree, and peak memory against the number of samples."""
    figure, (speed, memory) = _panels(2)
    size = _of(results, "size", "tree")
    speed.plot([result.computed_tokens for result in size], [result.computed_tokens_per_s for result in size], "o-", color=BLUE)
    _log2(speed, [result.computed_tokens for result in size])
    speed.set_xlabel("computed tokens of a step")
    speed.set_ylabel("computed tokens/s")
    length = size[0].point.length
    pairs: tuple[tuple[Curve, str], ...] = (("size", BLUE), ("samples", ORANGE))
    for curve, color in pairs:
        if points := _of(results, curve, "tree"):
            label = f"{points[0].point.shared:,} of {length:,} tokens shared"
            memory.plot(
                [result.point.n_samples for result in points],
                [result.peak_rss_mb / 1024 for result in points],
                "o-",
                color=color,
                label=label,
            )
    _log2(memory, [1, 2, 4, 8, 16, 32, 64])
    memory.set_xlabel(f"samples of a step, {length:,} tokens each")
    memory.set_ylabel("peak RSS (GiB)")
    memory.legend(frameon=False)
    for axes in (speed, memory):
        _from_zero(axes)
    return figure


def draw_blocks(results: Sequence[PointResult]) -> Any:
    """Computed tokens/s and peak memory of one tree against the rows of a block."""
    figure, (speed, memory) = _panels(2)
    blocks = _of(results, "blocks", "tree")
    rows = [result.point.block_rows or 0 for result in blocks]
    n_tokens = blocks[0].computed_tokens
    speed.plot(rows, [result.computed_tokens_per_s for result in blocks], "o-", color=BLUE)
    speed.set_ylabel("computed tokens/s")
    memory.plot(rows, [result.peak_rss_mb / 1024 for result in blocks], "o-", color=BLUE)
    memory.set_ylabel("peak RSS (GiB)")
    for axes in (speed, memory):
        _log2(axes, rows)
        _from_zero(axes)
        axes.axvline(n_tokens, color=GREY, linestyle="--", linewidth=1)
        axes.annotate("whole tree", (n_tokens, 0), (-4, 4), textcoords="offset points", rotation=90, ha="right", color=GREY)
        axes.set_xlabel(f"rows of a block, tree of {n_tokens:,} tokens")
    return figure


def _of(results: Sequence[PointResult], curve: Curve, engine: str) -> list[PointResult]:
    return [result for result in results if result.point.curve == curve and result.point.engine == engine]


def _panels(n_panels: int) -> tuple[Any, list[Any]]:
    """A figure without pyplot's global state, and its axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 if n_panels == 1 else 8.4, 3.2))
    axes = figure.subplots(1, n_panels, squeeze=False)
    return figure, list(axes[0])


def _log2(axes: Any, ticks: Sequence[int]) -> None:
    """A logarithmic x axis with plain numbers at `ticks`."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()


def _from_zero(axes: Any) -> None:
    """A y axis from 0 to a little above the data."""
    axes.set_ylim(0, 1.08 * axes.dataLim.y1)
