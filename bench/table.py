"""From what single processes measured to the table: medians and ranges by shape and engine, after a check that all did the same work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.counts import count_separate, count_shared
from bench.machine import Machine
from bench.steps import SHARING, Dtype, EngineResult
from bench.workload import Workload
from loraloop.episode import Frozen

BASELINE = "trl-tuned"
TOLERANCE = {"bfloat16": 0.02, "float32": 1e-3}
"""Relative difference of first losses and of gradient norms that rounding explains."""
PAIRS_TOLERANCE = {"bfloat16": 0.05, "float32": 1e-3}
"""The same of a loss of pairs, which follows from differences of log-probabilities summed over a thousand tokens a side: some tenths of
a nat apart by bfloat16's rounding, of which beta / 2 arrives in a loss near ln 2 (docs/lab-book.md)."""

Range = tuple[float, float]


class ResultRow(Frozen):
    """One engine on one shape: medians over the rounds, and (least, most)."""

    shape: str
    engine: str
    logical_tokens_per_s: float
    computed_tokens_per_s: float
    token_ratio: float
    peak_rss_mb: float
    gemm_share: float
    """Useful FLOP/s, after `flops_rule`, as a share of the machine's own matrix-product rate; a forward
    pass that a step of pairs takes a second time counts as none."""
    first_loss: float
    logical_tokens_per_s_range: Range
    peak_rss_mb_range: Range
    speedup: float | None
    """Logical tokens/s against trl-tuned on the same shape, where that was run."""
    memory: float | None
    """Peak RSS against it."""
    gradient_norm: float
    gradient_distance: float | None
    """Relative distance of the first step's adapter gradient from the baseline's, or from the first engine's."""
    step_seconds: float
    losses: list[float]
    """Of the timed steps of the first round, all over `timed_rows` rows."""
    timed_rows: int
    timed_tokens: int
    """Logical tokens of a timed step."""
    rounds: int
    steps: int
    """Timed, over all rounds."""
    batch_size: int
    autocast: bool
    dtype: Dtype
    tuned_allocator: bool
    reference_seconds: float | None
    """Pairs: what the base model's log-probabilities of the timed rows took, once and not within a step; None where each step
    computes them."""
    startup_seconds: float


class StepSize(Frozen):
    """What one step of a shape held."""

    source: str
    max_length: int
    episodes: int
    rows: int
    check_rows: int
    """Of them, those that every engine's first step is over, and that engines without sharing are timed on."""
    check_tokens: int
    longest_row: int
    logical_tokens: int
    supervised_tokens: int
    distinct_prefixes: int
    left_out: dict[str, int]


class Report(Frozen):
    """The benchmark's JSON."""

    rows: list[ResultRow]
    machine: Machine
    workloads: dict[str, StepSize]
    flops_rule: str


class Disagreement(Exception):
    """Two engines did not do the same work; the message has the figures."""


def check_agreement(shape: str, results: Sequence[EngineResult]) -> None:
    """Raises Disagreement when first losses or gradient norms differ by more than the coarser precision of the two explains."""
    first = results[0]
    for other in results[1:]:
        rounds = any(result.autocast or result.dtype == "bfloat16" for result in (first, other))
        tolerance = (PAIRS_TOLERANCE if shape == "pairs" else TOLERANCE)["bfloat16" if rounds else "float32"]
        for what, one, two in (
            ("first loss", first.first_loss, other.first_loss),
            ("norm of the adapter's gradient", first.gradient_norm, other.gradient_norm),
        ):
            if not abs(one - two) <= tolerance * abs(one):  # a NaN disagrees too
                raise Disagreement(
                    f"{shape}: the {what} is {one:.6g} in {first.engine} and {two:.6g} in {other.engine}, which differ by more than "
                    f"{tolerance:.1%}: they did not do the same work, so their speeds are not compared"
                )


def make_rows(workload: Workload, results: Sequence[EngineResult], gradients: dict[str, Path], gemm_gflops: float) -> list[ResultRow]:
    """One row for each engine of one shape, in the order they appear. Raises Disagreement."""
    check_agreement(workload.shape, results)
    engines = list(dict.fromkeys(result.engine for result in results))
    reference = BASELINE if BASELINE in engines else engines[0]
    by_engine = {engine: [result for result in results if result.engine == engine] for engine in engines}
    token_ratio = count_shared(workload.rows).token_ratio
    baseline = by_engine.get(BASELINE)
    return [
        _row(
            workload,
            by_engine[engine],
            {
                "token_ratio": token_ratio,
                "gemm_gflops": gemm_gflops,
                "baseline": baseline,
                "distance": _distance(gradients.get(engine), gradients.get(reference)) if engine != reference else None,
            },
        )
        for engine in engines
    ]


