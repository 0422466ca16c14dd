"""What events and checkpoints cost a training: the same steps with both as they are by default, and without, in turns.

`python -m bench.overhead [--steps 20] [--rounds 2] [--json FILE]` trains SmolLM2-135M on tau-bench episodes (generated ones where the
recordings are not there), each time in a fresh process. Two figures come of it: the difference of the median step times, which the
machine's own unrest goes into, and the share of the time that was spent in writing events and keeping checkpoints, by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.recordings import DEFAULT_DATA, read_samples, write_generated
from bench.train import find_smollm2
from loraloop.files import json_line, write_json

BATCH = ("--batch-size=1", "--grad-accum=1", "--max-seq-length=2048", "--epochs=1000")


def main() -> int:
    """Measure and print one line a round, then the medians."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--worker", choices=("on", "off"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments.worker, arguments.folder, arguments.steps)
        return 0
    figures: dict[str, list[dict[str, float]]] = {"on": [], "off": []}
    with tempfile.TemporaryDirectory(prefix="loraloop-bench-") as name:
        folder = Path(name)
        _write_data(folder)
        for number in range(arguments.rounds):
            for which in ("on", "off") if number % 2 == 0 else ("off", "on"):
                command = [sys.executable, "-m", "bench.overhead", "--worker", which, "--folder", name, "--steps", str(arguments.steps)]
                environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                if done.returncode:
                    sys.stderr.write(done.stderr)
                    return 1
                figures[which].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {number + 1} {which:3}: {figures[which][-1]}", flush=True)
    on, off = (median(one["step_seconds"] for one in figures[which]) for which in ("on", "off"))
    spent = median(one["share"] for one in figures["on"])
    result = {"step_seconds_on": on, "step_seconds_off": off, "difference": on / off - 1, "share_by_the_clock": spent}
    print(f"step {on:.3f} s with, {off:.3f} s without: {on / off - 1:+.2%}; by the clock {spent:.3%} of the time")
    if arguments.json:
        write_json(arguments.json, {**result, "rounds": figures})
    return 0


def _write_data(folder: Path) -> None:
    data = DEFAULT_DATA
    if not data.is_file():
        data = folder / "generated.json"
        write_generated(data)
    samples = [sample.to_line() for _, sample in read_samples(data)[:24]]
    (folder / "train.jsonl").write_text("".join(json_line(line) + "\n" for line in samples), encoding="utf-8")


def _work(which: str, folder: Path, steps: int) -> None:
    """Train `steps` steps; the last line of standard output is what it took."""
    from loraloop.base_model import tune_process

    tune_process()
    from loraloop.train import keeper, progress
    from loraloop.train.arguments import parse_arguments
    from loraloop.train.run import run

    place = Path(tempfile.mkdtemp(dir=folder))
    argv = ["--data", str(folder / "train.jsonl"), "--output", str(place / "out"), "--model", str(find_smollm2()), *BATCH]
    argv += [f"--max-steps={steps}"] + (["--checkpoints", str(place / "checkpoints")] if which == "on" else [])
    spent = _Spent()
    stamps: list[float] = []

    def emit(event: Any) -> None:
        if event.event == "step":
            stamps.append(time.perf_counter())
        if which == "on":
            with spent.clock():
                progress.emit(event)

    for name in ("begin_step", "end_step"):
        setattr(keeper.RunKeeper, name, spent.around(getattr(keeper.RunKeeper, name)))
    run(parse_arguments(argv), emit, keeps_memory=True)
    times = [after - before for before, after in pairwise(stamps)][1:]  # the first are slower: pages, kernels
    print(json.dumps({"step_seconds": round(median(times), 4), "share": round(spent.seconds / (stamps[-1] - stamps[0]), 6)}))


class _Spent:
    """Seconds inside what is clocked; what is clocked inside another is counted once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Counts what happens in the block."""
        self._depth += 1
        started = time.perf_counter()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.seconds += time.perf_counter() - started

    def around(self, function: Any) -> Any:
        """`function`, clocked."""

        def clocked(*arguments: Any) -> Any:
            with self.clock():
                return function(*arguments)

        return clocked


if __name__ == "__main__":
    sys.exit(main())
