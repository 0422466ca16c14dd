"""`python -m bench.ingest`: what it costs to take episodes into the store, and to have them there.

Every stage is a process of its own, so that its memory is its own. Beside it, where `datasets` is installed, the same file by
`load_dataset("json")`, which keeps it as an Arrow table and neither checks nor deduplicates anything.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import quantiles
from typing import Any

BATCH_ENTRIES = 200
"""As `loraloop ingest` stores them."""
N_GETS = 300
N_COUNTS = 20


def main() -> None:
    """Generate, store, read, and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=2_000, metavar="N")
    parser.add_argument("--data", type=Path, help="a tau-bench results file to make them of")
    parser.add_argument("--store", metavar="URL", help="an empty store elsewhere, such as postgresql+psycopg://…")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help="where to put the files; a directory that is removed again without")
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(STAGES[options.stage](options.directory, options.store)))
        return
    if options.directory:
        options.directory.mkdir(parents=True, exist_ok=True)
        results = run(options.episodes, options.directory, options.data, options.store)
    else:
        with tempfile.TemporaryDirectory() as directory:
            results = run(options.episodes, Path(directory), options.data, options.store)
    print(json.dumps(results, indent=2) if options.json else to_table(results))


def run(n_episodes: int, directory: Path, data: Path | None = None, store: str | None = None) -> dict[str, Any]:
    """What every stage measured."""
    from bench.ingest_workload import write_episodes

    written = write_episodes(directory / "episodes.jsonl", n_episodes, **({"data": data} if data else {}))
    results: dict[str, Any] = {"episodes": n_episodes, "raw_bytes": written, "load_average": round(os.getloadavg()[0], 2)}
    for stage in STAGES:
        if stage == "arrow" and find_spec("datasets") is None:
            continue
        command = [sys.executable, "-m", "bench.ingest", "--stage", stage, "--directory", str(directory)]
        done = subprocess.run(command + (["--store", store] if store else []), stdout=subprocess.PIPE, check=True, text=True)
        results[stage] = json.loads(done.stdout)
    return results


def measure_store(directory: Path, url: str | None) -> dict[str, Any]:
    """Read the file and store it as `ingest` does; the time of both, and of the storing alone."""
    from loraloop.episode import Episode
    from loraloop.importers.openai_chat import OpenAIChatImporter
    from loraloop.store.sql import SqlEpisodeStore

    path, stored, storing, storing_cpu, early = directory / "episodes.jsonl", 0, 0.0, 0.0, 0
    started, cpu = time.perf_counter(), time.process_time()
    with SqlEpisodeStore(url or directory / "episodes.db") as store:
        entries = OpenAIChatImporter().read(path)
        while batch := list(islice(entries, BATCH_ENTRIES)):
            episodes = [_judged(entry, number) for number, entry in enumerate(batch) if isinstance(entry, Episode)]
            began, cpu_began = time.perf_counter(), time.process_time()
            stored += sum(store.append_many(episodes))
            storing, storing_cpu = storing + time.perf_counter() - began, storing_cpu + time.process_time() - cpu_began
            early = early or (_peak_bytes() if stored >= 1_000 else 0)
        began = time.perf_counter()
    storing += time.perf_counter() - began  # the log is written back when the store is closed
    seconds, raw = time.perf_counter() - started, path.stat().st_size
    return {
        "stored": stored,
        "episodes_per_s": stored / seconds,
        "mb_per_s_read_and_stored": raw / seconds / 1e6,
        "mb_per_cpu_second_read_and_stored": raw / (time.process_time() - cpu) / 1e6,
        "mb_per_s_stored": raw / storing / 1e6,
        "mb_per_cpu_second_stored": raw / storing_cpu / 1e6,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": seconds,
        "bytes_on_disk": None if url else (directory / "episodes.db").stat().st_size,
        "rss_bytes_after_1000": early or None,
        "rss_bytes": _peak_bytes(),
    }


