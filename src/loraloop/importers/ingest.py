"""From files to the episode store: which files, which format, and an account of every entry.

Ingesting can be repeated: an episode's id follows from its content, so a file taken in again, from any path, stores nothing.
Every entry read is stored, a duplicate, or refused for a reason; the three always add up to what was read.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, Field, JsonValue

from loraloop.chat.refused_entry import EntryRefused, shorten
from loraloop.episode import LICENSE_TAG, Episode, Frozen, Label, Message
from loraloop.errors import ImportFailed
from loraloop.importers.scores import ScoreRule, describe, score_of
from loraloop.importers.sources import SIDE_FILES, Found, search
from loraloop.importers.unpacking import Plain, open_plain
from loraloop.plugins import EpisodeStore, Importer, ScoredImporter, find, list_names
from loraloop.training_data import Refusal

HEAD_BYTES = 64 * 1024
"""How much of a file its format is told from."""
BATCH_ENTRIES = 200
"""How many entries are read before their episodes are stored together; fewer when they are long."""
BATCH_BYTES = 32 * 1024**2
"""About how much memory those may take, unless one alone takes more: an entry may be as long as `json_input.MAX_ENTRY_BYTES`."""
OBJECT_BYTES = 64
"""About what Python takes for an object beside what it holds."""
COLLECT_OBJECTS = 50_000
"""Python's own 700 cost a sixth of the time of an ingest."""
MAX_REFUSALS = 20
"""How many refusals a report keeps in full; all are counted."""
SIDE_FILE = "side-file"
"""The format of what is left aside in a searched folder, and counted only."""


