"""tau2-bench results: {timestamp, info, tasks, simulations}, or a `results.json` with a folder `simulations` of one run a file.

The agent's side of a run is told. Calls of the simulated user, with their results, were invisible to the agent and are left out and
counted. The system prompt is no message of a run: it is put together from the policy, and the ticket where the agent worked alone; tau2's
fixed instructions around them are recorded nowhere (tag `system_prompt`). Where the model's own response is recorded, a turn is
what it says: arguments as the model wrote them, and the call `done` that tau2 replaced by its stop mark. The greeting that opens
every conversation and a stop mark without a response were written by the harness. What tasks expect is ground truth and is not stored.

A run that ran out of steps is a Timeout with its reward; one that the infrastructure or the simulated user broke is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, cast

from pydantic import JsonValue

from loraloop.chat.openai_messages import take_messages
from loraloop.chat.refused_entry import EntryRefused, find_finite, show
from loraloop.episode import AnyOutcome, Episode, EpisodeMetadata, Success, Timeout, Unknown
from loraloop.errors import ImportFailed
from loraloop.importers.agent_turns import as_list, as_object, require_list, times_of, to_call, to_outcome, to_tools
from loraloop.importers.entry import Entry, convert_entries, find_id, require_clean, require_object, to_tags
from loraloop.importers.json_input import first_object_keys, load_document, load_with_list
from loraloop.training_data import Refusal

RESULTS_FILE = "results.json"
SIMULATIONS_FOLDER = "simulations"
STOP_MARK = "###STOP###"
GREETING = "Hi! How can I help you today?"

_BROKEN = ("infrastructure_error", "unexpected_error", "user_error")
_TIMEOUTS = ("max_steps", "timeout")
_KNOWN_MESSAGE = {
    *("role", "content", "tool_calls", "id", "requestor", "error", "turn_idx", "timestamp", "cost", "usage", "raw_data"),
    *("generation_time_seconds", "reasoning", "tool_messages", "is_audio", "is_final_chunk", "contains_speech"),
}
_EXAMPLE = "{id, task_id, reward_info, termination_reason, messages}"


class Tau2Importer:
    """Reads tau2-bench results. Task and group are the domain and the task's id; the trial is a tag."""

    name: ClassVar[str] = "tau2"
    description: ClassVar[str] = 'tau2-bench results: {"info", "tasks", "simulations"}, or a file of its folder simulations'

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True for an object with `tasks` and `simulations`, or `environment_info` where long tasks hide these, and for a single run."""
        keys = first_object_keys(head)
        if head.lstrip("\ufeff \t\r\n").startswith("["):
            return False
        is_results = {"info", "tasks"} <= keys and ("simulations" in keys or '"environment_info"' in head)
        return is_results or {"task_id", "termination_reason"} <= keys

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """None: the whole file must be parsed to count its runs."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """One Episode or Refusal for each run, in order. Raises ImportFailed for a file that is no JSON or no results."""
        document, long_list = load_with_list(path, "simulations", "entry")
        if not isinstance(document, dict):
            raise ImportFailed(
                f"{path}: found {show(document)}; expected {{info, tasks, simulations}}; do this: give a results file of tau2"
            )
        if "simulations" not in document and "termination_reason" in document:
            setting = _Setting.of(_load_results(path.parent.parent / RESULTS_FILE))
            entries: Iterator[Entry] = iter([Entry("entry 1", document)])
        else:
            setting, entries = _Setting.of(document), long_list or _iter_runs(path, document)
        yield from convert_entries(path, entries, lambda run: _to_episode(run, setting))


@dataclass(frozen=True)
class _Setting:
    """What all runs of a file share."""

    info: Mapping[str, object] = field(default_factory=dict)
    tasks: Mapping[str, dict[str, object]] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Mapping[str, object]) -> _Setting:
        tasks = [task for task in as_list(results.get("tasks")) if isinstance(task, dict)]
        return cls(as_object(results.get("info")), {str(task.get("id")): task for task in tasks})

    def part(self, name: str, key: str) -> object:
        return as_object(self.info.get(name)).get(key)


def _load_results(path: Path) -> dict[str, object]:
    return as_object(load_document(path)) if path.is_file() else {}


def _iter_runs(path: Path, document: dict[str, object]) -> Iterator[Entry]:
    """The runs inside the file; of a file without, those of the folder beside it, each read when its turn comes."""
    runs = document.get("simulations")
    if runs is not None:
        yield from (Entry(f"entry {number}", run) for number, run in enumerate(runs if isinstance(runs, list) else [runs], 1))
        return
    for file in sorted((path.parent / SIMULATIONS_FOLDER).glob("*.json")):
        place = f"file {SIMULATIONS_FOLDER}/{file.name}"
        try:
            yield Entry(place, load_document(file))
        except ImportFailed as error:
            found = show(str(error).partition(": found ")[2].partition("; expected ")[0])
            yield Entry(place, problem=EntryRefused("bad_json", found, "one JSON object", "check that the file is complete"))


def _to_episode(value: object, setting: _Setting) -> Episode:
    run = require_object(value, ("task_id", "messages"), _EXAMPLE)
    _require_whole_run(run)
    task_id = find_id(run, "task_id")
    if task_id is None:
        raise EntryRefused("bad_shape", "no task_id", "the task's number or name", "add it: attempts at one task are compared")
    policy, ticket = _find_policy(run, setting), setting.tasks.get(task_id, {}).get("ticket")
    solo = setting.part("agent_info", "implementation") == "llm_agent_solo"
    system = _to_system_prompt(policy, ticket if solo else None)
    visible = _flatten(require_list(run["messages"], "messages"))
    require_clean([system, visible, run.get("start_time"), run.get("end_time"), setting.part("environment_info", "tool_defs")])
    own = [message for message in visible if not _is_users(message)]
    taken = take_messages([*system, *(_to_message(message, is_first=at == 0) for at, message in enumerate(own))], "messages")
    domain = setting.part("environment_info", "domain_name")
    key = f"{domain}/{task_id}" if isinstance(domain, str) else task_id
    reward = as_object(run.get("reward_info"))
    parts = as_object(reward.get("reward_breakdown"))
    tags = to_tags(
        Tau2Importer.name,
        taken.ignored,
        decoded_arguments=taken.decoded_arguments,
        trial=find_id(run, "trial"),
        termination_reason=run.get("termination_reason"),
        system_prompt="policy" if system else None,
        simulated_user_calls=sum(len(as_list(message.get("tool_calls"))) for message in visible if _is_users(message)) or None,
        agent=setting.part("agent_info", "implementation"),
        model=setting.part("agent_info", "llm"),
        **{f"reward.{name}": paid for name, paid in sorted(parts.items()) if find_finite(paid) is not None},
    )
    return Episode(
        task_id=key,
        group_id=key,
        messages=tuple(taken.messages),
        tools=cast("tuple[dict[str, JsonValue], ...]", _to_tools(setting.part("environment_info", "tool_defs"))),
        outcome=_find_outcome(reward.get("reward"), run.get("termination_reason")),
        metadata=EpisodeMetadata(scenario=Tau2Importer.name, tags=tags, **times_of([run.get("start_time"), run.get("end_time")])),
    )


def _require_whole_run(run: dict[str, object]) -> None:
    if run["messages"] is None and run.get("ticks"):
        raise EntryRefused("unsupported_content", "a voice run, which has ticks and no messages", "text", "leave the run out")
    reason = run.get("termination_reason")
    if reason in _BROKEN:
        found = f"a run that ended with {reason}"
        raise EntryRefused("run_error", found, "a run that came to its end", "run the task again: this says nothing of the agent")


def _find_policy(run: dict[str, object], setting: _Setting) -> str | None:
    own = run.get("policy")
    policy = own if isinstance(own, str) else setting.part("environment_info", "policy")
    return policy if isinstance(policy, str) and policy else None


def _to_system_prompt(policy: str | None, ticket: object) -> list[dict[str, object]]:
    parts = {"policy": policy, "ticket": ticket}
    text = "\n".join(f"<{name}>\n{part}\n</{name}>" for name, part in parts.items() if isinstance(part, str) and part)
    return [{"role": "system", "content": text}] if text else []


def _flatten(messages: list[object]) -> list[dict[str, object]]:
    """All messages; results that newer versions put into one message stand by themselves."""
    plain = [require_object(message, ("role",), "a message with its role") for message in messages]
    parts = [as_list(message.get("tool_messages")) or [message] for message in plain]
    return [require_object(part, ("role",), "a message with its role") for group in parts for part in group]


def _is_users(message: dict[str, object]) -> bool:
    """Whether it is a call of the simulated user or the result of one, which the agent never sees."""
    if message["role"] == "tool":
        return message.get("requestor") == "user"
    return message["role"] == "user" and bool(message.get("tool_calls"))


def _to_message(message: dict[str, object], *, is_first: bool) -> dict[str, object]:
    if message.get("is_audio"):
        raise EntryRefused("unsupported_content", "a message of audio", "text and function calls only", "leave the run out")
    role, content = message["role"], message.get("content")
    turn: dict[str, object] = {key: value for key, value in message.items() if key not in _KNOWN_MESSAGE}
    turn |= {"role": role, "content": content}
    if role == "tool":
        turn["tool_call_id"] = message.get("id") or None
    if role != "assistant":
        return turn
    said = as_object(as_object(message.get("raw_data")).get("message"))
    calls = _take_calls(message, said)
    is_stop = content == STOP_MARK and not message.get("tool_calls")
    turn |= {"tool_calls": calls, "reasoning_content": message.get("reasoning") or said.get("reasoning_content")}
    if is_stop and calls:
        turn["content"] = said.get("content")
    elif is_stop or (is_first and content == GREETING and not message.get("usage")):
        turn["author"] = "harness"
    return turn


def _take_calls(message: dict[str, object], said: dict[str, object]) -> list[dict[str, object]]:
    """The calls as the response of the model has them, where it is recorded and agrees; else as tau2 parsed them."""
    parsed = [require_object(call, ("name", "arguments"), "a call with name and arguments") for call in as_list(message.get("tool_calls"))]
    functions = [(as_object(call).get("id"), as_object(as_object(call).get("function"))) for call in as_list(said.get("tool_calls"))]
    own = [to_call(call_id, function.get("name"), function.get("arguments")) for call_id, function in functions]
    is_replaced = not parsed and message.get("content") == STOP_MARK
    if own and (is_replaced or [(call.get("id"), call["name"]) for call in parsed] == [(key, one.get("name")) for key, one in functions]):
        return own
    return [to_call(call.get("id") or None, call["name"], call["arguments"]) for call in parsed]


def _to_tools(definitions: object) -> tuple[dict[str, object], ...]:
    """The tools of the agent: signatures by name, {name, doc, params}, or a list of schemas."""
    if not isinstance(definitions, dict):
        return to_tools(definitions)
    signatures = [require_object(signature, ("name",), "a tool's signature with its name") for signature in definitions.values()]
    return to_tools([{"name": one["name"], "description": one.get("doc"), "parameters": one.get("params")} for one in signatures])


def _find_outcome(reward: object, termination_reason: object) -> AnyOutcome:
    if reward is None:
        return Timeout() if termination_reason in _TIMEOUTS else Unknown()
    outcome = to_outcome(reward)
    if termination_reason in _TIMEOUTS and not isinstance(outcome, Success):
        return Timeout(find_finite(reward))
    return outcome
