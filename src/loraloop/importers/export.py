"""Episodes out again: as OpenAI chat lines, or as ATIF trajectories, a line each.

Each line is whole for other programs: a turn that is not to be learned has weight 0 in the one, and is copied context or written by no
model in the other. What these have no place for stands under the key `loraloop`, so `ingest` gives the very same episodes back. Left out,
and counted, are episodes that are open, that have no messages, and those without a turn of the agent, or with
results apart from their calls, in ATIF.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from pydantic import JsonValue

from loraloop.episode import Episode, Message
from loraloop.errors import SettingsError
from loraloop.files import json_line, sync
from loraloop.importers.agent_turns import as_object
from loraloop.importers.exported import KEY, Exported

ATIF_VERSION = "ATIF-v1.7"
"""The first with all that is said here; later ones read it."""

_FIELDS = ("content", "name", "tool_call_id", "is_demo", "author", "weight", "reasoning")


def export(episodes: Iterable[Episode], file: TextIO, format_name: str) -> Counter[str]:
    """Write `episodes` as lines; counts by outcome, and of those left out, as `left out: …`. Raises SettingsError for another format."""
    if format_name not in WRITERS:
        raise SettingsError(f"--format {format_name}: expected {' or '.join(WRITERS)}")
    counts = Counter[str]()
    for episode in episodes:
        why = _why_not(episode, format_name)
        counts[f"left out: {why}" if why else episode.outcome.kind] += 1
        if not why:
            file.write(json_line(WRITERS[format_name](episode)) + "\n")
    return counts


def export_file(episodes: Iterable[Episode], path: Path, format_name: str) -> Counter[str]:
    """`export` into a file, which appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            counts = export(episodes, file, format_name)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    sync(path.parent)
    return counts


def to_openai(episode: Episode) -> dict[str, object]:
    """A line of OpenAI chat data: messages, tools, and `loraloop`. Reasoning is `reasoning_content`."""
    lines, marks = [], {}
    for number, message in enumerate(episode.messages):
        line = message.to_openai()
        if message.reasoning is not None:
            line["reasoning_content"] = message.reasoning
        if message.role == "assistant" and (not message.is_agent or message.weight == 0):
            line["weight"] = 0
        read = {"content": message.content, "name": message.name, "tool_call_id": message.tool_call_id, "reasoning": message.reasoning}
        if mark := _differences(message, read | {"weight": float(line.get("weight", 1))}):
            marks[str(number)] = mark
        lines.append(line)
    tools: dict[str, object] = {"tools": list(episode.tools)} if episode.tools else {}
    task: dict[str, object] = {"task_id": episode.task_id} if episode.task_id else {}
    return {"messages": lines, **tools, **task, KEY: Exported.of(episode, marks).to_json()}


def to_atif(episode: Episode) -> dict[str, object]:
    """An ATIF trajectory. Calls have ids of their own, as theirs may repeat or be missing; arguments that are no object are told apart."""
    steps: list[dict[str, Any]] = []
    marks: dict[str, dict[str, JsonValue]] = {}
    waiting: list[str] = []
    for number, message in enumerate(episode.messages):
        if message.role == "tool":
            call = _next_call(message, waiting, steps[-1]["tool_calls"], episode.messages)
            result = {"source_call_id": call, "content": message.content or ""}
            steps[-1].setdefault("observation", {"results": []})["results"].append(result)
            read: dict[str, object] = {"content": message.content or "", "tool_call_id": call, "is_demo": _is_copied(steps[-1])}
        else:
            step, read = _to_step(message, len(steps) + 1, number)
            steps.append(step)
            waiting = [call["tool_call_id"] for call in step.get("tool_calls", [])]
        mark = _differences(message, read)
        if message.tool_calls:
            mark["tool_calls"] = [call.model_dump(mode="json") for call in message.tool_calls]
        if mark:
            marks[str(number)] = mark
    first = next((step for step in steps if step["source"] == "agent"), None)
    if first is not None and episode.metadata.started_at is not None:
        first["timestamp"] = datetime.fromtimestamp(episode.metadata.started_at / 1000, UTC).isoformat()
    tags = episode.metadata.tags
    tools: dict[str, object] = {"tool_definitions": list(episode.tools)} if episode.tools else {}
    model: dict[str, object] = {"model_name": tags["model"]} if tags.get("model") else {}
    return {
        "schema_version": ATIF_VERSION,
        "session_id": str(episode.id),
        "trajectory_id": str(episode.id),
        "agent": {"name": tags.get("agent") or "unknown", "version": "unknown", **model, **tools},
        "steps": steps,
        "notes": f"exported by loraloop {version('loraloop')}",
        "extra": {KEY: Exported.of(episode, marks).to_json()},
    }


WRITERS: dict[str, Callable[[Episode], dict[str, object]]] = {"openai": to_openai, "atif": to_atif}


def _why_not(episode: Episode, format_name: str) -> str | None:
    if episode.is_open:
        return "open"
    if not episode.messages:
        return "no messages"
    if format_name == "atif" and not any(message.is_agent for message in episode.messages):
        return "no turn of the agent"
    before = (None, *episode.messages[:-1])
    pairs = zip(before, episode.messages, strict=True)
    apart = any(now.role == "tool" and not (was and (was.role == "tool" or was.tool_calls)) for was, now in pairs)
    return "results apart from their calls" if apart and format_name == "atif" else None


def _to_step(message: Message, step_id: int, number: int) -> tuple[dict[str, Any], dict[str, object]]:
    """The step, and what a reader of it takes the message for."""
    is_agent = message.role == "assistant"
    step: dict[str, Any] = {"step_id": step_id, "source": "agent" if is_agent else message.role, "message": message.content or ""}
    read: dict[str, object] = {"content": step["message"], "is_demo": message.is_demo}
    if message.is_demo:
        step["is_copied_context"] = True
    if not is_agent:
        return step, read
    if not message.is_agent and not message.is_demo:
        step["llm_call_count"] = 0
        read["author"] = "harness"
    elif message.reasoning is not None:
        step["reasoning_content"] = read["reasoning"] = message.reasoning
    if message.tool_calls:
        step["tool_calls"] = [
            {"tool_call_id": f"call-{number}-{at}", "function_name": call.function.name, "arguments": _to_object(call.function.arguments)}
            for at, call in enumerate(message.tool_calls)
        ]
    return step, read


def _next_call(message: Message, waiting: list[str], calls: list[dict[str, Any]], messages: tuple[Message, ...]) -> str:
    """The id in the step of the call that a result answers: the one of its id that waits first, else the first that waits."""
    owner = int(calls[0]["tool_call_id"].split("-")[1])
    ids = {f"call-{owner}-{at}": call.id for at, call in enumerate(messages[owner].tool_calls)}
    chosen = next((key for key in waiting if ids[key] == message.tool_call_id), waiting[0] if waiting else calls[-1]["tool_call_id"])
    if chosen in waiting:
        waiting.remove(chosen)
    return str(chosen)


def _differences(message: Message, read: dict[str, object]) -> dict[str, JsonValue]:
    """What `message` has otherwise than a reader takes it for, who takes all that is not in `read` for what a message has by itself."""
    defaults = {name: Message.model_fields[name].default for name in _FIELDS}
    return {name: getattr(message, name) for name in _FIELDS if getattr(message, name) != {**defaults, **read}[name]}


def _to_object(arguments: str) -> dict[str, object]:
    try:
        return as_object(json.loads(arguments))
    except (ValueError, RecursionError):
        return {}


def _is_copied(step: dict[str, Any]) -> bool:
    return step.get("is_copied_context") is True
