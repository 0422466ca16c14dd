"""A store in a directory that nothing can be written to can be read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from loraloop.store.sql import SqlEpisodeStore
from loraloop.testing import make_episode

SCRIPT = """
import os, sys, tempfile
from loraloop.errors import StoreError
from loraloop.store.sql import SqlEpisodeStore
from loraloop.testing import make_episode
if os.getuid() == 0:  # whom no permissions bind
    with tempfile.TemporaryDirectory() as name, SqlEpisodeStore(name + "/episodes.db") as store:  # so that all is imported
        store.append(make_episode())
        list(store.iter_episodes())
    os.setuid(65534)
try:
    with SqlEpisodeStore(sys.argv[1]) as store:
        print(store.count(), len(store.list_meta()), len(list(store.iter_episodes())))
        store.append(make_episode())
except StoreError as error:
    print(error)
"""


@pytest.fixture
def directory():
    """Where another user gets to, too."""
    name = tempfile.mkdtemp()
    yield Path(name)
    shutil.rmtree(name)


@contextmanager
def read_only(directory):
    os.chmod(directory, 0o555)
    try:
        yield
    finally:
        os.chmod(directory, 0o755)


def read(path):
    return subprocess.run([sys.executable, "-c", SCRIPT, path], capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()


@pytest.mark.parametrize("name", ["episodes.db", "a ?%#&ü.db"])
def test_it_is_read_and_writing_says_what_to_do(directory, name):
    path = directory / name
    with SqlEpisodeStore(path) as store:
        store.append_many([make_episode(), make_episode()])
    with read_only(directory):
        counts, error = read(path)
        assert sorted(directory.iterdir()) == [path]
    assert counts == "2 2 2"
    assert error.startswith(f"{path}: it cannot be written to; make the file and its directory writable")


def test_what_a_writer_has_in_its_log_is_read(directory):
    path = directory / "episodes.db"
    with SqlEpisodeStore(path) as store:
        store.append(make_episode())
        with read_only(directory):
            assert read(path)[0] == "1 1 1"
            store.append(make_episode())
            assert read(path)[0] == "2 2 2"


def test_one_of_an_older_schema_is_not_brought_up_to_date(directory):
    path = directory / "episodes.db"
    SqlEpisodeStore(path).close()
    with read_only(directory):
        subprocess.run(
            [sys.executable, "-c", f"import sqlite3; sqlite3.connect({str(path)!r}).execute('PRAGMA user_version = 1')"], check=True
        )
        (error,) = read(path)
    assert error.startswith(f"{path}: it has schema version 1, not ")


def test_there_is_none(directory):
    with read_only(directory):
        (error,) = read(directory / "episodes.db")
    assert "it cannot be opened" in error
