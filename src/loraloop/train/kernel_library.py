"""The C kernels as a shared library: compiled once by the system's C compiler into the user's cache, then loaded.

Nothing is fetched and nothing is bundled: without a C compiler, or on another processor than x86-64 with AVX512-BF16, there is no
library, and the reason is given as text. It is not an error: every kernel has its equal in torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loraloop.base_model import cache_directory
from loraloop.files import file_sha256, new_directory

Isa = Literal["amx", "avx512bf16"]

_FOLDER = Path(__file__).parent
_SOURCES = ("attention_forward.c", "attention_backward.c", "rows.c", "ranks.c", "workspace.c")
_HEADERS = ("kernels.h", "tiles.h", "attention.h")
_FLAGS = (
    *("-std=gnu11", "-O3", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=fast"),
    "-Werror=implicit-function-declaration",  # an intrinsic that the compiler lacks would else be missed when it is loaded
    *("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
)
_NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}
_COMPILE_SECONDS = 300


@dataclass(frozen=True)
class Library:
    """The loaded library and the instruction set that its products use."""

    functions: ctypes.CDLL
    isa: Isa


def open_library() -> Library | str:
    """The library, compiled first where it is not in the cache; else the reason why there is none.

    LORALOOP_KERNELS=off refuses it; LORALOOP_ISA=avx512bf16 keeps to that instruction set where AMX is there too. torch must have
    been imported, so that both use one OpenMP.
    """
    if os.environ.get("LORALOOP_KERNELS", "").lower() in {"off", "0", "no"}:
        return "LORALOOP_KERNELS turns them off"
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return f"they are written for Linux on x86-64; this is {sys.platform} on {platform.machine()}"
    flags = _processor_flags()
    if missing := sorted(_NEEDED - flags):
        return f"the processor lacks {', '.join(missing)}"
    try:
        library = _load(_built())
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    wanted = os.environ.get("LORALOOP_ISA", "amx")
    if wanted not in {"amx", "avx512bf16"}:
        return f"LORALOOP_ISA is {wanted!r}; it can be amx or avx512bf16"
    has_amx = {"amx_tile", "amx_bf16"} <= flags and wanted == "amx" and bool(library.allow_amx())
    return Library(functions=library, isa="amx" if has_amx else "avx512bf16")


def _processor_flags() -> set[str]:
    """The features of the first processor of /proc/cpuinfo; empty when it cannot be read."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return set()


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def _built() -> Path:
    """The library's file; its folder's name is the hash of what it is made from, so that a change never meets an old build.

    A file that is not what was built (a full disk, a copy that broke off) would end the process when it is loaded; it is built anew.
    Raises OSError with the compilers' words when none of them can make it.
    """
    digest = hashlib.sha256("\0".join(_FLAGS).encode())
    for name in (*_HEADERS, *_SOURCES):
        digest.update((_FOLDER / name).read_bytes())
    folder = cache_directory() / "kernels" / digest.hexdigest()[:24]
    if folder.is_dir() and not _is_whole(folder):
        with contextlib.suppress(FileNotFoundError):  # another process may have been faster, here and below
            folder.rename(folder.with_name(f"{folder.name}.damaged-{os.getpid()}"))
    if not folder.is_dir():
        with contextlib.suppress(FileExistsError), new_directory(folder) as aside:
            _compile(aside / "kernels.so")
            (aside / "kernels.sha256").write_text(file_sha256(aside / "kernels.so"), encoding="ascii")
    return folder / "kernels.so"


def _is_whole(folder: Path) -> bool:
    """Whether the library in `folder` is the one that was built there."""
    try:
        return (folder / "kernels.sha256").read_text(encoding="ascii") == file_sha256(folder / "kernels.so")
    except OSError:
        return False


def _compile(target: Path) -> None:
    """Try the compilers in turn."""
    found = [path for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name and (path := shutil.which(name))]
    complaints = []
    for compiler in dict.fromkeys(found):
        command = [compiler, *_FLAGS, *(str(_FOLDER / name) for name in _SOURCES), "-o", str(target), "-lm"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
        if ended.returncode == 0:
            return
        complaints.append(f"{compiler}: {(ended.stderr.strip() or f'ended with {ended.returncode}').splitlines()[0]}")
    raise OSError("; ".join(complaints) or "no C compiler is on the PATH (cc, gcc or clang)")
