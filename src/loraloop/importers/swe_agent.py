"""SWE-agent trajectories: one `.traj` file a run, JSON {environment, trajectory, history, info}; versions 0.x and 1.x.

`history` is the dialogue: text actions in 0.x, tool calls and `tool_call_ids` in 1.x. Messages with `is_demo` are shown examples and
stay so. Thought and action stand in the content already and are not taken twice. `exit_status` never says whether the issue was
resolved, so the outcome is Unknown unless a `results.json` beside the run, or one folder above, says it of this instance.

SWE-agent keeps the examples it shows to models under `trajectories/demonstrations`. Nothing inside such a file tells it from a run of
an agent, so the path does: its turns are all marked `is_demo`, and whatever label it gets later it is never trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from loraloop.episode import Episode, EpisodeMetadata
from loraloop.importers.entry import Entry, EntryRefused, convert_entries, require_clean, require_object, show, to_tags
from loraloop.importers.json_input import first_object_keys, load_document
from loraloop.importers.openai_messages import take_messages
from loraloop.importers.swe_bench import find_instance, find_verdict
from loraloop.training_data import Refusal

SUFFIX = ".traj"

_SAID_IN_CONTENT = {"thought", "action", "agent", "message_type", "tool_call_ids"}
_KNOWN = {"environment", "trajectory", "history", "info", "replay_config"}


class SweAgentImporter:
    """Reads SWE-agent trajectories. The instance is the task: from the file's name, else as the run's settings name it."""

    name: ClassVar[str] = "swe-agent"
    description: ClassVar[str] = 'SWE-agent trajectory: one *.traj file of {"environment", "trajectory", "history", "info"}'

    def detect(self, path: Path, head: str) -> bool:
        """True for an object with `trajectory` and `history` or `environment`; in a `*.traj` file one of them will do."""
        keys = first_object_keys(head)
        if not head.lstrip("\ufeff \t\r\n").startswith("{"):
            return False
        marks = keys & {"environment", "trajectory", "history"}
        return bool(marks) if path.suffix.lower() == SUFFIX else "trajectory" in marks and len(marks) > 1

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """1: a file is a run."""
        return 1

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """The run, or its Refusal. Raises ImportFailed for a file that is no JSON."""
        entries = [Entry("entry 1", load_document(path))]
        yield from convert_entries(path, entries, lambda value: _to_episode(value, path))


def _to_episode(value: object, path: Path) -> Episode:
    run = require_object(value, ("history",), "{environment, trajectory, history, info}")
    info = run.get("info")
    info = info if isinstance(info, dict) else {}
    require_clean([run["history"], info.get("exit_status")])
    _require_one_agent(run["history"])
    taken = take_messages(_to_openai(run["history"]), "history")
    task_id = _to_task_id(path, run.get("replay_config"))
    is_demonstration = _is_demonstration(path)
    messages = [message.model_copy(update={"is_demo": True}) for message in taken.messages] if is_demonstration else taken.messages
    tags = to_tags(
        SweAgentImporter.name,
        taken.ignored | (run.keys() - _KNOWN),
        exit_status=info.get("exit_status"),
        decoded_arguments=taken.decoded_arguments,
        demonstration="path" if is_demonstration else None,
    )
    return Episode(
        task_id=task_id,
        group_id=task_id,
        messages=tuple(messages),
        outcome=find_verdict(path, {path.stem, find_instance(path.stem) or path.stem}),
        metadata=EpisodeMetadata(scenario=SweAgentImporter.name, tags=tags),
    )


def _to_openai(history: object) -> object:
    """The history with the one id of `tool_call_ids` as `tool_call_id`, and without what its content repeats."""
    if not isinstance(history, list):
        return history
    return [_to_openai_message(message) if isinstance(message, dict) else message for message in history]


def _to_openai_message(raw: dict[str, object]) -> dict[str, object]:
    message = {key: value for key, value in raw.items() if key not in _SAID_IN_CONTENT}
    ids = raw.get("tool_call_ids")
    if not ids:
        return message
    if not isinstance(ids, list) or len(ids) != 1:
        found = f"tool_call_ids = {show(ids)}"
        raise EntryRefused("bad_shape", found, "one id, as one result answers one call", "split the result, or leave the run out")
    return {**message, "tool_call_id": ids[0]}


def _require_one_agent(history: object) -> None:
    """Refuse runs of several agents: each saw a part of the history only, and the file does not keep them apart."""
    agents = {str(message.get("agent")) for message in history if isinstance(message, dict)} if isinstance(history, list) else set()
    if len(agents - {"None"}) > 1:
        found = f"messages of the agents {', '.join(sorted(agents))}"
        raise EntryRefused("several_agents", found, "the history of one agent", "export each agent's history by itself")


def _is_demonstration(path: Path) -> bool:
    return "demonstrations" in {part for name in path.parts for part in name.split("__")}


def _to_task_id(path: Path, replay_config: object) -> str:
    return find_instance(path.stem) or _find_named_problem(replay_config) or path.stem


def _find_named_problem(replay_config: object) -> str | None:
    try:
        settings = json.loads(replay_config) if isinstance(replay_config, str) else replay_config
    except (ValueError, RecursionError):
        return None
    problem = settings.get("problem_statement") if isinstance(settings, dict) else None
    name = problem.get("id") if isinstance(problem, dict) else None
    return name if isinstance(name, str) and name else None
