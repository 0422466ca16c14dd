"""Claude Code logs: JSON Lines of {type, uuid, parentUuid, sessionId, message}; a file is a session, or what a sub-agent did in one.

Lines form a tree. The dialogue is the path from the last line back to its root: what was rewound lies on other branches. A response of
the model is written as one line for each content block, with results in between and on branches of their own, so lines of one
`message.id` are one turn, and results of its calls belong to the path wherever they hang. A compaction begins a new root: what was
before it is an episode of its own, what comes after opens with the summary, which the agent saw. Lines of a sub-agent
(`isSidechain`) are another episode, tagged `parent_session`.

Not dialogue, and left out by name: `isMeta`, errors of the API, turns that the program made up, attachments, states of the program. System
prompt, tool schemas and outcome are not recorded, so the outcome is Unknown until it is labelled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, cast

from loraloop.chat.openai_messages import take_messages
from loraloop.episode import Episode, EpisodeMetadata
from loraloop.importers.agent_turns import as_list, as_object, times_of
from loraloop.importers.anthropic_messages import Blocks
from loraloop.importers.entry import Entry, convert_entries, require_clean, to_tags
from loraloop.importers.json_input import iter_entries, opening_keys
from loraloop.training_data import Refusal

_SYNTHETIC = "<synthetic>"
_SPOKEN = ("user", "assistant")


class ClaudeCodeImporter:
    """Reads Claude Code's session logs. Nothing in them names a task; the session is a tag."""

    name: ClassVar[str] = "claude-code"
    description: ClassVar[str] = 'Claude Code session log: JSON Lines of {"type", "uuid", "parentUuid", "sessionId", "message"}'

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True when a line has `sessionId` with `uuid` or `parentUuid`, or is a summary with `leafUuid`."""
        keys = opening_keys(head)
        return any(("sessionId" in one and one & {"uuid", "parentUuid"}) or {"type", "leafUuid"} <= one for one in keys)

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """None: many lines are one episode."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """An Episode or Refusal for each stretch of dialogue, oldest first, behind the Refusals of lines that cannot be read.

        Holds one file in memory, as its last line decides what belongs to the dialogue. Raises ImportFailed for an unreadable file.
        """
        yield from convert_entries(path, _iter_dialogues(path), _to_episode)


@dataclass(frozen=True)
class _Line:
    """One line of the log with its place in the file."""

    number: int
    raw: dict[str, object]

    @property
    def message(self) -> dict[str, object]:
        return as_object(self.raw.get("message"))

    @property
    def response_id(self) -> str | None:
        """Which response of the model it is a block of; None for other lines."""
        key = self.message.get("id")
        return key if self.raw.get("type") == "assistant" and isinstance(key, str) else None

    def blocks(self, kind: str) -> list[dict[str, object]]:
        """The content blocks of one type."""
        return [block for block in as_list(self.message.get("content")) if isinstance(block, dict) and block.get("type") == kind]


@dataclass
class _Thread:
    """The lines of one session, or of one sub-agent in it."""

    lines: list[_Line] = field(default_factory=list)
    by_uuid: dict[str, _Line] = field(default_factory=dict)

    def add(self, line: _Line) -> None:
        """A line; one that was written before, as resumed sessions do, is not taken again."""
        uuid = line.raw.get("uuid")
        if isinstance(uuid, str):
            if uuid in self.by_uuid:
                return
            self.by_uuid[uuid] = line
        self.lines.append(line)

    def dialogues(self) -> list[list[_Line]]:
        """The stretches between compactions, oldest first, each as the lines of its path in the order of the file."""
        if not any(line.raw.get("parentUuid") for line in self.lines):
            return [self.lines]
        leaf = next((line for line in reversed(self.lines) if line.raw["type"] in _SPOKEN and line.raw.get("uuid")), self.lines[-1])
        found: list[list[_Line]] = []
        seen: set[int] = set()
        while True:
            path, before = self._path(leaf, seen)
            found.append(self._with_results(path))
            if before is None:
                return found[::-1]
            leaf = before

    def _path(self, leaf: _Line, seen: set[int]) -> tuple[list[_Line], _Line | None]:
        """The lines from `leaf` back to its root, and the last line before the compaction that the root is, if it is one."""
        path, line = [], leaf
        while line.number not in seen:
            seen.add(line.number)
            path.append(line)
            parent = self.by_uuid.get(str(line.raw.get("parentUuid")))
            if parent is None:
                break
            line = parent
        before = self.by_uuid.get(str(path[-1].raw.get("logicalParentUuid"))) if path else None
        return path, before if before is not None and before.number not in seen else None

    def _with_results(self, path: list[_Line]) -> list[_Line]:
        """`path` with the other lines of its responses, and with the results of its calls that hang on branches."""
        chosen = {line.number: line for line in path}
        ids = {line.response_id for line in path} - {None}
        chosen |= {line.number: line for line in self.lines if line.response_id in ids}
        calls = {str(block.get("id")) for line in chosen.values() for block in line.blocks("tool_use")}
        answered = {str(block.get("tool_use_id")) for line in chosen.values() for block in line.blocks("tool_result")}
        for line in self.lines:
            results = {str(block.get("tool_use_id")) for block in line.blocks("tool_result")}
            if results and results <= calls - answered:
                chosen[line.number] = line
                answered |= results
        return [chosen[number] for number in sorted(chosen)]


@dataclass(frozen=True)
class _Dialogue:
    """A stretch of dialogue; `sub_agent` names whose it is when it is not the session's own."""

    lines: list[_Line]
    sub_agent: str | None


