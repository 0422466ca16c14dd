"""What this machine has for loraloop, and what of it is in the way."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from loraloop.base_model import cache_directory, choose_device, choose_dtype
from loraloop.episode import Frozen
from loraloop.errors import LoraLoopError
from loraloop.lease import lease_directory, read_holder
from loraloop.project import Project
from loraloop.settings import variable
from loraloop.train.arithmetic import choose_arithmetic
from loraloop.train.memory import free_bytes

SQLITE_WITHOUT_RESET_BUG = (3, 51, 3)
LEAST_DISK_GB = 2
OPTIONAL = {"psycopg": "postgres", "trackio": "trackio", "mlflow-skinny": "mlflow", "tensorboard": "tensorboard"}
"""Packages of extras, and the extras' names."""


class Finding(Frozen):
    """One thing that was looked at."""

    name: str
    value: str
    advice: str = ""
    """What to do, or to know; empty when all is well."""
    is_problem: bool = False
    """Whether something will not work as it is."""


def examine(directory: Path, store_url: str | None = None) -> Iterator[Finding]:
    """What there is, one after the other; the project in `directory` only when there is one."""
    for name in ("loraloop", "torch", "transformers", "peft", "tokenizers", "safetensors", "sqlalchemy"):
        yield Finding(name=name, value=version(name))
    yield Finding(name="python", value=platform.python_version())
    yield from _examine_compute()
    for place in dict.fromkeys((directory if directory.exists() else directory.absolute().parent, cache_directory())):
        yield _examine_disk(place)
    yield _examine_sqlite()
    yield _examine_store(directory, store_url)
    yield _examine_device_lease()
    for package, extra in OPTIONAL.items():
        yield _examine_optional(package, extra)


def _examine_compute() -> Iterator[Finding]:
    import torch

    device = choose_device()
    dtype = choose_dtype("auto", device)
    yield Finding(name="device", value=f"{device}, computes in {dtype}, {torch.get_num_threads()} threads")
    if device == "cpu":
        arithmetic, why_not = choose_arithmetic(getattr(torch, dtype))
        yield Finding(name="kernels", value=arithmetic.name, advice=f"torch does their work: {why_not}" if why_not else "")
    free = free_bytes()
    if free is not None:
        yield Finding(name="memory", value=f"{free >> 20:,} MB free")


def _examine_disk(folder: Path) -> Finding:
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    short = free < LEAST_DISK_GB << 30
    return Finding(name=f"disk of {folder}", value=f"{free >> 20:,} MB free", advice="make room" if short else "", is_problem=short)


def _examine_sqlite() -> Finding:
    """Versions before 3.51.3 may damage a file when two connections write its log back at one instant."""
    found = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info >= SQLITE_WITHOUT_RESET_BUG:
        return Finding(name="sqlite", value=found)
    return Finding(
        name="sqlite",
        value=found,
        advice="before 3.51.3 two programs that write back its log at once may damage a file; loraloop lets one writer do that at a time: "
        "open episodes.db with other programs for reading only while it runs",
    )


def _examine_store(directory: Path, store_url: str | None) -> Finding:
    where = store_url or os.environ.get(variable("store", "url")) or str(directory)
    try:
        with Project(directory, create=False, store_url=store_url) as project:
            return Finding(name="store", value=f"{project.store.where}: {project.store.count():,} episodes")
    except LoraLoopError as error:
        is_new = not directory.exists()
        return Finding(name="store", value=f"none yet: {where}" if is_new else where, advice=str(error), is_problem=not is_new)


def _examine_device_lease() -> Finding:
    holder = read_holder(lease_directory() / f"{choose_device()}.json")
    if holder is None or not holder.is_alive:
        return Finding(name="training now", value="none")
    return Finding(name="training now", value=holder.describe(), advice="another waits for it by `train --wait`")


def _examine_optional(package: str, extra: str) -> Finding:
    try:
        return Finding(name=package, value=version(package))
    except PackageNotFoundError:
        return Finding(name=package, value="not installed", advice=f"if you want it: pip install 'loraloop[{extra}]'")
