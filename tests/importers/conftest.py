from __future__ import annotations

from pathlib import Path

import pytest

from loraloop.store.memory import InMemoryEpisodeStore


@pytest.fixture
def fixtures():
    return Path(__file__).resolve().parent.parent / "fixtures"


@pytest.fixture
def store():
    return InMemoryEpisodeStore()


@pytest.fixture
def write(tmp_path):
    """Write bytes or text to a new file and give its path."""

    def to_file(content, name="rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file
