"""From files to the episode store: which files, which format, and an account of every entry.

Ingesting can be repeated: an episode's id follows from its content, so a file taken in again, from any path, stores nothing.
Every entry read is stored, a duplicate, or refused for a reason; the three always add up to what was read.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from pydantic import Field, JsonValue

from loraloop.episode import Episode, Frozen
from loraloop.errors import ImportFailed
from loraloop.importers.entry import shorten, with_content_id
from loraloop.plugins import EpisodeStore, Importer, find, list_names
from loraloop.training_data import Refusal

HEAD_BYTES = 64 * 1024
"""How much of a file its format is told from."""
BATCH_ENTRIES = 200
"""How many entries are read before their episodes are stored together."""
MAX_REFUSALS = 20
"""How many refusals a report keeps in full; all are counted."""
SUFFIXES = (".json", ".jsonl", ".traj", ".eval")
"""The files that a directory is searched for."""


class IngestReport(Frozen):
    """What became of the entries of one file: `read` = `stored` + `duplicates` + the sum of `refused`."""

    path: str
    format: str
    read: int = 0
    stored: int = 0
    duplicates: int = 0
    """Episodes that the store had already, or that the file has twice."""
    refused: dict[str, int] = Field(default_factory=dict)
    """Counts by reason, reasons sorted."""
    refusals: tuple[Refusal, ...] = ()
    """The first of them, with place and advice."""

    def to_json(self) -> dict[str, JsonValue]:
        """The counts, for `--json`: path, format, read, stored, duplicates, refused."""
        return self.model_dump(mode="json", exclude={"refusals"})


def ingest_file(
    store: EpisodeStore,
    path: Path,
    format_name: str | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
    *,
    license_name: str | None = None,
    readmit: bool = False,
) -> IngestReport:
    """Take every entry of `path` into `store` and say what became of each.

    The format is told from the file unless `format_name` says it. An episode without the tag `license` gets `license_name`. One that
    was forgotten is refused, unless `readmit` takes it in again.
    `on_progress(entries read, entries in all or None)` is called after every batch. Raises ImportFailed when the file as a whole
    cannot be read, SettingsError for an unknown `format_name`; batches stored before stay, and ingesting again goes on from there.
    """
    importer: Importer = find("importers", format_name)() if format_name else detect(path)
    total = importer.count(path) if on_progress else None
    stored = Counter[bool]()
    refusals: list[Refusal] = []
    refused = Counter[str]()
    n_read = 0
    for batch in _iter_batches(importer.read(path)):
        episodes = [with_license(entry, license_name) for entry in batch if isinstance(entry, Episode)]
        if readmit and (back := [episode for episode, out in zip(episodes, store.find_forgotten(episodes), strict=True) if out]):
            store.readmit(back)
        added = store.append_many(episodes)
        kept_out = _refuse_forgotten(store, path, [episode for episode, is_new in zip(episodes, added, strict=True) if not is_new])
        stored.update({True: sum(added), False: len(added) - sum(added) - len(kept_out)})
        new = [*(entry for entry in batch if isinstance(entry, Refusal)), *kept_out]
        refused.update(refusal.reason for refusal in new)
        refusals.extend(new[: MAX_REFUSALS - len(refusals)])
        n_read += len(batch)
        if on_progress:
            on_progress(n_read, total)
    return IngestReport(
        path=str(path),
        format=importer.name,
        read=n_read,
        stored=stored[True],
        duplicates=stored[False],
        refused=dict(sorted(refused.items())),
        refusals=tuple(refusals),
    )


def _refuse_forgotten(store: EpisodeStore, path: Path, episodes: Sequence[Episode]) -> list[Refusal]:
    """Of those that were not stored, those that were forgotten."""
    flags = store.find_forgotten(episodes) if episodes else []
    return [
        Refusal(
            episode_id=episode.id,
            reason="forgotten",
            detail=f"{path}: found episode {episode.id}, or what it holds, which was forgotten; expected it to stay away; say --readmit to "
            "take it in again",
        )
        for episode, is_forgotten in zip(episodes, flags, strict=True)
        if is_forgotten
    ]


def with_license(episode: Episode, name: str | None) -> Episode:
    """`episode` under the terms `name` unless it names its own; terms are content, so an id made from content is made anew."""
    if name is None or episode.metadata.tags.get("license"):
        return episode
    tags = dict(sorted({**episode.metadata.tags, "license": name}.items()))
    tagged = episode.model_copy(update={"metadata": episode.metadata.model_copy(update={"tags": tags})})
    return with_content_id(tagged) if episode.id == with_content_id(episode).id else tagged


def refuse_file(path: Path, error: ImportFailed) -> IngestReport:
    """The report of a file that cannot be read as episodes: one entry, refused as `unreadable_file` with what `error` says first."""
    detail = f"{str(error).splitlines()[0]}; if nothing in it is to be learned, leave the file out"
    refusal = Refusal(reason="unreadable_file", detail=detail)
    return IngestReport(path=str(path), format="unknown", read=1, refused={refusal.reason: 1}, refusals=(refusal,))


def detect(path: Path) -> Importer:
    """The importer for `path`, told from its first 64 KiB. Raises ImportFailed when none or several recognise it."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES).decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise ImportFailed(f"{path}: cannot be opened ({error.strerror}); give a file that can be read") from error
    importers: list[Importer] = [find("importers", name)() for name in list_names("importers")]
    fitting = [importer for importer in importers if importer.detect(path, head)]
    if len(fitting) == 1:
        return fitting[0]
    begins = f"starts with {shorten(head)}" if head.strip() else "is empty"
    known = "\n".join(f"  {importer.name}: {importer.description}" for importer in fitting or importers)
    says = "more than one format fits" if fitting else "no known format fits"
    raise ImportFailed(f"{path}: {says}; it {begins}\nSay --format NAME if it is one of\n{known}")


def iter_files(paths: Iterable[Path]) -> list[Path]:
    """The files among and under `paths`, each once: a file as given, a directory's files with one of `SUFFIXES` at any depth, sorted.

    Raises ImportFailed for a path that is not there, with the names near to it, and for a directory without such files.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        for file in _list_directory(path) if path.is_dir() else [_existing(path)]:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _list_directory(path: Path) -> list[Path]:
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise ImportFailed(f"{path}: no file *{' or *'.join(SUFFIXES)} in it or below; name the files themselves")
    return found


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    if not path.parent.is_dir():
        raise ImportFailed(f"{path}: not found; there is no directory {path.parent}")
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"look at what is in {path.parent}"
    raise ImportFailed(f"{path}: not found; {hint}")


def _iter_batches(entries: Iterator[Episode | Refusal]) -> Iterator[list[Episode | Refusal]]:
    while batch := list(islice(entries, BATCH_ENTRIES)):
        yield batch
