"""OpenHands: lines of `output.jsonl`, {instance_id, history, test_result, error, metadata}, or a bare list of events, one run.

What the agent said is not in the events but in the response of its model, which each event of an action repeats: the turn is that
response's message, once, however many events it led to. Observations answer its calls by id, verbatim, between the prefix and suffix
that were recorded with them. Errors that answer no call were shown to the agent as a user's turn. Events that only tell the state of the
program, and `recall`, whose text the agent saw in a form that is not recorded, are left out and named.

Where a condenser rewrote the history the events no longer say what the agent saw: such a run is refused, and so is one that delegated
to another agent. `git_patch` says nothing of success; `resolved` of an evaluation's report does. A run that reached its last
iteration is a Timeout. `instance` holds the ground truth and is not stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, cast

from pydantic import JsonValue

from loraloop.chat.openai_messages import take_messages
from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.episode import AnyOutcome, Episode, EpisodeMetadata, Failure, Success, Timeout, Unknown
from loraloop.importers.agent_turns import as_list, as_object, require_list, times_of, to_tools
from loraloop.importers.entry import Entry, convert_entries, find_id, require_clean, require_object, to_tags
from loraloop.importers.json_input import first_object_keys, is_by_line, iter_entries, load_document, opening_keys
from loraloop.training_data import Refusal

_KNOWN = {"instance_id", "test_result", "instruction", "metadata", "history", "metrics", "error", "instance", "report"}
_STATE_ONLY = {"change_agent_state", "agent_state_changed", "null", "recall", "pause", "resume"}
_CONDENSED = {"condensation", "condensation_request", "condense"}
_KNOWN_SAID = {"function_call", "annotations", "provider_specific_fields", "thinking_blocks"}
_MAX_ITERATIONS = "maximum iteration"
_STUCK = "AgentStuckInLoopError"


class OpenHandsImporter:
    """Reads OpenHands' runs. The instance is the task; a bare list of events names none."""

    name: ClassVar[str] = "openhands"
    description: ClassVar[str] = 'OpenHands: lines of {"instance_id", "history", "test_result"}, or a list of {"id", "source", "action", …}'
    lines_stand_alone: ClassVar[Literal[True]] = True

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True for runs with `instance_id` and `history` or `test_result`, and for a list of events."""
        if any("instance_id" in keys and keys & {"history", "test_result"} for keys in opening_keys(head)):
            return True
        return head.lstrip("\ufeff \t\r\n").startswith("[") and {"id", "timestamp", "source"} <= first_object_keys(head)

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """None: a file may be lines of runs or one run."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """One Episode or Refusal for each run, in order. Raises ImportFailed for a file that is no JSON."""
        yield from convert_entries(path, _iter_runs(path), _to_episode)


def _iter_runs(path: Path) -> Iterator[Entry]:
    document = None if is_by_line(path) else load_document(path)
    if isinstance(document, list) and not any("history" in as_object(item) for item in document):
        yield Entry("entry 1", {"history": document})
    else:
        yield from iter_entries(path)


@dataclass
class _Dialogue:
    """The turns of a run as they come out of its events."""

    messages: list[dict[str, object]] = field(default_factory=list)
    tools: object = None
    left_out: set[str] = field(default_factory=set)
    responses: set[str] = field(default_factory=set)
    call_of_event: dict[str, object] = field(default_factory=dict)

    def add(self, event: dict[str, object], place: str) -> None:
        """Take one event. Refused as `several_agents`, `history_rewritten`, `no_content_recorded` or `unsupported_content`."""
        kind = event.get("action") or event.get("observation")
        if not isinstance(kind, str):
            found = f"{place} with keys {show(sorted(event))}"
            raise EntryRefused("bad_shape", found, "an event with `action` or `observation`", "give the events as OpenHands writes them")
        if kind == "delegate":
            raise EntryRefused("several_agents", f"{place} delegates", "one agent's run", "export each agent's run by itself")
        if kind in _CONDENSED:
            advice = "record with the condenser `noop`"
            raise EntryRefused("history_rewritten", f"{place}, {kind}", "the history that the agent saw", advice)
        if kind in _STATE_ONLY:
            self.left_out.add(f"events.{kind}")
        elif event.get("action"):
            self._add_action(event, kind, place)
        else:
            self._add_observation(event)

    def _add_action(self, event: dict[str, object], kind: str, place: str) -> None:
        args, metadata = as_object(event.get("args")), as_object(event.get("tool_call_metadata"))
        if kind == "system":
            self.messages.append({"role": "system", "content": args.get("content")})
            self.tools = args.get("tools") or self.tools
        elif kind == "message" and not metadata:
            if args.get("image_urls"):
                raise EntryRefused("unsupported_content", f"images in {place}", "text and function calls only", "leave the run out")
            self.messages.append({"role": "assistant" if event.get("source") == "agent" else "user", "content": args.get("content")})
        elif metadata:
            self.call_of_event[str(event.get("id"))] = metadata.get("tool_call_id")
            self._add_response(metadata, place)
        elif event.get("source") == "agent":
            found = f"{place}, an action {show(kind)} without the response of the model"
            raise EntryRefused("no_content_recorded", found, "tool_call_metadata.model_response", "record with native tool calling")
        else:
            self.messages.append({"role": "user", "content": args.get("command") or args.get("code") or event.get("message")})

    def _add_response(self, metadata: dict[str, object], place: str) -> None:
        response = as_object(metadata.get("model_response"))
        choices = as_list(response.get("choices"))
        said = as_object(as_object(choices[0]).get("message")) if choices else {}
        if not said:
            found = f"{place}, a call without the response of the model"
            raise EntryRefused("no_content_recorded", found, "tool_call_metadata.model_response", "record the model's responses")
        key = str(response.get("id") or metadata.get("tool_call_id"))
        if key in self.responses:
            return
        self.responses.add(key)
        calls = [
            {name: part for name, part in call.items() if name != "index"} if isinstance(call, dict) else call
            for call in require_list(said.get("tool_calls") or [], "tool_calls")
        ]
        kept = {name: part for name, part in said.items() if name not in _KNOWN_SAID}
        self.messages.append({**kept, "role": "assistant", "tool_calls": calls})

    def _add_observation(self, event: dict[str, object]) -> None:
        metadata, extras = as_object(event.get("tool_call_metadata")), as_object(event.get("extras"))
        around = as_object(extras.get("metadata"))
        content = event.get("content")
        if isinstance(content, str) and event.get("observation") == "run":
            prefix, suffix = (part if isinstance(part, str) else "" for part in (around.get("prefix"), around.get("suffix")))
            content = f"{prefix}{content}{suffix}"
        call_id = metadata.get("tool_call_id") or self.call_of_event.get(str(event.get("cause")))
        if call_id:
            self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
        else:
            self.messages.append({"role": "user", "author": "environment", "content": content})


def _to_episode(value: object) -> Episode:
    run = require_object(value, ("history",), "{instance_id, history, test_result, error}")
    events = _flatten(require_list(run["history"], "history"))
    dialogue = _Dialogue()
    for number, event in enumerate(events, 1):
        dialogue.add(event, f"event {number}")
    metadata, error = as_object(run.get("metadata")), run.get("error")
    model = as_object(metadata.get("llm_config")).get("model")
    require_clean([dialogue.messages, dialogue.tools, run.get("instance_id"), error, model, metadata.get("agent_class"), list(run)])
    taken = take_messages(dialogue.messages, "messages")
    tags = to_tags(
        OpenHandsImporter.name,
        taken.ignored | dialogue.left_out | (run.keys() - _KNOWN),
        decoded_arguments=taken.decoded_arguments,
        error=error,
        model=model,
        agent=metadata.get("agent_class"),
    )
    task_id = find_id(run, "instance_id")
    return Episode(
        task_id=task_id,
        group_id=task_id,
        messages=tuple(taken.messages),
        tools=cast("tuple[dict[str, JsonValue], ...]", to_tools(dialogue.tools)),
        outcome=_find_outcome(run),
        metadata=EpisodeMetadata(scenario=OpenHandsImporter.name, tags=tags, **times_of(event.get("timestamp") for event in events)),
    )


def _flatten(history: list[object]) -> list[dict[str, object]]:
    """The events, also where an older version wrote pairs of action and observation."""
    parts = [item if isinstance(item, list) else [item] for item in history]
    return [require_object(event, (), "an event") for part in parts for event in part]


def _find_outcome(run: dict[str, object]) -> AnyOutcome:
    result = as_object(run.get("test_result"))
    places = [as_object(run.get("report")), as_object(result.get("report")), result]
    resolved = next((place["resolved"] for place in places if isinstance(place.get("resolved"), bool)), None)
    if resolved is True:
        return Success(1.0)
    error = run.get("error") if isinstance(run.get("error"), str) else None
    if error and _MAX_ITERATIONS in str(error):
        return Timeout()
    if error and _STUCK in str(error):
        return Failure("stuck in a loop")
    return Failure("not resolved") if resolved is False else Unknown()