def measure_reads(directory: Path, url: str | None) -> dict[str, Any]:
    """`get` of episodes drawn at random, and counts by a filter."""
    from loraloop.episode import EpisodeFilter
    from loraloop.store.sql import SqlEpisodeStore

    with SqlEpisodeStore(url or directory / "episodes.db") as store:
        n_episodes = store.count()
        draw = random.Random(0)
        offsets = sorted(draw.randrange(n_episodes) for _ in range(N_GETS // 10))
        ids = [dto.id for offset in offsets for dto in store.list_meta(EpisodeFilter(offset=offset, limit=10))]
        draw.shuffle(ids)
        gets = [_seconds(lambda i=i: store.get(i)) for i in ids]  # type: ignore[misc]
        counts = [_seconds(lambda: store.count(EpisodeFilter(outcome="success"))) for _ in range(N_COUNTS)]
        by_task = [_seconds(lambda: store.count(EpisodeFilter(task_id="task-7"))) for _ in range(N_COUNTS)]
        return {
            "get_ms": _middle_and_worst(gets),
            "count_by_outcome_ms": _middle_and_worst(counts),
            "count_by_task_ms": _middle_and_worst(by_task),
            "rss_bytes": _peak_bytes(),
        }


def measure_zstd(directory: Path, _url: str | None) -> dict[str, Any]:
    """The file itself by zstd, level 3, as the smallest that could be expected of one that is not looked into."""
    import zstandard

    path = directory / "episodes.jsonl"
    started = time.perf_counter()
    with path.open("rb") as source, path.with_suffix(".zst").open("wb") as target:
        _, written = zstandard.ZstdCompressor(level=3).copy_stream(source, target)
    return {"bytes_on_disk": written, "mb_per_s": path.stat().st_size / (time.perf_counter() - started) / 1e6}


def measure_arrow(directory: Path, _url: str | None) -> dict[str, Any]:
    """The same file by `load_dataset`, until its Arrow files are written."""
    from datasets import load_dataset

    path, cache = directory / "episodes.jsonl", directory / "arrow"
    started = time.perf_counter()
    table = load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    seconds = time.perf_counter() - started
    rows = [random.Random(0).randrange(len(table)) for _ in range(N_GETS)]
    return {
        "rows": len(table),
        "episodes_per_s": len(table) / seconds,
        "mb_per_s_read_and_stored": path.stat().st_size / seconds / 1e6,
        "bytes_on_disk": sum(file.stat().st_size for file in cache.rglob("*.arrow")),
        "rss_bytes": _peak_bytes(),
        "get_ms": _middle_and_worst([_seconds(lambda row=row: table[row]) for row in rows]),  # type: ignore[misc]
    }


STAGES = {"store": measure_store, "reads": measure_reads, "zstd": measure_zstd, "arrow": measure_arrow}


def to_table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    raw, store, reads, arrow = results["raw_bytes"], results["store"], results["reads"], results.get("arrow", {})
    share = lambda size: "" if size is None else f"{size / raw:.3f}"  # noqa: E731
    rows = [
        ("episodes/s", f"{store['episodes_per_s']:.0f}", f"{arrow.get('episodes_per_s', 0):.0f}"),
        ("MB/s of JSONL, read and stored", f"{store['mb_per_s_read_and_stored']:.1f}", f"{arrow.get('mb_per_s_read_and_stored', 0):.1f}"),
        ("the same for each second of the processor", f"{store['mb_per_cpu_second_read_and_stored']:.1f}", ""),
        ("MB/s of JSONL, storing alone", f"{store['mb_per_s_stored']:.1f}", ""),
        ("the same for each second of the processor", f"{store['mb_per_cpu_second_stored']:.1f}", ""),
        ("bytes on disk, of raw", share(store["bytes_on_disk"]), share(arrow.get("bytes_on_disk"))),
        ("bytes of the file by zstd, of raw", share(results["zstd"]["bytes_on_disk"]), ""),
        ("memory, MB", f"{store['rss_bytes'] / 1e6:.0f}", f"{arrow.get('rss_bytes', 0) / 1e6:.0f}"),
        ("memory after 1,000 episodes, MB", f"{(store['rss_bytes_after_1000'] or 0) / 1e6:.0f}", ""),
        ("get, ms: median, 99 %", _shown(reads["get_ms"]), _shown(arrow.get("get_ms"))),
        ("count by outcome, ms: median, 99 %", _shown(reads["count_by_outcome_ms"]), ""),
        ("count by task, ms: median, 99 %", _shown(reads["count_by_task_ms"]), ""),
    ]
    head = f"{results['episodes']} episodes, {raw / 1e6:.0f} MB of JSONL, load {results['load_average']}"
    lines = [f"| {name} | {ours} | {theirs if arrow else 'not installed'} |" for name, ours, theirs in rows]
    return "\n".join([head, "", "| | loraloop | datasets, Arrow |", "|---|---|---|", *lines])


def _judged(episode: Any, number: int) -> Any:
    """Two of three failed: the file's format has no verdicts, and a count by outcome should count some."""
    from loraloop.episode import Failure

    return episode.model_copy(update={"outcome": Failure("bench")}) if number % 3 else episode


def _shown(pair: list[float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.2f}, {pair[1]:.2f}"


def _middle_and_worst(seconds: list[float]) -> list[float]:
    """Median and 99th percentile, in ms."""
    cuts = quantiles(seconds, n=100, method="inclusive")
    return [round(cuts[49] * 1000, 3), round(cuts[98] * 1000, 3)]


def _seconds(act: Any) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
