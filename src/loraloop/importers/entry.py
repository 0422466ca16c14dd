"""One entry of a file on its way in: it becomes an Episode, or a Refusal that names its place and what to do about it.

Shared by all importers. An importer turns the entry's JSON value into an Episode and raises `EntryRefused` where it cannot; this
module adds the file and the place. It guarantees that the id of an imported episode depends on what was imported and on nothing
else, and `require_clean` that no text gets in which UTF-8 or a database cannot hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from loraloop.chat.refused_entry import EntryRefused, shorten, show
from loraloop.episode import Episode, EpisodeId
from loraloop.files import canonical_json, text_hash
from loraloop.importers.content_text import content_text
from loraloop.training_data import Refusal

MAX_DEPTH = 100
"""How deep an entry's JSON may nest: real tool schemas stay below 20, and some readers give up at 255."""
IGNORED_KEYS_TAG = "ignored_keys"
"""The tag that lists, as a JSON list, the keys of an entry that an Episode has no place for."""


@dataclass(frozen=True)
class Entry:
    """One entry as read: `place` is "line 3" or "entry 3" (from 1), and either its JSON value or why it has none."""

    place: str
    value: object = None
    problem: EntryRefused | None = None


def convert_entries(path: Path, entries: Iterable[Entry], convert: Callable[[object], Episode]) -> Iterator[Episode | Refusal]:
    """Each entry as `convert` makes it, under its content id, or a Refusal with file, place, found, expected, do this."""
    for entry in entries:
        try:
            if entry.problem is not None:
                raise entry.problem
            episode = convert(entry.value)
            require_clean([episode.task_id, episode.group_id, episode.metadata.tags])
            result: Episode | Refusal = with_content_id(episode)
        except EntryRefused as error:
            result = Refusal(reason=error.reason, detail=f"{path}, {entry.place}: {error}")
        yield result


def with_content_id(episode: Episode) -> Episode:
    """`episode` under the id that follows from everything it says except its present id, the time it was taken in, and its terms."""
    return episode.model_copy(update={"id": EpisodeId.from_content(text_hash(content_text(episode)))})


def require_clean(value: object) -> None:
    """Refuse text with NUL or half a surrogate pair (`bad_encoding`), numbers that are not finite and deep nesting (`bad_shape`).

    JSON can spell all of these, but UTF-8 files, databases and JSON writers cannot take them.
    """
    if _is_clean(value):
        return
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise EntryRefused("bad_shape", f"values nested deeper than {MAX_DEPTH}", "less", "flatten it or leave it out")
        if isinstance(item, str):
            _require_clean_text(item)
        elif isinstance(item, float) and not math.isfinite(item):
            raise EntryRefused("bad_shape", f"the number {item}", "a finite number, as JSON has no others", "write null")
        elif isinstance(item, dict):
            waiting.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list):
            waiting.extend((part, depth + 1) for part in item)


def is_clean_text(text: str) -> bool:
    """Whether `text` has neither NUL nor half a surrogate pair."""
    if "\0" in text:
        return False
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return True


def require_object(value: object, keys: Iterable[str], example: str) -> dict[str, object]:
    """`value` as an object that has all `keys`; refused as `bad_shape` otherwise. `example` says what an entry looks like."""
    if isinstance(value, dict) and all(key in value for key in keys):
        return value
    found = f"keys {show(sorted(value))}" if isinstance(value, dict) else show(value)
    raise EntryRefused("bad_shape", found, example, "write the entry so, or give the file's own --format")


def find_id(row: dict[str, object], key: str) -> str | None:
    """The name or number under `key` as text; None when there is none. Refused as `bad_shape` when it is something else."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise EntryRefused("bad_shape", f"{key} = {show(value)}", "an integer or a name", f"write `{key}` as one of these")
    return str(value)


def require_text(row: dict[str, object], key: str) -> str:
    """The text under `key`; refused as `bad_shape` when there is none."""
    value = row.get(key)
    if not isinstance(value, str):
        raise EntryRefused("bad_shape", f"{key} = {show(value)}", "text", f"write `{key}` as text")
    return value


def to_tags(format_name: str, ignored: Iterable[str] = (), **said: object) -> dict[str, str]:
    """The tags of an imported episode, sorted: its format, what was `said` besides the messages (None is not), what was ignored.

    Refused as `require_clean` refuses what was said.
    """
    require_clean(said)
    tags = {key: value if isinstance(value, str) else canonical_json(value) for key, value in said.items() if value is not None}
    return dict(sorted({**tags, "format": format_name, **ignored_tag(ignored)}.items()))


def ignored_tag(names: Iterable[str]) -> dict[str, str]:
    """The tag that lists keys left behind, each once and sorted; no tag when there are none."""
    distinct = sorted(set(names))
    return {IGNORED_KEYS_TAG: canonical_json(distinct)} if distinct else {}


def _is_clean(value: object) -> bool:
    """Whether there is certainly nothing to refuse; level by level, and without looking for the words to say what there is."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[object] = []
        for item in level:
            kind = type(item)
            if kind is str:
                if not is_clean_text(cast("str", item)):
                    return False
            elif kind is dict:
                below += cast("dict[object, object]", item)
                below += cast("dict[object, object]", item).values()
            elif kind is list:
                below += cast("list[object]", item)
            elif not (item is None or kind is bool or kind is int or (kind is float and math.isfinite(cast("float", item)))):
                return False
        if not below:
            return True
        level = below
    return False


def _require_clean_text(text: str) -> None:
    if "\0" in text:
        found = f"a NUL character after '{_before(text, text.index(chr(0)))}'"
        advice = "remove the NUL characters or write them as visible text"
        raise EntryRefused("bad_encoding", found, "text without NUL, which databases cannot store", advice)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"half of a surrogate pair, {shorten(text[error.start])}, after '{_before(text, error.start)}'"
        raise EntryRefused("bad_encoding", found, "text that UTF-8 can hold", "write the whole pair, or U+FFFD") from error


def _before(text: str, at: int) -> str:
    return shorten(text[max(0, at - 30) : at])
