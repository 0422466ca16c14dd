"""The machine a benchmark ran on: its processor, its libraries, and the matrix-product rate that engines are measured against."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.steps import Dtype
from loraloop.episode import Frozen

GEMM = (4096, 576, 1536)
"""Rows x inner x columns: the tallest products of SmolLM2-135M's layers on 4,096 tokens."""


class Machine(Frozen):
    """What a reader needs to compare the figures with others."""

    processor: str
    cores: int
    threads: int
    memory_gb: float
    gemm_gflops: float
    """Best of several rounds of torch.mm in `gemm_dtype` on `gemm_shape`."""
    gemm_dtype: Dtype = "bfloat16"
    """What the engines compute in."""
    gemm_shape: tuple[int, int, int]
    versions: dict[str, str]
    load_average: float
    """Of the minute before the benchmark; above 0.5 somebody else was computing."""


def describe_machine(dtype: Dtype = "bfloat16") -> Machine:
    """Measure and look up."""
    import torch

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gemm_gflops=round(measure_gemm(dtype), 1),
        gemm_dtype=dtype,
        gemm_shape=GEMM,
        versions=_versions(),
        load_average=round(load, 2),
    )


def measure_gemm(dtype: Dtype = "bfloat16", max_seconds: float = 3.0, repeats: int = 5) -> float:
    """GFLOP/s of torch.mm, best round, into memory that is there already."""
    import torch

    rows, inner, columns = GEMM
    kind = getattr(torch, dtype)
    left = torch.randn(rows, inner).to(kind)
    right = torch.randn(inner, columns).to(kind)
    out = torch.empty(rows, columns, dtype=kind)
    best = 0.0
    end = time.perf_counter() + max_seconds
    while not best or time.perf_counter() < end:
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(left, right, out=out)
        best = max(best, repeats * 2 * rows * inner * columns / (time.perf_counter() - started))
    return best / 1e9


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return f"{name} ({', '.join(sorted(flags & {'avx2', 'avx512_bf16', 'amx_bf16'})) or 'no bf16'})"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "trl", "accelerate", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