class IngestReport(Frozen):
    """What became of the entries of one file: `read` = `stored` + `duplicates` + the sum of `refused`."""

    path: str
    format: str
    read: int = 0
    stored: int = 0
    duplicates: int = 0
    """Episodes that the store had already, or that the file has twice."""
    relicensed: int = 0
    """Of these, those whose terms were said now: the store had none, or others than were given."""
    refused: dict[str, int] = Field(default_factory=dict)
    """Counts by reason, reasons sorted."""
    refusals: tuple[Refusal, ...] = ()
    """The first of them, with place and advice."""
    scores: str = ""
    """The score that was declared to count, or the range of those that were taken as recorded."""

    def to_json(self) -> dict[str, JsonValue]:
        """The counts, for `--json`: path, format, read, stored, duplicates, relicensed, refused, scores."""
        return self.model_dump(mode="json", exclude={"refusals"})

    def plus(self, other: IngestReport) -> IngestReport:
        """Both as one, of two pieces of one file."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("read", "stored", "duplicates", "relicensed")}
        refused = dict(sorted((Counter(self.refused) + Counter(other.refused)).items()))
        return self.model_copy(update={**sums, "refused": refused, "refusals": (self.refusals + other.refusals)[:MAX_REFUSALS]})


def ingest_file(
    store: EpisodeStore,
    path: Path,
    format_name: str | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
    *,
    license_name: str | None = None,
    score_rule: ScoreRule | None = None,
    readmit: bool = False,
) -> IngestReport:
    """Take every entry of `path` into `store` and say what became of each.

    The format is told from the file unless `format_name` says it. An episode without the tag `license` gets `license_name`, by a label
    where the store has it already; with `score_rule` its outcome is what that score says. One that was forgotten is refused, unless
    `readmit` takes it in again.
    `on_progress(entries read, entries in all or None)` is called after every batch. Raises ImportFailed when the file as a whole
    cannot be read, SettingsError for an unknown `format_name`; batches stored before stay, and ingesting again goes on from there.
    """
    with open_plain(path) as plain:
        try:
            return ingest_plain(store, plain, format_name, on_progress, license_name=license_name, score_rule=score_rule, readmit=readmit)
        except ImportFailed as error:
            raise ImportFailed(plain.rename(str(error)), error.reason) from error


def ingest_plain(
    store: EpisodeStore,
    plain: Plain,
    format_name: str | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
    *,
    license_name: str | None = None,
    score_rule: ScoreRule | None = None,
    readmit: bool = False,
) -> IngestReport:
    """`ingest_file` of a file that is plain already."""
    with _rare_collections():
        return _ingest(store, plain, format_name, on_progress, license_name=license_name, score_rule=score_rule, readmit=readmit)


def _ingest(
    store: EpisodeStore,
    plain: Plain,
    format_name: str | None,
    on_progress: Callable[[int, int | None], None] | None,
    *,
    license_name: str | None,
    score_rule: ScoreRule | None,
    readmit: bool,
) -> IngestReport:
    importer: Importer = find("importers", format_name)() if format_name else detect(plain.path)
    total = importer.count(plain.path) if on_progress else None
    stored = Counter[bool]()
    refusals: list[Refusal] = []
    refused = Counter[str]()
    scores: set[float] = set()
    n_read = relicensed = 0
    for batch in _iter_batches(_iter_all(importer, plain, score_rule)):
        episodes = [with_license(entry, license_name) for entry in batch if isinstance(entry, Episode)]
        scores = _range(scores | {score for episode in episodes if (score := score_of(episode.outcome)) is not None})
        if readmit and (back := [episode for episode, out in zip(episodes, store.find_forgotten(episodes), strict=True) if out]):
            store.readmit(back)
        added = store.append_many(episodes)
        known = [episode for episode, is_new in zip(episodes, added, strict=True) if not is_new]
        relicensed += _say_terms(store, known, license_name)
        kept_out = _refuse_forgotten(store, plain.name, known)
        stored.update({True: sum(added), False: len(added) - sum(added) - len(kept_out)})
        new = [*(entry for entry in batch if isinstance(entry, Refusal)), *kept_out]
        refused.update(refusal.reason for refusal in new)
        refusals.extend(new[: MAX_REFUSALS - len(refusals)])
        n_read += len(batch)
        if on_progress:
            on_progress(n_read, total)
    return IngestReport(
        path=plain.name,
        format=importer.name,
        read=n_read,
        stored=stored[True],
        duplicates=stored[False],
        relicensed=relicensed,
        refused=dict(sorted(refused.items())),
        refusals=tuple(refusals),
        scores=describe(score_rule, scores),
    )


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python look for cycles of garbage after every `COLLECT_OBJECTS` new objects: a batch has tens of thousands that are none.

    What was set comes back at the end, so the process that ingests in the background is as it was.
    """
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], COLLECT_OBJECTS) if before[0] else 0, *before[1:])  # 0: it was turned off
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _refuse_forgotten(store: EpisodeStore, name: str, episodes: Sequence[Episode]) -> list[Refusal]:
    """Of those that were not stored, those that were forgotten."""
    flags = store.find_forgotten(episodes) if episodes else []
    return [
        Refusal(
            episode_id=episode.id,
            reason="forgotten",
            detail=f"{name}: found episode {episode.id}, or what it holds, which was forgotten; expected it to stay away; say --readmit to "
            "take it in again",
        )
        for episode, is_forgotten in zip(episodes, flags, strict=True)
        if is_forgotten
    ]


def with_license(episode: Episode, name: str | None) -> Episode:
    """`episode` under the terms `name` unless it names its own; its id stays, as terms are no content."""
    if name is None or episode.metadata.tags.get(LICENSE_TAG):
        return episode
    tags = dict(sorted({**episode.metadata.tags, LICENSE_TAG: name}.items()))
    return episode.model_copy(update={"metadata": episode.metadata.model_copy(update={"tags": tags})})


