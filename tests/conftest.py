"""Fixtures for all tests."""

from __future__ import annotations

import functools
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import make_model

os.environ["LORALOOP_LEASES"] = tempfile.mkdtemp(prefix="loraloop-leases-")  # a training beside the tests is none of theirs

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell, which the processes of tests would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real recordings beside the repository; it is never part of it, so tests skip where it is absent."""
    path = REPO.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real recordings at {path}")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model, made once: `tiny_model("llama")`; see tiny.make_model for the architectures."""

    @functools.cache
    def make(architecture: str) -> Path:
        return make_model(architecture, tmp_path_factory.mktemp("models") / f"tiny-{architecture}")

    return make
