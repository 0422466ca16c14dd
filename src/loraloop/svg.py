"""Plots as SVG elements of a page: nothing is fetched, the same bytes for the same data, words in the colour of the page's text."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

BLUE = "#0072b2"
ORANGE = "#d55e00"
GREEN = "#009e73"
GREY = "#8c8c8c"
"""The colours of Okabe and Ito, which the colour-blind tell apart."""
TEXT = "#123457"
"""Stands for the page's colour of text, which is put in its place."""


def new_figure(x_label: str, y_label: str, height: float = 2.4) -> tuple[Any, Any]:
    """(figure, axes) with the words of the page's own colour; `height` in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=TEXT, fontsize=9)
    axes.set_ylabel(y_label, color=TEXT, fontsize=9)
    axes.tick_params(colors=TEXT, labelsize=8)
    axes.patch.set_alpha(0)
    for name, spine in axes.spines.items():
        spine.set_color(TEXT)
        spine.set_visible(name in {"left", "bottom"})
    return figure, axes


def to_svg(figure: Any, name: str) -> str:
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
    return svg.replace(TEXT, "currentColor")
