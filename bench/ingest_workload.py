"""The file that `bench.ingest` reads: as many episodes as asked for, of 26 messages each, in OpenAI's chat form.

Each is put together of exchanges of real tau-bench runs, with their system prompts and a set of tool schemas, which episodes share. A
third of the words and all digits are drawn anew, so no two messages are the same and none compresses as a copy of another.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.recordings import DEFAULT_DATA, write_generated
from loraloop.episode import Episode
from loraloop.files import json_line
from loraloop.importers.tau_bench import TauBenchImporter

N_MESSAGES = 26
N_POLICIES = 5
N_TOOLS = 14
REDRAWN = 0.33
"""Of the words."""

Turns = list[dict[str, Any]]


def write_episodes(path: Path, n_episodes: int, data: Path = DEFAULT_DATA) -> int:
    """Write the file, the same bytes for the same `data`; how many bytes. Without `data`, of made-up runs in the same form."""
    if not data.exists():
        data = path.with_suffix(".runs.json")
        write_generated(data)
    episodes = [entry for entry in TauBenchImporter().read(data) if isinstance(entry, Episode)]
    exchanges = [turns for episode in episodes for turns in _exchanges(episode)]
    openings = [_turn(message) for episode in episodes for message in episode.messages if message.role == "user"]
    words = [word for opening in openings for word in opening["content"].split()]
    words += [word for turns in exchanges for turn in turns for word in (turn.get("content") or "").split()]
    prompts = list(dict.fromkeys(episode.messages[0].content or "" for episode in episodes))
    draw = random.Random(0)
    policies = [f"{draw.choice(prompts)}\n\nPolicy number {number}." for number in range(N_POLICIES)]
    tools = [_tool(number, " ".join(draw.choices(words, k=60))) for number in range(N_TOOLS)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(n_episodes):
            turns = [{"role": "system", "content": draw.choice(policies)}, *_again([draw.choice(openings)], draw, words)]
            while len(turns) < N_MESSAGES:
                turns += _again(draw.choice(exchanges), draw, words)
            row = {"messages": turns, "tools": tools, "task_id": f"task-{number % 997}"}
            file.write(json_line(row) + "\n")
    return path.stat().st_size


def _exchanges(episode: Episode) -> Iterator[Turns]:
    """A call and its result, or an answer and what the user says next."""
    for before, after in zip(episode.messages, episode.messages[1:], strict=False):
        is_call = after.role == "tool" and len(before.tool_calls) == 1
        is_talk = before.role == "assistant" and before.content and not before.tool_calls and after.role == "user"
        if is_call or is_talk:
            yield [_turn(before), _turn(after)]


def _turn(message: Any) -> dict[str, Any]:
    return {key: value for key, value in message.model_dump(exclude_none=True).items() if key in _KEPT and value != ()}


_KEPT = ("role", "content", "tool_calls", "tool_call_id", "name")


def _again(turns: Turns, draw: random.Random, words: list[str]) -> Turns:
    """The same exchange about something else."""

    def reword(text: str) -> str:
        return " ".join(draw.choice(words) if draw.random() < REDRAWN else word for word in text.split(" "))

    call_id = f"call_{draw.getrandbits(64):016x}"
    made = []
    for turn in turns:
        new = dict(turn)
        if turn.get("content"):
            new["content"] = _redraw_digits(turn["content"], draw) if turn["role"] == "tool" else reword(turn["content"])
        if turn.get("tool_calls"):
            function = turn["tool_calls"][0]["function"]
            arguments = _redraw_digits(function["arguments"], draw)
            new["tool_calls"] = [{"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}]
            new.setdefault("content", None)
        if turn["role"] == "tool":
            new["tool_call_id"] = call_id
        made.append(new)
    return made


def _redraw_digits(text: str, draw: random.Random) -> str:
    digit: Callable[[re.Match[str]], str] = lambda found: str(draw.randrange(10))  # noqa: E731  a name for its type
    try:
        json.loads(text)
    except ValueError:
        return re.sub(r"\d", digit, text)
    return re.sub(r"(?<=[\d.])\d|(?<=[A-Z])\d", digit, text)  # numbers stay JSON: no zero comes to stand in front


def _tool(number: int, description: str) -> dict[str, Any]:
    properties = {f"argument_{n}": {"type": "string", "description": description[n * 40 : n * 40 + 80]} for n in range(5)}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": f"tool_{number}", "description": description, "parameters": parameters}}