def _say_terms(store: EpisodeStore, known: Sequence[Episode], given: str | None) -> int:
    """Label those of the `known` that are stored without terms, or under others than were `given` now; how many."""
    told = {episode.id: terms for episode in known if (terms := episode.metadata.tags.get(LICENSE_TAG))}
    labels = []
    for episode_id, terms in told.items():
        kept = store.find(episode_id)
        before = kept.metadata.tags.get(LICENSE_TAG) if kept else terms
        if kept and (not before or (before != terms and terms == given)):  # what two files say of one run themselves does not go to and fro
            labels.append(Label(episode_id=kept.id, outcome=kept.outcome, source="ingest", license=terms))
    store.add_labels(labels)
    return len(labels)


def refuse_file(path: Path, error: ImportFailed) -> IngestReport:
    """The report of a file that cannot be read as episodes: one entry, refused for the `reason` of `error` with what it says first."""
    said = str(error).splitlines()[0]
    advice = "" if "; do this: " in said else "; if nothing in it is to be learned, leave the file out"
    refusal = Refusal(reason=error.reason, detail=said + advice)
    return IngestReport(path=str(path), format="unknown", read=1, refused={refusal.reason: 1}, refusals=(refusal,))


def find_side_file(found: Found) -> IngestReport | None:
    """The report of a file that a search found and that is no run, but what a harness writes beside its runs; else None."""
    if found.is_named or found.problem or found.path.name not in SIDE_FILES:
        return None
    try:
        detect(found.path)
    except ImportFailed:
        return IngestReport(path=str(found.path), format=SIDE_FILE)
    return None


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
    """The files among and under `paths` that can be read, each once (see `search`)."""
    return [found.path for found in search(paths) if found.problem is None]


def _iter_all(importer: Importer, plain: Plain, rule: ScoreRule | None) -> Iterator[Episode | Refusal]:
    """The entries judged by `rule` and as messages should name them, and last what is missing of a packed file."""
    entries = importer.read(plain.path)
    if rule is not None and rule.top_key is not None and isinstance(importer, ScoredImporter):
        entries = importer.read_scored(plain.path, rule.top_key)
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, Refusal):
            yield entry.model_copy(update={"detail": plain.rename(entry.detail)})
        elif rule is None:
            yield entry
        else:
            try:
                judged: Episode | Refusal = rule.apply(entry)
            except EntryRefused as error:
                judged = Refusal(reason=error.reason, detail=f"{plain.name}, number {number}: {error}")
            yield judged
    if plain.problem is not None:
        yield plain.problem


def _iter_batches(entries: Iterator[Episode | Refusal]) -> Iterator[list[Episode | Refusal]]:
    batch: list[Episode | Refusal] = []
    n_bytes = 0
    tools: object = ()
    for entry in entries:
        batch.append(entry)
        if isinstance(entry, Episode):
            n_bytes += _weigh_messages(entry.messages) + _weigh(entry.records) + _weigh(entry.metadata.tags)
            n_bytes += 0 if entry.tools is tools else _weigh(entry.tools)  # the lines of a file share them
            tools = entry.tools
        if len(batch) >= BATCH_ENTRIES or n_bytes >= BATCH_BYTES:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


def _weigh_messages(messages: Sequence[Message]) -> int:
    """`_weigh` of them, without a look at every field."""
    texts = sum(OBJECT_BYTES + len(message.content or "") + len(message.reasoning or "") for message in messages)
    return texts + sum(len(call.function.arguments) + OBJECT_BYTES for message in messages for call in message.tool_calls)


def _weigh(value: object) -> int:
    """About how many bytes of memory a value takes."""
    if isinstance(value, str):
        return OBJECT_BYTES + len(value)
    if isinstance(value, BaseModel):
        return _weigh(list(vars(value).values()))
    if isinstance(value, dict):
        return OBJECT_BYTES + sum(map(_weigh, value)) + sum(map(_weigh, value.values()))
    if isinstance(value, list | tuple):
        return OBJECT_BYTES + sum(map(_weigh, value))
    return OBJECT_BYTES


def _range(scores: set[float]) -> set[float]:
    """The least and the greatest."""
    return {min(scores), max(scores)} if scores else set()
