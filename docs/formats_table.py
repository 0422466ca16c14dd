"""Writes docs/reference/formats.md: what every importer makes of the real recordings beside the repository.

`python docs/formats_table.py [FOLDER]`, FOLDER with its MANIFEST.json; the table is committed as made. Formats are never named to it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from loraloop.episode import Episode
from loraloop.errors import ImportFailed
from loraloop.importers.ingest import detect

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
PAGE = ROOT / "docs" / "reference" / "formats.md"
NO_FORMAT = "none"
INTRO = """# Formats on real files

Written by `python docs/formats_table.py` from recordings that others published, formats told from the files alone. *Declared* is
what the list of the recordings says of those files that it counts: episodes, and of them positive. *Read* are all entries, each an
episode or a refusal. What is `none` holds no runs, or runs in a format that is not read.
"""


@dataclass
class Row:
    """What became of the files of one folder in one format."""

    files: int = 0
    read: int = 0
    episodes: int = 0
    positives: int = 0
    declared: list[int] = field(default_factory=list)
    declared_positives: list[int] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


def read_file(path: Path) -> tuple[str, Row]:
    """The format of a file, `none` when no importer reads it, and its figures."""
    row = Row(files=1)
    try:
        importer = detect(path)
    except ImportFailed:
        return NO_FORMAT, row
    for entry in importer.read(path):
        row.read += 1
        if isinstance(entry, Episode):
            row.episodes += 1
            row.positives += entry.outcome.is_success
        else:
            row.refused[entry.reason] += 1
    return importer.name, row


def make_rows(data: Path) -> dict[tuple[str, str], Row]:
    """(format, folder) -> figures, of every file in the manifest."""
    rows: dict[tuple[str, str], Row] = {}
    for listed in json.loads((data / "MANIFEST.json").read_text(encoding="utf-8")):
        name, one = read_file(data / listed["path"])
        row = rows.setdefault((name, listed["path"].partition("/")[0]), Row())
        for key in ("files", "read", "episodes", "positives"):
            setattr(row, key, getattr(row, key) + getattr(one, key))
        row.refused += one.refused
        row.declared += [listed["episodes"]] if listed["episodes"] is not None else []
        row.declared_positives += [listed["positive"]] if listed["positive"] is not None else []
    return dict(sorted(rows.items(), key=lambda pair: (pair[0][0] == NO_FORMAT, pair[0])))


def to_page(rows: dict[tuple[str, str], Row]) -> str:
    """The page."""
    lines = ["| format | recordings | files | declared | read | episodes | positive | refused |", "|---|---|---|---|---|---|---|---|"]
    for (name, folder), row in rows.items():
        declared = f"{sum(row.declared)} ({sum(row.declared_positives) if row.declared_positives else '-'})" if row.declared else "-"
        refused = ", ".join(f"{reason} {count}" for reason, count in sorted(row.refused.items())) or "-"
        figures = [row.files, declared, row.read, row.episodes, row.positives, refused]
        lines.append(f"| {name} | {folder} | " + " | ".join(map(str, figures)) + " |")
    return INTRO + "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(to_page(make_rows(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA)), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE.name}\n")
