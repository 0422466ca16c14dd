"""Pieces that logs of agents share: times in any spelling, tool calls whose arguments are objects, rewards, text in parts.

Arguments that were recorded as text stay that text; an object becomes JSON text with its keys in the order they were recorded in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime

from loraloop.chat.openai_messages import take_tools
from loraloop.chat.refused_entry import EntryRefused, find_finite, show
from loraloop.episode import AnyOutcome, Failure, Success

FULL_REWARD = 1 - 1e-6
"""From here on a run counts as solved, on scales whose full mark is 1."""
_SECONDS_BELOW = 1e11
"""A number of seconds since 1970 is below this until the year 5138, one of milliseconds above it since 1973."""


def find_time_ms(value: object) -> int | None:
    """`value` as Unix milliseconds: ISO 8601 text (UTC where it names no zone), or a number of seconds or milliseconds; else None."""
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
            return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
        except (ValueError, OverflowError):
            return None
    number = find_finite(value)
    if number is None or not 0 < number < _SECONDS_BELOW * 1000:
        return None
    return round(number * 1000 if number < _SECONDS_BELOW else number)


def times_of(values: Iterable[object]) -> dict[str, int]:
    """`started_at` and `ended_at` for EpisodeMetadata: the first and last of those `values` that are times; empty when none is."""
    times = [time for time in map(find_time_ms, values) if time is not None]
    return {"started_at": min(times), "ended_at": max(times)} if times else {}


def to_call(call_id: object, name: object, arguments: object) -> dict[str, object]:
    """A tool call in the OpenAI shape. What is wrong with its parts is found by `take_messages`."""
    text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}


def to_tools(schemas: object) -> tuple[dict[str, object], ...]:
    """Tool schemas in the OpenAI shape; one that is not wrapped in `function` yet, or has Anthropic's `input_schema`, is wrapped."""
    return tuple(_wrapped(schema) for schema in take_tools(schemas))


def to_outcome(reward: object, what: str = "reward") -> AnyOutcome:
    """Success(reward) from 1 on, else a Failure that names `what` was paid; true and false are 1 and 0. Refused as `bad_reward`."""
    paid = float(reward) if isinstance(reward, bool) else find_finite(reward)
    if paid is None:
        raise EntryRefused("bad_reward", f"{what} {show(reward)}", "a finite number, a boolean or null", "write what was paid")
    return Success(paid) if paid >= FULL_REWARD else Failure(f"{what} {paid}")


def require_list(value: object, what: str) -> list[object]:
    """`value` as a list; refused as `bad_shape` when it is something else."""
    if not isinstance(value, list):
        raise EntryRefused("bad_shape", f"{what} = {show(value)}", f"a list of {what}", "give the file as it was recorded")
    return value


def as_object(value: object) -> dict[str, object]:
    """`value` when it is an object, else an empty one: for parts whose absence means nothing."""
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list[object]:
    """`value` when it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def _wrapped(schema: dict[str, object]) -> dict[str, object]:
    if "function" in schema or "name" not in schema:
        return schema
    plain = {("parameters" if key == "input_schema" else key): value for key, value in schema.items() if key != "type"}
    return {"type": "function", "function": plain}
