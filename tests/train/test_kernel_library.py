"""When there are kernels and when there are none: the reason is text, never an error."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from loraloop.train import kernel_library
from loraloop.train.kernels import load_kernels


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORALOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORALOOP_KERNELS", raising=False)
    monkeypatch.delenv("LORALOOP_ISA", raising=False)
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache"


def skip_without_kernels() -> None:
    found, reason = load_kernels()
    if found is None:
        pytest.skip(f"no kernels here: {reason}")


def test_there_are_kernels_where_the_processor_and_a_compiler_are() -> None:
    if not kernel_library._processor_flags() >= kernel_library._NEEDED or shutil.which("cc") is None:
        pytest.skip("the processor lacks AVX512-BF16, or there is no compiler")
    found, reason = load_kernels()
    assert found is not None, reason


def test_they_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setenv("LORALOOP_KERNELS", "off")
    assert load_kernels() == (None, "LORALOOP_KERNELS turns them off")
    assert not own_cache.exists()


def test_they_are_built_once_and_found_without_a_compiler(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    skip_without_kernels()
    [built] = own_cache.rglob("kernels.so")
    made = built.stat().st_mtime_ns
    monkeypatch.setenv("PATH", "/nowhere")
    found, isa = load_kernels()
    assert found is not None
    assert isa in {"amx", "avx512bf16"}
    assert built.stat().st_mtime_ns == made


@pytest.mark.parametrize("damage", [b"", b"not a library"])
def test_a_damaged_library_is_built_anew(own_cache: Path, damage: bytes) -> None:
    """In a process of its own: loading half a library ends it by a signal."""
    skip_without_kernels()
    [built] = own_cache.rglob("kernels.so")
    whole = built.read_bytes()
    for broken in (damage, whole[: len(whole) // 2]):
        built.unlink()
        built.write_bytes(broken)
        code = "import torch; from loraloop.train.kernels import load_kernels; print(load_kernels()[0] is not None)"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr
        assert len(built.read_bytes()) == len(whole)


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    skip_without_kernels()
    monkeypatch.setenv("LORALOOP_CACHE", str(own_cache.with_name("other")))
    monkeypatch.setenv("PATH", "/nowhere")
    found, reason = load_kernels()
    assert found is None
    assert "no C compiler" in reason


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    skip_without_kernels()
    monkeypatch.setenv("LORALOOP_CACHE", str(own_cache.with_name("other")))
    compiler = tmp_path / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho unknown option >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(compiler.parent))
    found, reason = load_kernels()
    assert found is None
    assert "unknown option" in reason
    assert list((own_cache.with_name("other") / "kernels").iterdir()) == []


def test_another_processor_gets_the_names_of_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/cpuinfo")
    monkeypatch.setattr(kernel_library, "_NEEDED", {"fpu", "no_such_feature"})
    found, reason = load_kernels()
    assert found is None
    assert "no_such_feature" in reason


def test_an_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_kernels()
    monkeypatch.setenv("LORALOOP_ISA", "sse")
    assert load_kernels()[0] is None
    assert "'sse'" in load_kernels()[1]


def test_torch_and_the_kernels_share_one_openmp() -> None:
    skip_without_kernels()
    code = (
        "import torch; from loraloop.train.kernels import load_kernels; load_kernels();"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "1"
