"""Files that are whole or absent: write aside, fsync, rename; JSON Lines; content hashes.

A reader never sees half a file that this module wrote, and nothing here overwrites a directory.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_to_canonical = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def canonical_json(value: object) -> str:
    """The same text for the same value on every machine: sorted keys, no spaces, UTF-8 kept."""
    return _to_canonical(value)


def content_hash(value: object, n_hex: int = 32) -> str:
    """BLAKE2b over `canonical_json(value)`, as `n_hex` hex digits."""
    return hash_texts(canonical_json(value), n_hex=n_hex)


def hash_texts(*texts: str, n_hex: int = 32) -> str:
    """BLAKE2b over `texts`, one behind the other, as `n_hex` hex digits."""
    state = hashlib.blake2b(digest_size=n_hex // 2)
    for text in texts:
        state.update(text.encode("utf-8", "surrogatepass"))
    return state.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def hash_listing(hashes: Mapping[str, str]) -> str:
    """SHA-256 over a line `<hash>  <name>` for each file, in the order of the names: what `sha256sum FILE… | sha256sum` says."""
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def write_atomic(path: Path, text: str, *, durable: bool = True, mode: int = 0o644) -> None:
    """Write `text` so that `path` holds either its old content or all of the new; when `durable`, after a power cut too.

    A lone surrogate, which UTF-8 cannot hold (a cut-off emoji leaves one), is written as the escape that JSON has for it. At no moment
    may anybody read it whom `mode` does not let.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(aside, mode)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON with sorted keys, atomically."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, sort_keys=True, indent=2, allow_nan=False) + "\n")


def json_line(value: object) -> str:
    """`value` as one line of JSON, keys in their own order: a chat template renders a tool schema in the order it is given."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    """One JSON object per line, atomically, the keys of each in their own order."""
    write_atomic(path, "".join(json_line(row) + "\n" for row in rows))


def read_jsonl(path: Path, *, skip_torn: bool = False) -> Iterator[Any]:
    """The values of a JSON Lines file, in order, blank lines skipped; raises ValueError naming the file and line.

    With `skip_torn` a last line without its newline, which a writer is still at or never finished, is none.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip() or (skip_torn and not line.endswith(b"\n")):
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
            except (ValueError, RecursionError) as error:  # bytes that are not UTF-8, numbers or nesting beyond every limit
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error


def append_jsonl(path: Path, value: object) -> None:
    """Add one line, which is on the disk when this returns; on an error the file is as before.

    What follows the last newline is of a writer that died, and cut off first. The caller is alone with the file (`locked_directory`).
    """
    line = (json_line(value) + "\n").encode("utf-8", "backslashreplace")
    path.touch(mode=0o644)
    with path.open("r+b", buffering=0) as file:
        end = file.readall().rfind(b"\n") + 1
        try:
            file.truncate(end)
            file.seek(end)
            while line:  # an unbuffered write may take less than the whole
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(end)
            raise
    sync(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that appears as `path` only when the block ends well.

    Raises FileExistsError when `path` is there already, before or after the block: nothing is ever overwritten.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield aside
        sync_tree(aside)
        os.chmod(aside, 0o755)  # noqa: S103  mkdtemp shuts out others, such as a server under another user
        _move(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync(path.parent)


def remove_asides(path: Path) -> None:
    """Remove what a process that was killed inside `new_directory(path)` or `write_atomic(path, …)` has left; not while one runs."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write that appears as `path`, whole and on the disk, only when the block ends well; what was there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        sync(aside)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Alone with `path`, which is made when it is not there: another process that wants the same waits. Freed when a process dies."""
    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Put a directory on the disk, with every file and folder in it."""
    for entry in (*directory.rglob("*"), directory):
        if not entry.is_symlink() and (entry.is_file() or entry.is_dir()):
            sync(entry)


def sync(path: Path) -> None:
    """Put a file's bytes, or a directory's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move(aside: Path, path: Path) -> None:
    """Rename a directory to where nothing is; the system itself would replace an empty directory, and say ENOTEMPTY for another."""
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    try:
        os.rename(aside, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(f"{path} exists already") from error
        raise
