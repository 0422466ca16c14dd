"""What would be learned wrongly without any error: found in a sample before it is rendered, and refused by name.

Other tools train on all of these in silence. A null where a tool schema cannot have one is what Apache Arrow leaves when it gives every
schema the keys of all: it would stand in the prompt. Arguments that are JSON within JSON would teach the agent to quote its calls. An
observation inside the agent's own words, as traces of one text for a whole run have it, would teach it to make up what it sees.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from loraloop.episode import Message
from loraloop.training_data import TrainingData

MAY_BE_NULL = frozenset({"default", "const", "example", "examples", "enum"})
"""Keys under which a JSON schema may say null, itself or in a list; `enum` only in a list."""
_OBSERVED = re.compile(r"^\s*Action(?: ?\d+)?:.*?^\s*Observation(?: ?\d+)?:[^\S\n]*\n?[^\S\n]*\S", re.MULTILINE | re.DOTALL)


class Fault(NamedTuple):
    """A reason code and what was found where."""

    reason: str
    detail: str


def find_fault(sample: TrainingData) -> Fault | None:
    """What is wrong with a whole sample: `null_in_tools` or `double_encoded_arguments`; None when nothing is."""
    for number, tool in enumerate(sample.tools):
        if place := next(_iter_nulls(tool, ""), None):
            return Fault("null_in_tools", f"tool {number} has null at {place}, which no schema means; remove such keys")
    for index, message in enumerate((*sample.messages, *sample.rejected_messages)):
        for call in message.tool_calls:
            if _is_double_encoded(call.function.arguments):
                detail = f"turn {index}: the arguments of {call.function.name} are JSON within a JSON text; decode them once"
                return Fault("double_encoded_arguments", detail)
    return None


def find_turn_fault(message: Message) -> Fault | None:
    """What is wrong with one turn that the agent is to learn: `observation_in_turn`; None when nothing is."""
    if found := _OBSERVED.search(message.content or ""):
        line = (message.content or "").count("\n", 0, found.end()) + 1
        return Fault("observation_in_turn", f"line {line} is an observation, which the agent did not write; split the turn there")
    return None


def _iter_nulls(value: Any, place: str) -> Iterator[str]:
    """Where null stands in a tool, as a path."""
    pairs: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        pairs = tuple(value.items())
    elif isinstance(value, list):
        pairs = tuple(enumerate(value))
    for key, part in pairs:
        here = f"{place}.{key}" if place else str(key)
        if part is None and (key not in MAY_BE_NULL or key == "enum"):
            yield here
        elif key not in MAY_BE_NULL:
            yield from _iter_nulls(part, here)


def _is_double_encoded(arguments: str) -> bool:
    """Whether a call's arguments are a JSON text that holds the JSON of an object."""
    if not arguments.lstrip().startswith('"'):
        return False
    decoded: Any = arguments
    try:
        while isinstance(decoded, str):
            decoded = json.loads(decoded)
    except (json.JSONDecodeError, RecursionError):
        return False
    return isinstance(decoded, dict)
