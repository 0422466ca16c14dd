"""Importers against damaged files: `python -m bench.fuzz [--files 20000] [--format NAME …]`.

Each format is given so many damaged files, made from the real recordings of it beside the repository (pieces of them, so that a file takes
a millisecond) and from the fixtures of the tests. An importer may give episodes and refusals, or say that the file cannot be read;
anything else is a crash, a file that takes longer than 20 seconds a hang. The seeds are printed, so that each can be made again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraloop.episode import Episode
from loraloop.errors import ImportFailed
from loraloop.importers.ingest import detect, iter_files
from loraloop.plugins import find, list_names
from loraloop.store.memory import to_body
from loraloop.testing.mutations import mutate
from loraloop.training_data import Refusal

ROOT = Path(__file__).resolve().parent.parent
PIECE_BYTES = 4_000
SECONDS = 20


def main() -> int:
    """0 when nothing crashed or hung."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000, help="damaged files for each format (20000)")
    parser.add_argument("--format", action="append", help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the first file (0)")
    arguments = parser.parse_args()
    names = arguments.format or list_names("importers")
    seeds = dict(_collect())
    n_bad = 0
    print("| format | made from | damaged files | episodes | refusals | files refused | crashes | hangs | slowest, ms | memory, MB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in names:
        counts, slowest = _fuzz(name, seeds.get(name, []), arguments.files, arguments.seed)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        parts = [counts[key] for key in ("files", "episodes", "refusals", "unreadable", "crashes", "hangs")]
        row = [name, len(seeds.get(name, [])), *parts, round(1000 * slowest), memory]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
        n_bad += counts["crashes"] + counts["hangs"]
    return 1 if n_bad else 0


def _collect() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """(format, (file name, piece) of every file of it)."""
    found: dict[str, list[tuple[str, bytes]]] = {name: [] for name in list_names("importers")}
    folders = [ROOT.parent / "shared" / "data", ROOT / "tests" / "fixtures"]
    for path in iter_files(folder for folder in folders if folder.is_dir()):
        with contextlib.suppress(ImportFailed):
            found[detect(path).name].append((path.name, _piece(path)))
    yield from found.items()


def _piece(path: Path) -> bytes:
    """A file's beginning that is a whole file of its format, as far as that can be had."""
    data = path.read_bytes()
    if len(data) <= PIECE_BYTES or path.suffix == ".eval":
        return data
    try:
        document = json.loads(data)
    except ValueError:
        lines = data.splitlines(keepends=True)
        kept = [line for line in lines[:50] if len(line) <= PIECE_BYTES] or [lines[0]]
        return b"".join(kept)
    while len(json.dumps(document)) > PIECE_BYTES and _shorten(document):
        pass
    return json.dumps(document).encode()


def _shorten(document: Any) -> bool:
    """Halve the longest list in it; False when none is left to halve."""
    waiting, longest = [document], None
    while waiting:
        item = waiting.pop()
        if isinstance(item, list) and len(item) > 2 and (longest is None or len(json.dumps(item)) > len(json.dumps(longest))):
            longest = item
        waiting += list(item.values()) if isinstance(item, dict) else item if isinstance(item, list) else []
    if longest is None:
        return False
    del longest[max(2, len(longest) // 2) :]
    return True


def _fuzz(name: str, pieces: list[tuple[str, bytes]], n_files: int, first: int) -> tuple[Counter[str], float]:
    counts: Counter[str] = Counter()
    slowest = 0.0
    signal.signal(signal.SIGALRM, _hang)
    importer = find("importers", name)()
    with tempfile.TemporaryDirectory(prefix="loraloop-fuzz-") as folder:
        for number in range(n_files if pieces else 0):
            file_name, piece = pieces[number % len(pieces)]
            path = Path(folder) / file_name
            path.write_bytes(mutate(piece, first + number))
            started = time.perf_counter()
            signal.alarm(SECONDS)
            try:
                for entry in importer.read(path):
                    counts["episodes" if isinstance(entry, Episode) else "refusals"] += 1
                    if isinstance(entry, Episode):
                        to_body(entry)
                    elif not isinstance(entry, Refusal):
                        raise TypeError(type(entry).__name__)  # noqa: TRY301  caught as the crash that it is
            except ImportFailed:
                counts["unreadable"] += 1
            except Hang:
                counts["hangs"] += 1
                print(f"{name}: seed {first + number} of {file_name} hangs", file=sys.stderr)
            except Exception:  # noqa: BLE001  whatever it is, it is what is looked for
                counts["crashes"] += 1
                print(f"{name}: seed {first + number} of {file_name}\n{traceback.format_exc()}", file=sys.stderr)
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - started)
            counts["files"] += 1
            path.unlink()
    return counts, slowest


class Hang(BaseException):
    """A file takes too long."""


def _hang(_number: int, _frame: object) -> None:
    raise Hang


if __name__ == "__main__":
    sys.exit(main())