def _row(workload: Workload, results: Sequence[EngineResult], around: dict[str, Any]) -> ResultRow:
    shares = results[0].engine in SHARING
    timed = workload.timed_rows(shares=shares)
    counts = count_shared(timed) if shares else count_separate(timed)
    speeds = [result.tokens_per_s for result in results]
    peaks = [result.peak_rss_mb for result in results]
    speed, peak = median(speeds), median(peaks)
    flops = results[0].model_shape.useful_flops(counts)
    seconds = counts.logical_tokens / speed
    baseline = around["baseline"]
    return ResultRow(
        shape=workload.shape,
        engine=results[0].engine,
        logical_tokens_per_s=round(speed, 1),
        computed_tokens_per_s=round(counts.computed_tokens / seconds, 1),
        token_ratio=round(around["token_ratio"], 3),
        peak_rss_mb=round(peak, 1),
        gemm_share=round(flops / seconds / 1e9 / around["gemm_gflops"], 4),
        first_loss=results[0].first_loss,
        logical_tokens_per_s_range=(round(min(speeds), 1), round(max(speeds), 1)),
        peak_rss_mb_range=(round(min(peaks), 1), round(max(peaks), 1)),
        speedup=round(speed / median(result.tokens_per_s for result in baseline), 3) if baseline else None,
        memory=round(peak / median(result.peak_rss_mb for result in baseline), 3) if baseline else None,
        gradient_norm=results[0].gradient_norm,
        gradient_distance=around["distance"],
        step_seconds=round(seconds, 3),
        losses=[round(loss, 6) for loss in results[0].losses],
        timed_rows=len(timed),
        timed_tokens=counts.logical_tokens,
        rounds=len(results),
        steps=sum(len(result.step_seconds) for result in results),
        batch_size=results[0].batch_size,
        autocast=results[0].autocast,
        dtype=results[0].dtype,
        tuned_allocator=results[0].tuned_allocator,
        reference_seconds=_median_of(result.reference_seconds for result in results),
        startup_seconds=round(median(result.startup_seconds for result in results), 2),
    )


def _median_of(values: Iterable[float | None]) -> float | None:
    """The median of what was measured, or None."""
    known = [value for value in values if value is not None]
    return round(median(known), 3) if known else None


def describe_step(workload: Workload) -> StepSize:
    """The counts a reader needs to judge a row by."""
    return StepSize(
        source=workload.source,
        max_length=workload.max_length,
        episodes=workload.n_episodes,
        rows=len(workload.rows),
        check_rows=len(workload.check),
        check_tokens=sum(len(row.ids) for row in workload.check_rows),
        longest_row=max(len(row.ids) for row in workload.rows),
        logical_tokens=workload.n_tokens,
        supervised_tokens=sum(weight > 0 for row in workload.rows for weight in row.weights),
        distinct_prefixes=count_shared(workload.rows).computed_tokens,
        left_out=workload.left_out,
    )


def show(report: Report, echo: Callable[[Any], None]) -> None:
    """The table, and the losses side by side."""
    from rich.table import Table

    for shape in dict.fromkeys(row.shape for row in report.rows):
        size = report.workloads[shape]
        rows = [row for row in report.rows if row.shape == shape]
        left_out = ", ".join(f"{count} {reason}" for reason, count in size.left_out.items()) or "nothing"
        title = (
            f"{shape}: {size.rows} rows of at most {size.longest_row:,} tokens from {size.episodes} episodes, {size.logical_tokens:,} "
            f"logical tokens a step, token ratio {rows[0].token_ratio:.2f}; left out: {left_out}"
        )
        table = Table(title=title, title_justify="left", title_style="bold")
        headings = (
            "engine",
            "rounds",
            "logical tokens/s",
            "x trl-tuned",
            "computed tokens/s",
            "peak RSS MB",
            "x trl-tuned",
            "GEMM share",
            "first loss",
        )
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "engine" else "right")
        for row in rows:
            table.add_row(
                row.engine,
                str(row.rounds),
                f"{row.logical_tokens_per_s:,.0f} ({row.logical_tokens_per_s_range[0]:,.0f}-{row.logical_tokens_per_s_range[1]:,.0f})",
                "" if row.speedup is None else f"{row.speedup:.2f}",
                f"{row.computed_tokens_per_s:,.0f}",
                f"{row.peak_rss_mb:,.0f}",
                "" if row.memory is None else f"{row.memory:.2f}",
                f"{row.gemm_share:.0%}",
                f"{row.first_loss:.4f}",
            )
        echo(table)
        echo("loss of each timed step: " + " · ".join(f"{row.engine} {' '.join(f'{x:.4f}' for x in row.losses[:6])}" for row in rows))
        if references := [row for row in rows if row.reference_seconds is not None]:
            words = (f"{row.engine} {row.reference_seconds:.1f} s for {row.timed_tokens:,} tokens" for row in references)
            echo("the reference, once before training and not in a step's time: " + " · ".join(words))
    machine = report.machine
    rate = f"{machine.gemm_dtype} GEMM {machine.gemm_gflops:,.0f} GFLOP/s"
    echo(f"{machine.processor}, {machine.threads} threads, {rate}, load {machine.load_average}")


def _distance(path: Path | None, reference: Path | None) -> float | None:
    """|g - reference| / |reference| over all parameters of two saved gradients."""
    if path is None or reference is None:
        return None
    import safetensors.torch

    one, two = safetensors.torch.load_file(path), safetensors.torch.load_file(reference)
    apart = sum(float(((one[name] - two[name]) ** 2).sum()) for name in two)
    return round((apart / sum(float((value**2).sum()) for value in two.values())) ** 0.5, 6)
