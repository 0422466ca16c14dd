"""Which files are meant: by name, by a pattern such as `runs/**/*.jsonl`, by a folder that is searched, or `-` for standard input.

Nothing that a search finds lies outside the folder that is searched: a link that leads out of it is not followed, but told. What is no
regular file, such as a pipe or a device, is told too and never opened. A file or link that was named itself is read wherever it leads.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loraloop.errors import ImportFailed

SUFFIXES = (".json", ".jsonl", ".traj", ".eval")
"""The files that a directory is searched for."""
PACKED = (".gz", ".zst")
"""The suffixes that may follow."""
STDIN = Path("-")
SIDE_FILES = frozenset(
    {
        *(
            "result.json",
            "results.json",
            "config.json",
            "lock.json",
            "reward.json",
            "reward-details.json",
            "ctrf.json",
        ),  # Harbor, SWE-bench
        *("metadata.json", "report.json", "preds.json", "all_preds.jsonl", "exit_statuses.json"),  # verifiers, OpenHands, SWE-agent
        *("eval-set.json", "logs.json", "listing.json"),  # Inspect
    }
)
"""What harnesses write beside their runs: in a searched folder such a file, in no known format, is left aside."""

_MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class Found:
    """A file to read. `is_named` when the user named it himself; `problem` says why it is not read."""

    path: Path
    is_named: bool = True
    problem: ImportFailed | None = None


def search(paths: Iterable[Path]) -> list[Found]:
    """The files among and under `paths`, each once: a file as given, a directory's files with one of `SUFFIXES` at any depth, sorted.

    Raises ImportFailed for a path that is not there, with the names near to it, and for a directory or a pattern without such files.
    """
    files: dict[Path, Found] = {}
    for path in paths:
        for found in _search_one(path):
            key = found.path if found.problem or found.path == STDIN else found.path.resolve()
            files.setdefault(key, found)
    return list(files.values())


def check_regular(path: Path) -> ImportFailed | None:
    """Why `path` must not be opened: it is a pipe, a device or a socket, from which reading may never end."""
    if path.is_file() or path.is_dir() or not path.exists():
        return None
    advice = "give a file, or pipe it in: `… | loraloop ingest -`"
    return ImportFailed(f"{path}: found no regular file; expected one, as a pipe or device may never end; do this: {advice}", "not_a_file")


def _search_one(path: Path) -> list[Found]:
    if path == STDIN:
        return [Found(path)]
    if path.is_dir():
        return _search_directory(path)
    if not path.exists() and _MAGIC & set(str(path)):
        return _match(path)
    return [Found(_existing(path), problem=check_regular(path))]


def _search_directory(path: Path) -> list[Found]:
    found = sorted(_walk(path, path.resolve()), key=lambda one: one.path)
    if not found:
        raise ImportFailed(f"{path}: no file *{' or *'.join(SUFFIXES)} in it or below; name the files themselves")
    return found


def _walk(folder: Path, root: Path) -> Iterator[Found]:
    """What `folder` holds, links to folders aside: what lies behind one inside `root` is found at its own place."""
    for where, folders, names in os.walk(folder):
        here = Path(where)
        links = [here / name for name in folders if (here / name).is_symlink()]
        yield from (Found(link, is_named=False, problem=problem) for link in links if (problem := _check_inside(link, root)))
        for file in (here / name for name in names):
            if _is_wanted(file) and (file.exists() or file.is_symlink()):
                yield Found(file, is_named=False, problem=_check_inside(file, root) or check_regular(file))


def _match(pattern: Path) -> list[Found]:
    """The files that fit a pattern; the folder before its first sign that is none of a name is what is searched."""
    fixed = next(at for at, part in enumerate(pattern.parts) if _MAGIC & set(part))
    base, rest = Path(*pattern.parts[:fixed]), str(Path(*pattern.parts[fixed:]))
    try:
        matches = sorted(base.glob(rest)) if base.is_dir() else []
    except ValueError as error:
        raise ImportFailed(f"{pattern}: no pattern ({error}); write it such as 'runs/**/*.jsonl'") from error
    found: list[Found] = []
    root = base.resolve()
    for path in matches:
        problem = _check_inside(path, root) or check_regular(path)
        if problem or not path.is_dir():
            found.append(Found(path, is_named=False, problem=problem))
        else:
            found.extend(_walk(path, root))
    if not found:
        raise ImportFailed(f"{pattern}: no file fits this pattern; look at what is in {base}, `**` stands for folders at any depth")
    return found


def _is_wanted(file: Path) -> bool:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    last = suffixes[:-1] if suffixes and suffixes[-1] in PACKED else suffixes
    return bool(last) and last[-1] in SUFFIXES


def _check_inside(path: Path, root: Path) -> ImportFailed | None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a link to nothing, or in a circle
        reason = error.strerror if isinstance(error, OSError) else "a circle"
        return ImportFailed(f"{path}: found a link that leads nowhere ({reason}); expected a file; do this: remove the link")
    if target.is_relative_to(root):
        return None
    advice = "name it itself if it is meant"
    return ImportFailed(f"{path}: found a link out of {root}, to {target}; expected a file in it; do this: {advice}", "outside_folder")


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    if not path.parent.is_dir():
        raise ImportFailed(f"{path}: not found; there is no directory {path.parent}")
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"look at what is in {path.parent}"
    raise ImportFailed(f"{path}: not found; {hint}")
