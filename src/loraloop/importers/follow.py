"""JSON Lines files that others still write to: what is new in them is taken in, again and again, and a half-written last line is left.

Of every file it is kept, in a file of its own, up to where it was read, so that a restart reads nothing twice; should it do so all the
same, ids made from content store nothing twice. A file that was replaced, or cut and begun anew, is read from its beginning; what the
writer of a replaced file had still added to it is read first.

One at a time follows into one project: a lease beside the positions tells, and what a killed process held is taken over.

Only formats whose lines stand for themselves are followed (`LineImporter`). A log that tells one run in many lines, and a document, is an
episode only when it is complete: such files are told once as `not_followed`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pydantic import TypeAdapter, ValidationError

from loraloop.episode import Frozen
from loraloop.errors import ImportFailed, LeaseHeld
from loraloop.files import write_json
from loraloop.importers.ingest import IngestReport, detect, find_side_file, ingest_plain, refuse_file
from loraloop.importers.scores import ScoreRule
from loraloop.importers.sources import Found, search
from loraloop.importers.unpacking import Plain, mirror
from loraloop.lease import Lease
from loraloop.plugins import EpisodeStore, Importer, LineImporter, find
from loraloop.training_data import Refusal

PIECE_BYTES = 16 * 1024**2
"""How much of a file is read at a time."""
MAX_LINE_BYTES = 64 * 1024**2
"""The longest line that is read; a longer one is refused as `too_large`."""
MAX_OPEN = 100
"""How many files are kept open, the ones last read, to see the end of those that are replaced."""

_TAIL_BYTES = 1024


class Position(Frozen):
    """Up to where a file was read: bytes and whole lines, which file it was, and a hash of what stood before that place."""

    device: int
    inode: int
    offset: int = 0
    lines: int = 0
    tail: str = ""


_POSITIONS = TypeAdapter(dict[str, Position])


@dataclass
class Follower:
    """Follows files, and folders in which more may appear. `state` is the file that keeps the positions."""

    store: EpisodeStore
    paths: list[Path]
    state: Path
    format_name: str | None = None
    license_name: str | None = None
    score_rule: ScoreRule | None = None
    positions: dict[str, Position] = field(default_factory=dict)
    formats: dict[Path, str] = field(default_factory=dict)
    told: set[Path] = field(default_factory=set)
    is_open: OrderedDict[Path, BinaryIO] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        """Raises ImportFailed for positions that cannot be read."""
        self.positions = _load_positions(self.state)

    def run(self, wait: Callable[[], bool]) -> Iterator[IngestReport]:
        """A report for every piece that was read, until `wait`, called when nothing is new, says False; then once more what is new.

        Raises ImportFailed for a path that is not there at the beginning, LeaseHeld while another keeps positions in `state`.
        """
        search(self.paths)
        lease = Lease(self.state.with_suffix(".lease"))
        try:
            lease.acquire("ingest --follow")
        except LeaseHeld as error:
            advice = "end that one and start one with all paths, or follow into another project"
            raise LeaseHeld(f"{self.state.parent}: files are followed into it already, by {error}; {advice}") from error
        with lease.kept():
            self.positions = _load_positions(self.state)  # as whoever had the lease before has left them
            yield from self._run(wait)

    def _run(self, wait: Callable[[], bool]) -> Iterator[IngestReport]:
        goes_on = True
        try:
            while goes_on:
                n_read = 0
                for report in self.read_new():
                    n_read += report.read
                    yield report
                goes_on = n_read > 0 or wait()
            yield from self.read_new()
        finally:
            self.close()

    def close(self) -> None:
        """Close the files that are open."""
        while self.is_open:
            self.is_open.popitem()[1].close()

    def read_new(self) -> Iterator[IngestReport]:
        """A report for every piece of what is new now, each stored, with its position kept, when it is given."""
        for path in self.paths:
            try:
                files = search([path])
            except ImportFailed:  # it is being replaced, or all files of the folder are gone
                continue
            for found in files:
                if found.path in self.told:
                    continue
                try:
                    yield from self._read_file(found)
                except FileNotFoundError:
                    continue
                except ImportFailed as error:
                    self.told.add(found.path)
                    yield refuse_file(found.path, error)

    def _read_file(self, found: Found) -> Iterator[IngestReport]:
        if found.problem:
            raise found.problem
        path = found.path
        kept, position = self.is_open.get(path), self.positions.get(str(path.absolute()))
        now = path.stat()
        if kept and position and (position.device, position.inode) != (now.st_dev, now.st_ino):
            yield from self._read_pieces(path, kept, position)  # the rest of the file that was replaced
            self.is_open.pop(path).close()
            kept = None
        file = kept or path.open("rb")
        self.is_open[path] = file
        self.is_open.move_to_end(path)
        if len(self.is_open) > MAX_OPEN:
            self.is_open.popitem(last=False)[1].close()
        status = os.fstat(file.fileno())
        if position is None or not _is_at(file, position):
            position = Position(device=status.st_dev, inode=status.st_ino)
        if status.st_size > position.offset and self._find_format(found, file):
            yield from self._read_pieces(path, file, position)

    def _find_format(self, found: Found, file: BinaryIO) -> str | None:
        """The format of the file; None when it has no whole line yet, or is left aside. Raises ImportFailed when it is not followed."""
        path = found.path
        if path not in self.formats:
            file.seek(0)
            first = next((line for line in iter(lambda: file.readline(MAX_LINE_BYTES), b"") if line.strip()), b"")
            if not first.endswith(b"\n") and len(first) < MAX_LINE_BYTES:
                return None
            if find_side_file(found):
                self.told.add(path)
                return None
            importer: Importer = find("importers", self.format_name)() if self.format_name else detect(path)
            begin = first.strip().removeprefix(b"\xef\xbb\xbf").strip()
            if not isinstance(importer, LineImporter) or not begin.startswith(b"{") or begin == b"{":
                what = f"a file of {importer.name}, which is an episode only when it is complete"
                advice = "ingest it without --follow when it is"
                raise ImportFailed(
                    f"{path}: found {what}; expected JSON Lines that stand for themselves; do this: {advice}", "not_followed"
                )
            self.formats[path] = importer.name
        return self.formats[path]

    def _read_pieces(self, path: Path, file: BinaryIO, position: Position) -> Iterator[IngestReport]:
        while True:
            piece, length = _read_lines(file, position.offset)
            if not length:
                return
            report = self._ingest(path, piece, position.lines + 1) if piece else self._refuse_line(path, position, length)
            lines, offset = position.lines + (piece.count(b"\n") or 1), position.offset + length
            position = position.model_copy(update={"offset": offset, "lines": lines, "tail": _tail(file, offset)})
            self.positions[str(path.absolute())] = position
            write_json(self.state, {name: kept.model_dump() for name, kept in sorted(self.positions.items())})
            yield report

    def _ingest(self, path: Path, piece: bytes, first_line: int) -> IngestReport:
        with tempfile.TemporaryDirectory(prefix="loraloop-") as made:
            target = mirror(path, Path(made))
            target.write_bytes(piece)
            plain = Plain(target, str(path), Path(made), first_line)
            try:
                return ingest_plain(self.store, plain, self.formats[path], license_name=self.license_name, score_rule=self.score_rule)
            except ImportFailed as error:
                raise ImportFailed(plain.rename(str(error)), error.reason) from error

    def _refuse_line(self, path: Path, position: Position, size: int) -> IngestReport:
        found, expected = f"a line of {size} bytes", f"{MAX_LINE_BYTES} at most"
        detail = f"{path}, line {position.lines + 1}: found {found}; expected {expected}; do this: leave it out"
        refusal = Refusal(reason="too_large", detail=detail)
        return IngestReport(path=str(path), format=self.formats[path], read=1, refused={refusal.reason: 1}, refusals=(refusal,))


def _load_positions(state: Path) -> dict[str, Position]:
    try:
        return _POSITIONS.validate_json(state.read_bytes()) if state.exists() else {}
    except ValidationError as error:
        raise ImportFailed(f"{state}: found no positions of followed files; remove it, and all is read anew") from error


def _read_lines(file: BinaryIO, offset: int) -> tuple[bytes, int]:
    """The whole lines from `offset` on, `PIECE_BYTES` of them at most, or one longer one, and how long they are together.

    No bytes with a length above 0: that long is a line of more than `MAX_LINE_BYTES`. 0: no line is complete.
    """
    file.seek(offset)
    piece = file.read(PIECE_BYTES)
    if end := piece.rfind(b"\n") + 1:
        return piece[:end], end
    if len(piece) < PIECE_BYTES:
        return b"", 0
    piece += file.readline(MAX_LINE_BYTES - PIECE_BYTES)
    if piece.endswith(b"\n"):
        return piece, len(piece)
    length = len(piece)
    while part := file.readline(PIECE_BYTES):
        length += len(part)
        if part.endswith(b"\n"):
            return b"", length
    return b"", 0


def _is_at(file: BinaryIO, position: Position) -> bool:
    """Whether `file` is the one that `position` is of, and still says the same up to there."""
    status = os.fstat(file.fileno())
    is_same = (status.st_dev, status.st_ino) == (position.device, position.inode) and status.st_size >= position.offset
    return is_same and _tail(file, position.offset) == position.tail


def _tail(file: BinaryIO, offset: int) -> str:
    begin = max(0, offset - _TAIL_BYTES)
    file.seek(begin)
    return hashlib.blake2b(file.read(offset - begin), digest_size=16).hexdigest() if offset else ""
