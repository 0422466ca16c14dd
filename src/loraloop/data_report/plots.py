"""Plots for the page, as SVG to stand in it: colours that the colour-blind tell apart, and words in the colour of the page's text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

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
_BAR = "#0072b2"
_MARK = "#d55e00"
_TEXT = "#123457"
"""Stands for the page's colour of text, which is put in its place."""


def plot_lengths(lengths: Sequence[int], max_length: int) -> str:
    """How many rows have how many tokens, and where the limit is."""
    figure, axes = _new("Tokens of a row", "rows")
    axes.hist(lengths, bins=min(40, max(5, len(set(lengths)))), color=_BAR)
    if max(lengths) > max_length // 2:
        axes.axvline(max_length, color=_MARK, linewidth=1.5, linestyle="--")
        axes.annotate(f"limit {max_length:,} ", (max_length, axes.get_ylim()[1]), color=_MARK, va="bottom", ha="right", fontsize=8)
    return _to_svg(figure, "lengths")


def plot_shares(shares: Mapping[str, tuple[int, int]], unit: str) -> str:
    """What each author wrote, and within it what is trained."""
    figure, axes = _new(unit, "", height=0.5 + 0.4 * len(shares))
    names = list(shares)[::-1]
    sizes, trained = zip(*(shares[name] for name in names), strict=True)
    axes.barh(names, sizes, color=[COLOURS[name] for name in names], alpha=0.35)
    axes.barh(names, trained, color=[COLOURS[name] for name in names], hatch="//", edgecolor=_TEXT, linewidth=0)
    return _to_svg(figure, "shares")


def plot_counts(counts: Mapping[str, int], name: str) -> str:
    """A bar for each count."""
    figure, axes = _new("", "", height=0.5 + 0.4 * len(counts))
    labels = [label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…" for label in counts]
    bars = axes.barh(range(len(labels)), list(counts.values())[::-1], color=_BAR)
    axes.set_yticks(range(len(labels)), labels[::-1])
    axes.bar_label(bars, padding=3, fontsize=8, color=_TEXT)
    return _to_svg(figure, name)


def plot_weights(weights: Sequence[float]) -> str:
    """How many samples have which weight."""
    figure, axes = _new("Weight of a sample", "samples")
    axes.hist(weights, bins=min(40, max(5, len(set(weights)))), color=_BAR)
    return _to_svg(figure, "weights")


def _new(x_label: str, y_label: str, height: float = 2.4) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=_TEXT, fontsize=9)
    axes.set_ylabel(y_label, color=_TEXT, fontsize=9)
    axes.tick_params(colors=_TEXT, labelsize=8)
    axes.patch.set_alpha(0)
    for name, spine in axes.spines.items():
        spine.set_color(_TEXT)
        spine.set_visible(name in {"left", "bottom"})
    return figure, axes


def _to_svg(figure: Any, name: str) -> str:
    """The figure as an element of a page: no reference outside, the same bytes for the same data."""
    import matplotlib as mpl

    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)  # a reason code of a plug-in may hold a $
    out = StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "hatch.linewidth": 0.6}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", svg)  # within a page they mean nothing
    svg = re.sub(r"\b(id=\"|url\(#|xlink:href=\"#|href=\"#)", rf"\g<1>{name}-", svg).replace("xlink:href", "href")
    return svg.replace(_TEXT, "currentColor")