def _iter_dialogues(path: Path) -> Iterator[Entry]:
    threads: dict[tuple[str, str | None], _Thread] = {}
    for number, entry in enumerate(iter_entries(path), 1):
        if entry.problem is not None:
            yield entry
            continue
        raw = as_object(entry.value)
        if not isinstance(raw.get("type"), str) or not isinstance(raw.get("sessionId"), str):
            continue  # a summary or a state of the program: lines of dialogue name their session
        agent = str(raw.get("agentId") or "sidechain") if raw.get("isSidechain") is True else None
        threads.setdefault((str(raw["sessionId"]), agent), _Thread()).add(_Line(number, raw))
    for (session, agent), thread in threads.items():
        for lines in thread.dialogues():
            place = f"line {lines[0].number} to {lines[-1].number}, session {session}" + (f", sub-agent {agent}" if agent else "")
            yield Entry(place, _Dialogue(lines, agent))


def _to_episode(value: object) -> Episode:
    dialogue = cast("_Dialogue", value)
    lines, left_out = [], set[str]()
    for line in dialogue.lines:
        reason = _not_dialogue(line)
        left_out |= {reason} if reason else set()
        lines += [] if reason else [line]
    messages = _merge(lines)
    first, models = dialogue.lines[0].raw, [line.message.get("model") for line in lines]
    model = next((name for name in reversed(models) if isinstance(name, str)), None)
    require_clean([[message for _, message in messages], model, first.get("sessionId"), first.get("version"), dialogue.sub_agent])
    blocks = Blocks()
    for number, message in messages:
        blocks.add(message, f"line {number}")
    taken = take_messages(blocks.messages, "messages")
    session = first.get("sessionId")
    tags = to_tags(
        ClaudeCodeImporter.name,
        taken.ignored | blocks.ignored | left_out,
        decoded_arguments=taken.decoded_arguments,
        session=None if dialogue.sub_agent else session,
        parent_session=session if dialogue.sub_agent else None,
        agent=f"claude-code {first.get('version')}",
        model=model,
    )
    times = times_of(line.raw.get("timestamp") for line in dialogue.lines)
    return Episode(messages=tuple(taken.messages), metadata=EpisodeMetadata(scenario=ClaudeCodeImporter.name, tags=tags, **times))


def _not_dialogue(line: _Line) -> str | None:
    """Under which name a line is left out; None when it is part of the dialogue."""
    raw = line.raw
    if raw["type"] not in _SPOKEN:
        return f"lines.{raw.get('subtype') if isinstance(raw.get('subtype'), str) else raw['type']}"
    if raw.get("isMeta") is True:
        return "lines.isMeta"
    if raw.get("isApiErrorMessage") is True:
        return "lines.api_error"
    return "lines.synthetic" if line.message.get("model") == _SYNTHETIC else None


def _merge(lines: list[_Line]) -> list[tuple[int, dict[str, object]]]:
    """(line, message): the lines of one response as one message, where its first line stands."""
    merged: list[tuple[int, dict[str, object]]] = []
    responses: dict[str, dict[str, object]] = {}
    for line in lines:
        message, key = line.message, line.response_id
        content = message.get("content")
        if key is not None and isinstance(content, list):
            if key in responses:
                responses[key]["content"] = [*as_list(responses[key]["content"]), *content]
                continue
            responses[key] = message = {**message, "content": content}
        merged.append((line.number, message))
    return merged
