"""The conformance check of importers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loraloop.episode import Episode
from loraloop.plugins import Importer
from loraloop.testing.episodes import expect
from loraloop.training_data import Refusal


def check_importer(importer: Importer, own: Iterable[Path], others: Iterable[Path] = ()) -> None:
    """Check that an importer does all that `plugins.Importer` promises.

    `own` are files of its format, with at least one episode and one refusal among them; `others` are files of other formats.
    """
    expect(bool(importer.name) and "\n" not in importer.description, "an importer has a name and a description of one line")
    read: list[Episode | Refusal] = []
    for path in own:
        expect(importer.detect(path, _head(path)), f"{importer.name} recognises {path}")
        entries = list(importer.read(path))
        n_entries = importer.count(path)
        expect(n_entries in {None, len(entries)}, f"count() of {path} is {n_entries}, and read() gives {len(entries)} entries")
        expect(_without_time(entries) == _without_time(importer.read(path)), f"reading {path} again gives the same entries, same ids")
        read += entries
    for entry in read:
        if isinstance(entry, Refusal):
            marks = (": found ", "; expected ", "; do this: ")
            expect(all(mark in entry.detail for mark in marks), f"a refusal says found, expected, do this: {entry.detail}")
        else:
            expect(entry.id.timestamp_ms == 0, f"the id of an imported episode follows from its content, not from the time: {entry.id}")
            expect(entry.metadata.tags.get("format") == importer.name, f"an episode is tagged with its format: {entry.metadata.tags}")
            expect(bool(entry.messages or entry.records), "an episode has messages or records")
    kinds = {type(entry) for entry in read}
    expect(kinds == {Episode, Refusal}, f"the files of {importer.name} give episodes and refusals, not only {kinds}")
    for path in others:
        expect(not importer.detect(path, _head(path)), f"{importer.name} does not take {path} for its own")


def _head(path: Path) -> str:
    return path.read_bytes()[: 64 * 1024].decode("utf-8-sig", errors="replace")


def _without_time(entries: Iterable[Episode | Refusal]) -> list[Episode | Refusal]:
    return [
        entry.model_copy(update={"metadata": entry.metadata.model_copy(update={"created_at": 0})}) if isinstance(entry, Episode) else entry
        for entry in entries
    ]
