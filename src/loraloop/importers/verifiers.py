"""verifiers results: JSON Lines of {prompt, completion, reward, task, info}, one rollout each.

Prompt and completion are OpenAI messages with two habits of their own: every element of `tool_calls` is JSON text, and tool results
have no id, so they answer calls in order. `info.oai_tools` are the tools that the agent was shown, without the null keys that Parquet
pads them with. `answer` is the ground truth and is not stored.

`reward` is a weighted sum of reward functions and has no declared scale. From 1 on it is a Success with that very score, above 1 too,
below it a Failure that names it; whoever learns from scores must say what their scale is, so episodes are tagged `score_scale: sum`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal, cast

from pydantic import JsonValue

from loraloop.chat.openai_messages import take_messages, take_tools
from loraloop.chat.refused_entry import EntryRefused, find_finite, show
from loraloop.episode import AnyOutcome, Episode, EpisodeMetadata, Failure, Success, Unknown
from loraloop.files import content_hash
from loraloop.importers.entry import convert_entries, find_id, require_clean, require_object, to_tags
from loraloop.importers.json_input import count_entries, iter_entries, opening_keys
from loraloop.importers.null_padding import without_padded_arguments, without_padding
from loraloop.training_data import Refusal

FULL_REWARD = 1 - 1e-6
"""From here on a rollout counts as solved: environments pay 1 for a right answer and may add to it for form."""

_KNOWN = {"example_id", "id", "prompt", "completion", "reward", "task", "info", "answer"}
_MEASURES = ("_ms", "_calls")
"""How columns end that measure the run rather than judge it."""
_EXAMPLE = "{prompt, completion, reward, task}"


class VerifiersImporter:
    """Reads verifiers results. Rollouts of one example with one prompt are attempts at one task."""

    name: ClassVar[str] = "verifiers"
    description: ClassVar[str] = 'verifiers results: JSON Lines of {"prompt", "completion", "reward", "task", "info"}'
    lines_stand_alone: ClassVar[Literal[True]] = True

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True for objects with `prompt`, `completion` and one key more of the format, so not for plain prompt-completion data."""
        marks = {"reward", "example_id", "task"}
        return any({"prompt", "completion"} <= keys and keys & marks for keys in opening_keys(head))

    def count(self, path: Path) -> int | None:
        """The number of lines that are not blank; None for a JSON list."""
        return count_entries(path)

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """One Episode or Refusal for each rollout, in order. Raises ImportFailed for an unreadable file."""
        return convert_entries(path, iter_entries(path), _to_episode)


def _to_episode(value: object) -> Episode:
    row = require_object(value, ("prompt", "completion"), _EXAMPLE)
    require_clean({key: part for key, part in row.items() if key != "reward"})
    prompt, completion = _messages(row, "prompt"), _messages(row, "completion")
    if not completion:
        found = f"an empty completion of reward {show(row.get('reward'))}"
        raise EntryRefused("no_agent_turn", found, "what the agent said and did", "save the rollout again with its completion")
    info = _decoded(row.get("info"))
    tools, n_keys = without_padding(take_tools(info.get("oai_tools") if isinstance(info, dict) else None))
    raw, n_arguments = without_padded_arguments([*prompt, *completion], tools)
    taken = take_messages(raw, "messages")
    judged = {key: row[key] for key in sorted(row.keys() - _KNOWN) if not key.endswith(_MEASURES) and find_finite(row[key]) is not None}
    ignored = {key for key in row.keys() - _KNOWN - judged.keys() if not key.endswith(_MEASURES)}
    tags = to_tags(
        VerifiersImporter.name,
        taken.ignored | ignored,
        decoded_arguments=taken.decoded_arguments,
        padded_keys_removed=n_keys + n_arguments or None,
        reward=row.get("reward"),
        score_scale="sum",
        **{f"reward.{key}": part for key, part in judged.items()},
    )
    task_id = _to_task_id(row, prompt)
    return Episode(
        task_id=task_id,
        group_id=task_id,
        messages=tuple(taken.messages),
        tools=cast("tuple[dict[str, JsonValue], ...]", tools),
        outcome=_to_outcome(row.get("reward")),
        metadata=EpisodeMetadata(scenario=VerifiersImporter.name, tags=tags),
    )


def _to_task_id(row: dict[str, object], prompt: list[object]) -> str:
    """Every environment numbers its examples from 0 and the file names none, so the prompt tells them apart."""
    number = find_id(row, "example_id") or find_id(row, "id")
    return "-".join([*([number] if number else []), content_hash(prompt, 12)])


def _messages(row: dict[str, object], key: str) -> list[object]:
    """The messages under `key`, each tool call decoded; a prompt that is plain text is one turn of the user."""
    raw = row[key]
    if isinstance(raw, str):
        return [{"role": "user" if key == "prompt" else "assistant", "content": raw}] if raw else []
    if not isinstance(raw, list):
        raise EntryRefused("bad_shape", f"{key} = {show(raw)}", "a list of messages", f"write `{key}` as verifiers does")
    return [_with_decoded_calls(message) for message in raw]


def _with_decoded_calls(message: object) -> object:
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_decoded(call) for call in calls]}


def _decoded(value: object) -> object:
    """`value`, or what its JSON text says; text that is no JSON stays, and whoever reads it refuses it."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _to_outcome(reward: object) -> AnyOutcome:
    if reward is None:
        return Unknown()
    paid = find_finite(reward)
    if paid is None:
        raise EntryRefused("bad_reward", f"reward {show(reward)}", "a finite number or null", "write what was paid")
    return Success(paid) if paid >= FULL_REWARD else Failure(f"reward {paid}")
