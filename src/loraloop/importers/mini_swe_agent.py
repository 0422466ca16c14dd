"""mini-swe-agent trajectories: a bare list of messages, or {info, messages, trajectory_format, instance_id}; one run a file.

Messages are OpenAI messages: one fenced command in each of the agent's turns and observations as user turns, or tool calls in newer
versions. A last message of role `exit` is the program's own note and left out. The task is the instance, where the file or its name
says one, else the prompt: the same system prompt and first turn are the same task. `exit_status` never says whether the issue was
resolved, so that is read from the evaluation near the file (see `swe_bench`); a run that reached a limit is a Timeout.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from loraloop.chat.openai_messages import take_messages
from loraloop.episode import AnyOutcome, Episode, EpisodeMetadata, Success, Timeout, Unknown
from loraloop.files import content_hash
from loraloop.importers.agent_turns import as_object, require_list, times_of
from loraloop.importers.entry import Entry, convert_entries, find_id, require_clean, require_object, to_tags
from loraloop.importers.json_input import first_object_keys, is_by_line, iter_entries, load_document
from loraloop.importers.swe_bench import find_instance, find_verdict
from loraloop.training_data import Refusal

SUFFIX = ".traj.json"

_MARKS = ("mswea_bash_command", "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT", "MINI_SWE_AGENT_FINAL_OUTPUT")
_RUN_MARKS = ('"mini_version"', '"model_stats"')
_LIMITS = {"LimitsExceeded", "TimeExceeded"}
_KNOWN = {"info", "messages", "trajectory_format", "instance_id"}
_KNOWN_MESSAGE = {"extra", "thinking_blocks", "provider_specific_fields", "annotations", "cache_control"}


class MiniSweAgentImporter:
    """Reads mini-swe-agent trajectories of all versions that write chat messages."""

    name: ClassVar[str] = "mini-swe-agent"
    description: ClassVar[str] = 'mini-swe-agent: one *.traj.json file, a list of messages or {"info", "messages", "trajectory_format"}'

    def detect(self, path: Path, head: str) -> bool:
        """True for an object with `trajectory_format` or marks of the program, and for a list of messages in a `.traj.json` file."""
        keys = first_object_keys(head)
        if head.lstrip("\ufeff \t\r\n").startswith("["):
            return {"role", "content"} <= keys and (path.name.lower().endswith(SUFFIX) or any(mark in head for mark in _MARKS))
        return "trajectory_format" in keys or ({"info", "messages"} <= keys and any(mark in head for mark in _RUN_MARKS))

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """None: a file is a run, or lines of them."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """The run or runs, each an Episode or a Refusal. Raises ImportFailed for a file that is no JSON."""
        yield from convert_entries(path, _iter_runs(path), lambda run: _to_episode(run, path))


def _iter_runs(path: Path) -> Iterator[Entry]:
    document = None if is_by_line(path) else load_document(path)
    if isinstance(document, list) and any("role" in as_object(item) for item in document):
        yield Entry("entry 1", {"messages": document})
    else:
        yield from iter_entries(path)


def _to_episode(value: object, path: Path) -> Episode:
    run = require_object(value, ("messages",), "{info, messages, trajectory_format}, or a list of messages")
    info = as_object(run.get("info"))
    model = as_object(as_object(info.get("config")).get("model")).get("model_name")
    raw = [
        require_object(message, ("role",), "a message with its role")
        for message in require_list(run["messages"], "messages")
        if as_object(message).get("role") != "exit"
    ]
    said = [{key: part for key, part in message.items() if key not in _KNOWN_MESSAGE} for message in raw]
    require_clean([said, run.get("instance_id"), info.get("exit_status"), model, list(run)])
    taken = take_messages(said, "messages")
    name = path.name.removesuffix(SUFFIX)
    task_id = find_id(run, "instance_id") or find_instance(name) or _to_task_id(said)
    tags = to_tags(
        MiniSweAgentImporter.name,
        taken.ignored | (run.keys() - _KNOWN),
        decoded_arguments=taken.decoded_arguments,
        exit_status=info.get("exit_status"),
        model=model,
    )
    return Episode(
        task_id=task_id,
        group_id=task_id,
        messages=tuple(taken.messages),
        outcome=_find_outcome(info, find_verdict(path, {task_id or name, name})),
        metadata=EpisodeMetadata(
            scenario=MiniSweAgentImporter.name,
            tags=tags,
            **times_of(as_object(message.get("extra")).get("timestamp") for message in raw),
        ),
    )


def _to_task_id(messages: list[dict[str, object]]) -> str | None:
    first_turn = next((at for at, message in enumerate(messages) if message["role"] == "assistant"), 0)
    return content_hash(messages[:first_turn], 12) if first_turn else None


def _find_outcome(info: dict[str, object], verdict: AnyOutcome) -> AnyOutcome:
    if isinstance(verdict, Success):
        return verdict
    status = info.get("exit_status")
    if isinstance(status, str) and status in _LIMITS:
        return Timeout()
    return Unknown() if info.get("traceback") else verdict
