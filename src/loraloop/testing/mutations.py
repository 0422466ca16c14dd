"""Files that are nearly right: what a broken writer, a wrong tool or a full disk leaves behind. For testing importers."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

_ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1e308,
    "",
    "x",
    "\x00",
    "[",
    "{}",
    '{"role": 1}',
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    {"role": "user"},
    ["x"],
    10**30,
]


def mutate(data: bytes, seed: int) -> bytes:
    """`data` with one to three mutations, of its bytes or of the JSON values in its lines or its document; the same for one seed."""
    chance = random.Random(seed)
    for _ in range(chance.randint(1, 3)):
        data = _of_bytes(data, chance) if chance.random() < 0.3 else _of_values(data, chance)
    return data


def _of_bytes(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    match chance.randrange(4):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[:at] + data[at + chance.randrange(40) :]
        case _:
            return data[:at] + data[chance.randrange(len(data) + 1) :][:60] + data[at:]


def _of_values(data: bytes, chance: random.Random) -> bytes:
    try:
        document = json.loads(data)
        _change(document, chance)
        return json.dumps(document).encode()
    except ValueError:
        pass
    lines = data.splitlines()
    at = chance.randrange(len(lines)) if lines else 0
    try:
        value = json.loads(lines[at])
    except (ValueError, IndexError):
        return data
    _change(value, chance)
    lines[at] = json.dumps(value).encode()
    return b"\n".join(lines)


def _change(document: object, chance: random.Random) -> None:
    """Put something odd in the place of one value, at any depth, inside JSON text too; or leave one out."""
    places = list(_places(document))
    if not places:
        return
    owner, key = chance.choice(places)
    inner = owner[key]
    if isinstance(inner, str) and inner[:1] in {"[", "{"} and chance.random() < 0.7:
        try:
            told = json.loads(inner)
        except ValueError:
            told = None
        if told:
            _change(told, chance)
            owner[key] = json.dumps(told)
            return
    if chance.random() < 0.3:
        del owner[key]
    else:
        owner[key] = copy.deepcopy(chance.choice(_ODD))


def _places(value: object) -> Iterator[tuple[Any, Any]]:
    """Every list and object inside with each of its keys."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, inner in items:
        yield value, key
        yield from _places(inner)
