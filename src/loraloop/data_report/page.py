"""The findings as one HTML file: everything is in it, nothing is fetched, and nothing in it runs.

Every text is escaped, and the page forbids scripts and all requests by itself, so that what an episode holds stays text.
"""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from loraloop.data_report import plots
from loraloop.data_report.findings import Findings
from loraloop.data_report.shown import shorten

MAX_CHARACTERS = 20_000
"""Of a part that is shown; more is cut in the middle."""


def to_html(findings: Findings) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("loraloop.data_report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["short"] = lambda text: shorten(text, MAX_CHARACTERS)
    return environment.get_template("page.html").render(f=findings, plots=_plots(findings), colours=plots.COLOURS)


def _plots(findings: Findings) -> list[tuple[str, Markup]]:
    """(heading, drawing) of what there is something to draw of."""
    made: list[tuple[str, str]] = []
    if findings.shares:
        unit = "tokens" if findings.data else "characters"
        shares = {share.author: (share.size, share.trained) for share in findings.shares}
        made.append((f"Who wrote the {unit}; what is trained is hatched", plots.plot_shares(shares, unit)))
    if findings.lengths:
        made.append(("Length of the rows", plots.plot_lengths(findings.lengths, findings.max_length)))
    refused = findings.data.refused if findings.data else {}
    if findings.refused_by_build or refused:
        counts = {**findings.refused_by_build, **{f"{name} (rendering)": count for name, count in refused.items()}}
        made.append(("Left out, by reason", plots.plot_counts(counts, "refused")))
    if len(set(findings.weights)) > 1:
        made.append(("Weights of the samples", plots.plot_weights(findings.weights)))
    if len(findings.kinds) > 1:
        made.append(("Kinds of samples", plots.plot_counts(findings.kinds, "kinds")))
    return [(heading, Markup(svg)) for heading, svg in made]  # noqa: S704  matplotlib escapes what it writes
