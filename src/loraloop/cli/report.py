"""The report on a dataset in the terminal: tables, and samples with who wrote each part and what it weighs, with or without colour."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from loraloop.chat.length import LONG_POLICIES
from loraloop.cli.screen import err, show_table
from loraloop.data_report.visible import visible
from loraloop.errors import SettingsError

if TYPE_CHECKING:
    from rich.console import Console

    from loraloop.data_report.findings import Findings
    from loraloop.data_report.shown import Part, ShownSample

DEFAULT_SHOWN = 3
"""Samples in the page where nothing is said."""
MAX_CHARACTERS = 800
"""Of a part that is shown; more is cut in the middle. The page shows more."""
STYLES = {
    "system": "magenta",
    "user": "blue",
    "tool": "yellow",
    "assistant": "green",
    "demonstration": "cyan",
    "other": "red",
    "template": "bright_black",
}


@dataclass(frozen=True)
class Report:
    """A report that was made."""

    findings: Findings
    page: Path

    def show(self, *, console: Console | None, n_samples: int) -> None:
        """All of it, on standard output unless told otherwise; exits with 1 when a training would stop on this data."""
        from rich.console import Console

        show_findings(self.findings, console)
        if n_samples:
            wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
            show_samples(self.findings, console or Console(highlight=False, width=wide))
        err().print(f"the report is in {self.page}", markup=False)
        if self.findings.failure is not None:
            err().print(f"Error: a training would stop on this data: {visible(self.findings.failure)}", markup=False)
            raise typer.Exit(1)


def check_report_options(show: int | None, max_seq_length: int, long: str, html: Path | None = None) -> None:
    """Raises SettingsError for values out of their range, before anything is built."""
    if show is not None and show < 0:
        raise SettingsError(f"--show {show}: expected 0 or more")
    if max_seq_length < 16:
        raise SettingsError(f"--max-seq-length {max_seq_length}: expected at least 16")
    if long not in LONG_POLICIES:
        raise SettingsError(f"--long {long}: expected {', '.join(LONG_POLICIES)}")
    if html is not None and html.is_dir():
        raise SettingsError(f"--html {html}: is a directory; expected the name of a file, such as {html / 'report.html'}")


def make_report(project: Path, dataset: str, base: str | None, html: Path | None, *, options: tuple[int | None, int, str]) -> Report:
    """Make the report of a dataset and write its page; `options` are how many samples to show, tokens of a row, what is longer."""
    from loraloop.data_report.findings import ReportOptions
    from loraloop.project import Project

    show, max_length, long = options
    looked_at = ReportOptions(max_length, long, n_show=DEFAULT_SHOWN if show is None else show)  # type: ignore[arg-type]  # checked before
    with Project(project, create=False) as opened, err().status("looking at the data") as status:
        findings, page = opened.report(dataset, base, looked_at, path=html, say=status.update)
    return Report(findings, page)


def show_findings(findings: Findings, console: Console | None = None) -> None:
    """The tables, on standard output unless told otherwise."""
    unit = "tokens" if findings.data else "characters"
    if findings.shares:
        rows = [
            [share.author, f"{share.size:,}", f"{share.trained:,}", f"{share.trained / share.size:.1%}" if share.size else "-"]
            for share in findings.shares
        ]
        show_table("Who wrote what, and what is trained", ["author", unit, "trained", "share of the author's"], rows, console=console)
    checks = _checks(findings)
    if checks:
        show_table(f"Rendered for {findings.base}", ["check", "found"], checks, console=console)
    drift = _drift(findings)
    if drift:
        show_table("Between the recording and the training", ["what differs", "how often"], drift, console=console)
    # two accounts, which may know the same reason: of episodes, and of what was made of them
    rows = [["build", reason, str(count), ""] for reason, count in sorted(findings.refused_by_build.items())]
    rendered = findings.data.refused if findings.data else {}
    rows += [["rendering", reason, str(count), (findings.refusals.get(reason) or ("",))[0]] for reason, count in sorted(rendered.items())]
    if rows:
        show_table("Left out", ["by", "reason", "count", "for example"], rows, console=console)
    if findings.base is None:
        show_table(
            "", ["not known without --base"], [["tokens, stop tokens, tools, what the chat template changes, lengths"]], console=console
        )


def show_samples(findings: Findings, console: Console) -> None:
    """Each sample that was chosen to be shown, whole."""
    for sample in findings.shown:
        _show_sample(sample, console)


def _checks(findings: Findings) -> list[list[str]]:
    data, facts = findings.data, findings.template
    if data is None or facts is None:
        return []
    broken = "rendered as before"
    if data.prefix_broken:
        broken = f"changed by the template: {data.prefix_broken} samples are {data.prefix_broken_rows} rows, one for each call"
    stop = {True: "yes", False: "NO", None: "no turn is trained"}[facts.stop_is_trained]
    return [
        ["rows", f"{data.rows}, of {data.samples_used} samples (of {data.samples}), at most {findings.max_length} tokens each"],
        ["stop token trained", f"{stop} ({data.stops_trained} of {data.turns} agent turns)"],
        ["tools in the prompt", f"{data.tools_rendered} of {data.tools_recorded}, by the {facts.tools_by}"],
        ["tool calls", f"{data.calls_rendered} of {data.calls_recorded}, by the {facts.calls_by}"],
        ["tool results", f"by the {facts.results_by}"],
        [f"too long ({findings.long})", f"{data.windowed} samples in windows, {data.elided} cut by {data.characters_elided:,} characters"],
        ["earlier turns later on", broken],
    ]


def _drift(findings: Findings) -> list[list[str]]:
    drift, facts = findings.drift, findings.template
    if drift is None or facts is None:
        return []
    told = [
        ["prompts as they were sent", "not recorded, so not compared"],
        ["tool calls, but no tool schemas recorded: prompts show no tools", f"{drift.tools_not_recorded} samples"]
        if drift.tools_not_recorded
        else [],
        [f"no system turn, so the template says: {facts.own_words}", f"{drift.template_speaks} samples"] if drift.template_speaks else [],
        ["words trimmed, or a thought left out", f"{drift.turns_reworded} trained turns"] if drift.turns_reworded else [],
        ["tools in the system turn", f"{drift.tools_in_system_turn} samples"] if drift.tools_in_system_turn else [],
        ["tool calls as text", f"{drift.calls_as_text} samples"] if drift.calls_as_text else [],
        ["tool results as user turns", f"{drift.results_as_user} samples"] if drift.results_as_user else [],
        ["the template may write the day's date", "rows differ from day to day"] if facts.is_dated else [],
    ]
    return [line for line in told if line]


def _show_sample(sample: ShownSample, console: Console) -> None:
    weight = f", weight {sample.weight:g}" if sample.weight != 1 else ""
    console.print()
    console.print(f"Sample {sample.number}{weight}, from {' and '.join(sample.episodes) or 'no episode'}", markup=False, style="bold")
    for row in sample.rows:
        counts = "" if row.n_tokens is None else f"{row.n_trained} of {row.n_tokens} tokens trained"
        told = ", ".join(part for part in (row.side, counts, row.note) if part)
        if told:
            console.print(told, markup=False)
        for part in row.parts:
            _show_part(part, console)


def _show_part(part: Part, console: Console) -> None:
    """`author w weight ┃ text` where it is trained, `author │ text` where not; ↵ is a line end that belongs to the part."""
    from rich.text import Text

    from loraloop.data_report.shown import shorten

    style = STYLES[part.author] + (" bold" if part.weight else "") + (" dim" if part.is_shared else "")
    weight = f"w {part.weight:g}" if part.weight else "shared" if part.is_shared else ""
    bar = "┃" if part.weight else "│"
    *ended, last = shorten(part.text, MAX_CHARACTERS).split("\n")
    for number, line in enumerate([*(f"{line}↵" for line in ended), *([last] if last else [])]):
        head = f"{part.author if not number else '':<13} {weight if not number else '':>7} {bar} "
        console.print(Text(head).append(line, style=style), soft_wrap=True)
