"""Plots for the page, as SVG to stand in it: colours that the colour-blind tell apart, and words in the colour of the page's text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraloop.svg import BLUE, ORANGE, TEXT, new_figure, to_svg

COLOURS = {
    "system": "#cc79a7",
    "user": "#0072b2",
    "tool": "#e69f00",
    "assistant": "#009e73",
    "demonstration": "#56b4e9",
    "other": "#d55e00",
    "template": "#8c8c8c",
}
"""Of each author: the colours of Okabe and Ito."""
MAX_LABEL = 36
"""Characters of a name beside a bar."""


def plot_lengths(lengths: Sequence[int], max_length: int) -> str:
    """How many rows have how many tokens, and where the limit is."""
    figure, axes = new_figure("Tokens of a row", "rows")
    axes.hist(lengths, bins=min(40, max(5, len(set(lengths)))), color=BLUE)
    if max(lengths) > max_length // 2:
        axes.axvline(max_length, color=ORANGE, linewidth=1.5, linestyle="--")
        axes.annotate(f"limit {max_length:,} ", (max_length, axes.get_ylim()[1]), color=ORANGE, va="bottom", ha="right", fontsize=8)
    return to_svg(figure, "lengths")


def plot_shares(shares: Mapping[str, tuple[int, int]], unit: str) -> str:
    """What each author wrote, and within it what is trained."""
    figure, axes = new_figure(unit, "", height=0.5 + 0.4 * len(shares))
    names = list(shares)[::-1]
    sizes, trained = zip(*(shares[name] for name in names), strict=True)
    axes.barh(names, sizes, color=[COLOURS[name] for name in names], alpha=0.35)
    axes.barh(names, trained, color=[COLOURS[name] for name in names], hatch="//", edgecolor=TEXT, linewidth=0)
    return to_svg(figure, "shares")


def plot_counts(counts: Mapping[str, int], name: str) -> str:
    """A bar for each count."""
    figure, axes = new_figure("", "", height=0.5 + 0.4 * len(counts))
    labels = [label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…" for label in counts]
    bars = axes.barh(range(len(labels)), list(counts.values())[::-1], color=BLUE)
    axes.set_yticks(range(len(labels)), labels[::-1])
    axes.bar_label(bars, padding=3, fontsize=8, color=TEXT)
    return to_svg(figure, name)


def plot_weights(weights: Sequence[float]) -> str:
    """How many samples have which weight."""
    figure, axes = new_figure("Weight of a sample", "samples")
    axes.hist(weights, bins=min(40, max(5, len(set(weights)))), color=BLUE)
    return to_svg(figure, "weights")
