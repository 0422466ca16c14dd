"""ATIF, the Agent Trajectory Interchange Format, 1.0 to 1.8: {schema_version, agent, steps}; alone, in a list, or in lines.

A step of the agent becomes its turn and the results of its calls. Steps marked `is_copied_context` were copied from an earlier
trajectory: the agent saw them, so they stay as context, marked `is_demo`, and are never trained on. Neither are steps with
`llm_call_count` 0, which no model wrote. Thoughts (`reasoning_content`) are kept apart. Every trajectory among `subagent_trajectories`
is an episode of its own, of unknown outcome, as what the whole was paid says nothing of its part.

The document has no place for the reward. It is taken from the trial folder of Harbor that the file lies in (see `harbor`), else from
`extra.agentpile.outcome`, where one converter writes it; else it is Unknown. A task is known in a trial folder only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast

from pydantic import JsonValue

from loraloop.chat.openai_messages import take_messages
from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.episode import AnyOutcome, Episode, EpisodeMetadata, Failure, Success, Unknown
from loraloop.importers.agent_turns import as_list, as_object, require_list, times_of, to_call, to_outcome, to_tools
from loraloop.importers.entry import Entry, convert_entries, require_clean, require_object, to_tags
from loraloop.importers.exported import KEY, Exported
from loraloop.importers.harbor import Trial, find_trial
from loraloop.importers.json_input import iter_entries, opening_keys
from loraloop.training_data import Refusal

_VERSION = re.compile(r"ATIF-v1\.\d{1,3}")
_VERSION_KEY = re.compile(r'"schema_version"\s*:\s*"ATIF-v')
_KNOWN = {
    *("schema_version", "session_id", "trajectory_id", "agent", "steps", "notes", "final_metrics", "extra"),
    *("continued_trajectory_ref", "subagent_trajectories"),
}
_KNOWN_STEP = {
    *("step_id", "timestamp", "source", "model_name", "reasoning_effort", "message", "reasoning_content", "tool_calls", "observation"),
    *("metrics", "llm_call_count", "is_copied_context", "extra"),
}
_EXAMPLE = '{"schema_version": "ATIF-v1.x", "agent": {...}, "steps": [...]}'


class AtifImporter:
    """Reads ATIF trajectories, those of sub-agents as episodes of their own, with the rewards of Harbor's trial folders."""

    name: ClassVar[str] = "atif"
    description: ClassVar[str] = 'ATIF trajectories, also in Harbor\'s trial folders: {"schema_version": "ATIF-v1.x", "agent", "steps"}'
    lines_stand_alone: ClassVar[Literal[True]] = True

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True when a `schema_version` of ATIF stands in the head, and not in lines of `messages`, which may quote one."""
        is_chat = any("messages" in keys and "schema_version" not in keys for keys in opening_keys(head))
        return _VERSION_KEY.search(head) is not None and not is_chat

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """None: a trajectory may hold those of sub-agents."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """One Episode or Refusal for each trajectory, a sub-agent's behind its parent's. Raises ImportFailed for an unreadable file."""
        yield from convert_entries(path, _iter_trajectories(iter_entries(path)), lambda value: _to_episode(value, path))


@dataclass(frozen=True)
class _SubAgent:
    """A trajectory inside another, `parent`."""

    document: object
    parent: str


def _iter_trajectories(entries: Iterable[Entry]) -> Iterator[Entry]:
    for entry in entries:
        waiting = [entry]
        while waiting:
            current = waiting.pop()
            yield current
            document = current.value.document if isinstance(current.value, _SubAgent) else current.value
            parts = as_list(as_object(document).get("subagent_trajectories"))
            parent = str(as_object(document).get("trajectory_id") or as_object(document).get("session_id"))
            inner = [Entry(f"{current.place}, sub-agent {number}", _SubAgent(part, parent)) for number, part in enumerate(parts, 1)]
            waiting.extend(reversed(inner))


def _to_episode(value: object, path: Path) -> Episode:
    sub_agent = value if isinstance(value, _SubAgent) else None
    run = require_object(sub_agent.document if sub_agent else value, ("schema_version", "agent", "steps"), _EXAMPLE)
    if not isinstance(run["schema_version"], str) or not _VERSION.fullmatch(run["schema_version"]):
        found = f"schema_version {show(run['schema_version'])}"
        raise EntryRefused("bad_shape", found, "ATIF-v1.0 to ATIF-v1.8, or a later 1.x", "convert it to one of these")
    require_clean({key: part for key, part in run.items() if key != "subagent_trajectories"})
    agent = require_object(run["agent"], ("name",), "an agent with its name")
    steps = [require_object(step, ("source",), "a step with its source") for step in require_list(run["steps"], "steps")]
    exported = as_object(run.get("extra")).get(KEY)
    taken = take_messages([message for step in steps for message in _to_messages(step, keep_empty=exported is not None)], "messages")
    if exported is not None:
        written = cast("tuple[dict[str, JsonValue], ...]", to_tools(agent.get("tool_definitions")))
        return Exported.parse(exported).restore(taken.messages, written)
    trial = find_trial(path) if sub_agent is None else None
    tags = to_tags(
        AtifImporter.name,
        taken.ignored | (run.keys() - _KNOWN) | {f"steps.{key}" for step in steps for key in step.keys() - _KNOWN_STEP},
        decoded_arguments=taken.decoded_arguments,
        schema_version=run["schema_version"],
        trajectory_id=run.get("trajectory_id") or run.get("session_id"),
        continued_in=run.get("continued_trajectory_ref"),
        parent_trajectory=sub_agent.parent if sub_agent else None,
        agent=agent["name"],
        model=agent.get("model_name"),
        copied_context=sum(step.get("is_copied_context") is True for step in steps) or None,
        **(trial.tags if trial else {}),
    )
    return Episode(
        task_id=trial.task_id if trial else None,
        group_id=trial.task_id if trial else None,
        messages=tuple(taken.messages),
        tools=cast("tuple[dict[str, JsonValue], ...]", to_tools(agent.get("tool_definitions"))),
        outcome=Unknown() if sub_agent else _find_outcome(trial, run),
        metadata=EpisodeMetadata(scenario=AtifImporter.name, tags=tags, **times_of(step.get("timestamp") for step in steps)),
    )


def _to_messages(step: dict[str, object], *, keep_empty: bool) -> list[dict[str, object]]:
    """The turn of a step and the results in it; results that answer no call are what the environment showed.

    Steps of others without words are left out, as they only carry results, unless `keep_empty`.
    """
    source = step["source"]
    if source not in ("system", "user", "agent"):
        raise EntryRefused("bad_shape", f"source {show(source)}", "system, user or agent", "write the step's source as one of these")
    calls = _to_calls(step)
    results = [require_object(result, (), "a result") for result in as_list(as_object(step.get("observation")).get("results"))]
    if len(calls) > 1 and len(results) == 1 and results[0].get("source_call_id") is None:
        found = f"one result for the {len(calls)} calls of step {show(step.get('step_id'))}"
        advice = "record it with a result for each call; Terminus: with raw_content, which keeps the agent's own words"
        raise EntryRefused("unanswered_tool_call", found, "a result for every call", advice)
    marks = {"is_demo": True} if step.get("is_copied_context") is True else {}
    turn: dict[str, object] = {"role": "assistant" if source == "agent" else source, "content": step.get("message"), **marks}
    if source == "agent":
        turn |= {"tool_calls": calls, "reasoning_content": step.get("reasoning_content")}
        turn |= {"author": "harness"} if step.get("llm_call_count") == 0 else {}
    shown = [{**_to_result(result, has_calls=bool(calls)), **marks} for result in results if result.get("content") is not None or calls]
    has_words = keep_empty or turn["content"] not in (None, "", []) or source == "agent"
    return [*([turn] if has_words else []), *shown]


def _to_calls(step: dict[str, object]) -> list[dict[str, object]]:
    raw = [require_object(call, ("function_name", "arguments"), "a call with function_name") for call in as_list(step.get("tool_calls"))]
    return [to_call(call.get("tool_call_id"), call["function_name"], call["arguments"]) for call in raw]


def _to_result(result: dict[str, object], *, has_calls: bool) -> dict[str, object]:
    if has_calls:
        return {"role": "tool", "tool_call_id": result.get("source_call_id"), "content": result.get("content")}
    return {"role": "user", "author": "environment", "content": result["content"]}


def _find_outcome(trial: Trial | None, run: dict[str, object]) -> AnyOutcome:
    if trial:
        return trial.outcome
    said = as_object(as_object(as_object(run.get("extra")).get("agentpile")).get("outcome"))
    if said.get("score") is not None:
        return to_outcome(said["score"], "score")
    if isinstance(said.get("success"), bool):
        return Success(1.0) if said["success"] else Failure("not solved")
    return Unknown()
