"""SWE-agent trajectories: one `.traj` file a run, JSON {environment, trajectory, history, info}; versions 0.x and 1.x.

`history` is the dialogue: text actions in 0.x, tool calls, `tool_call_ids` and `thinking_blocks` in 1.x. Messages with `is_demo` are
shown examples and stay so. Thought and action stand in the content already and are not taken twice. `exit_status` never says whether
the issue was resolved, so the outcome is Unknown unless a `results.json` beside the run, or one folder above, says it of this instance;
a run whose budget ended before it submitted anything is a Timeout.

A retrying agent of 1.x keeps all its `attempts` beside the chosen one. Each is an episode; the evaluation saw the chosen one only.
Where a history processor shortened observations, the queries of the `trajectory` tell; the episode has them whole, tagged
`elided_history`.

SWE-agent keeps the examples it shows to models under `trajectories/demonstrations`. Nothing inside such a file tells it from a run of
an agent, so the path does: its turns are all marked `is_demo`, and whatever label it gets later it is never trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loraloop.chat.openai_messages import take_messages
from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.episode import AnyOutcome, Episode, EpisodeMetadata, Success, Timeout, Unknown
from loraloop.importers.agent_turns import as_list, as_object
from loraloop.importers.entry import Entry, convert_entries, require_clean, require_object, to_tags
from loraloop.importers.json_input import first_object_keys, load_document
from loraloop.importers.swe_bench import find_instance, find_verdict
from loraloop.training_data import Refusal

SUFFIX = ".traj"

_SAID_IN_CONTENT = {"thought", "action", "agent", "message_type", "tool_call_ids"}
_KNOWN = {"environment", "trajectory", "history", "info", "replay_config", "attempts"}
_OUT_OF_BUDGET = {"exit_cost", "exit_total_execution_time"}
_ELIDED = "Old environment output: ("


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
        """None: a run may hold several attempts."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """The run, or its Refusal, and then the attempts that were not chosen. Raises ImportFailed for a file that is no JSON."""
        yield from convert_entries(path, _iter_attempts(load_document(path)), lambda value: _to_episode(value, path))


@dataclass(frozen=True)
class _Attempt:
    """An attempt of a retrying agent that it did not choose, and the settings that all attempts share."""

    run: object
    replay_config: object


def _iter_attempts(document: object) -> Iterator[Entry]:
    yield Entry("entry 1", document)
    run = as_object(document)
    chosen = as_object(run.get("info")).get("best_attempt_idx")
    for number, attempt in enumerate(as_list(run.get("attempts"))):
        if number != chosen and as_object(attempt).get("history") != run.get("history"):
            yield Entry(f"entry 1, attempt {number + 1}", _Attempt(attempt, run.get("replay_config")))


def _to_episode(value: object, path: Path) -> Episode:
    attempt = value if isinstance(value, _Attempt) else None
    run = require_object(attempt.run if attempt else value, ("history",), "{environment, trajectory, history, info}")
    info, replay_config = as_object(run.get("info")), run.get("replay_config") or (attempt.replay_config if attempt else None)
    settings = _load_settings(replay_config)
    problem, model = _find_name(settings, "problem_statement", "id"), _find_name(settings, "agent", "model", "name")
    require_clean([run["history"], info.get("exit_status"), problem, model, list(run)])
    _require_one_agent(run["history"])
    taken = take_messages(_to_openai(run["history"]), "history")
    task_id = find_instance(path.stem) or problem or path.stem
    is_demonstration = _is_demonstration(path)
    messages = [message.model_copy(update={"is_demo": True}) for message in taken.messages] if is_demonstration else taken.messages
    tags = to_tags(
        SweAgentImporter.name,
        taken.ignored | (run.keys() - _KNOWN),
        exit_status=info.get("exit_status"),
        model=model,
        attempt="not chosen" if attempt else None,
        elided_history="true" if _is_elided(run.get("trajectory")) else None,
        decoded_arguments=taken.decoded_arguments,
        demonstration="path" if is_demonstration else None,
    )
    return Episode(
        task_id=task_id,
        group_id=task_id,
        messages=tuple(messages),
        outcome=_find_outcome(info, Unknown() if attempt else find_verdict(path, {path.stem, task_id})),
        metadata=EpisodeMetadata(scenario=SweAgentImporter.name, tags=tags),
    )


def _to_openai(history: object) -> object:
    """The history with the one id of `tool_call_ids` as `tool_call_id`, and without what its content repeats."""
    if not isinstance(history, list):
        return history
    return [_to_openai_message(message) if isinstance(message, dict) else message for message in history]


def _to_openai_message(raw: dict[str, object]) -> dict[str, object]:
    message = {key: value for key, value in raw.items() if key not in _SAID_IN_CONTENT}
    thoughts = [as_object(block).get("thinking") for block in as_list(message.pop("thinking_blocks", None))]
    if any(isinstance(thought, str) for thought in thoughts):
        message["reasoning_content"] = "\n".join(thought for thought in thoughts if isinstance(thought, str))
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


def _load_settings(replay_config: object) -> object:
    """The settings of a run, which it keeps as JSON text; None where they cannot be read."""
    try:
        return json.loads(replay_config) if isinstance(replay_config, str) else replay_config
    except (ValueError, RecursionError):
        return None


def _find_name(settings: object, *keys: str) -> str | None:
    for key in keys:
        settings = as_object(settings).get(key)
    return settings if isinstance(settings, str) and settings else None


def _is_elided(trajectory: object) -> bool:
    """Whether a query of the last step, which repeats the history as it was shown, has an observation that was cut out."""
    steps = as_list(trajectory)
    last = as_object(steps[-1]) if steps else {}
    shown = as_list(last.get("query") or last.get("messages"))
    return any(_ELIDED in str(as_object(message).get("content")) for message in shown)


def _find_outcome(info: dict[str, object], verdict: AnyOutcome) -> AnyOutcome:
    status = info.get("exit_status")
    is_timeout = isinstance(status, str) and status in _OUT_OF_BUDGET and not isinstance(verdict, Success)
    return Timeout() if is_timeout else verdict
