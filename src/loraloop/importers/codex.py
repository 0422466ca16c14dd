"""Codex rollout logs: JSON Lines of {timestamp, type, payload} that begin with `session_meta`; a file is a session.

The dialogue is in the `response_item` lines, items of the Responses API (see `responses_items`); `event_msg` lines repeat it and are not
read. Where `compacted` replaced the history, what follows is another episode: it opens with the replacement, or with the summary
where that is all there is. A sub-agent's file begins with its parent's history, which is context and never trained on. Lines of types
that are not known are skipped, counted and named. Neither tools nor outcome are recorded, so the outcome is Unknown until labelled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, cast

from loraloop.chat.openai_messages import take_messages
from loraloop.episode import Episode, EpisodeMetadata
from loraloop.importers.agent_turns import as_list, as_object, times_of
from loraloop.importers.entry import Entry, convert_entries, require_clean, to_tags
from loraloop.importers.json_input import iter_entries, opening_keys
from loraloop.importers.responses_items import Items
from loraloop.training_data import Refusal

_KNOWN = ("session_meta", "turn_context", "response_item", "event_msg", "compacted")
_MARKS = ('"session_meta"', '"response_item"')


class CodexImporter:
    """Reads Codex's rollout logs. Nothing in them names a task; the session is a tag."""

    name: ClassVar[str] = "codex"
    description: ClassVar[str] = 'Codex rollout log: JSON Lines of {"timestamp", "type", "payload"} that begin with a session_meta'

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True for lines of `timestamp`, `type` and `payload` of which one is a session's or an item."""
        return any(mark in head for mark in _MARKS) and any({"timestamp", "type", "payload"} <= keys for keys in opening_keys(head))

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """None: many lines are one episode."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """An Episode or Refusal for each stretch between compactions, in order, and a Refusal for each line that cannot be read.

        Raises ImportFailed for an unreadable file.
        """
        yield from convert_entries(path, _iter_stretches(path), _to_episode)


@dataclass
class _Stretch:
    """The lines of dialogue between two compactions, and what the session says of itself."""

    meta: dict[str, object] = field(default_factory=dict)
    items: list[tuple[int, object]] = field(default_factory=list)
    """(line, item)"""
    n_copied: int = 0
    """How many of the first items are another agent's history."""
    model: object = None
    times: list[object] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def _iter_stretches(path: Path) -> Iterator[Entry]:
    current, number = _Stretch(), 0
    for number, entry in enumerate(iter_entries(path), 1):
        if entry.problem is not None:
            yield entry
            continue
        line = as_object(entry.value)
        kind, payload = line.get("type"), as_object(line.get("payload"))
        if kind == "compacted":
            if current.items:
                yield _to_entry(current, number - 1)
            current = _Stretch(meta=current.meta, model=current.model)
            replaced = as_list(payload.get("replacement_history")) or [
                {"type": "message", "role": "user", "content": payload.get("message")}
            ]
            current.items = [(number, item) for item in replaced]
        elif kind == "session_meta":
            current.meta = current.meta or payload
            copied = payload.get("subagent_history_start_ordinal")
            current.n_copied = copied if isinstance(copied, int) else current.n_copied
        elif kind == "turn_context":
            current.model = payload.get("model") or current.model
        elif kind == "response_item":
            current.items.append((number, line.get("payload")))
            current.times.append(line.get("timestamp"))
        elif kind not in _KNOWN:
            current.skipped.append(str(kind))
    if current.items or current.meta:
        yield _to_entry(current, number)


def _to_entry(stretch: _Stretch, last: int) -> Entry:
    first = stretch.items[0][0] if stretch.items else 1
    return Entry(f"line {first} to {last}", stretch)


def _to_episode(value: object) -> Episode:
    stretch = cast("_Stretch", value)
    instructions = stretch.meta.get("base_instructions") or stretch.meta.get("instructions")
    text = as_object(instructions).get("text") if isinstance(instructions, dict) else instructions
    require_clean([[item for _, item in stretch.items], text, stretch.model, stretch.skipped, stretch.meta.get("id")])
    items = Items()
    if isinstance(text, str) and text:
        items.messages.append({"role": "system", "content": text})
    for at, (number, item) in enumerate(stretch.items):
        items.marks = {"is_demo": True} if at < stretch.n_copied else {}
        items.add(item, f"line {number}")
    taken = take_messages(items.messages, "messages")
    tags = to_tags(
        CodexImporter.name,
        taken.ignored | items.ignored | {f"lines.{kind}" for kind in stretch.skipped},
        decoded_arguments=taken.decoded_arguments,
        session=stretch.meta.get("id"),
        agent=f"codex {stretch.meta.get('cli_version')}",
        model=stretch.model,
        custom_calls=items.n_custom or None,
        copied_context=stretch.n_copied or None,
        skipped_lines=len(stretch.skipped) or None,
    )
    times = times_of(stretch.times)
    return Episode(messages=tuple(taken.messages), metadata=EpisodeMetadata(scenario=CodexImporter.name, tags=tags, **times))
