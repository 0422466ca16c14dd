"""InterCode results: a JSON list, or an object by key, of {environment, task_id, query, turn_history, summary}, one run each.

`turn_history` holds what the agent did, what came back and what that was worth in lists side by side. The query is the first turn, an
action a turn of the agent, an observation a turn of the user; no system prompt is recorded. Where thoughts are recorded the text of a
turn is put together again in InterCode's own ReAct form, numbered, and tagged `text: rebuilt`. A `submit` that the harness forced when
turns ran out is not the agent's, and a turn in which it made up an observation of its own is kept as context, with weight 0.

A file's name is the only place that says which model and prompt ran, so it becomes the strategy: the same words by two models are two
attempts, and a file under another name is another run. Nothing of the path but the name counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from loraloop.chat.refused_entry import EntryRefused, find_finite, show
from loraloop.episode import AnyOutcome, Episode, EpisodeMetadata, Failure, Message, Success, Timeout, Unknown
from loraloop.importers.entry import Entry, convert_entries, find_id, require_clean, require_object, require_text, to_tags
from loraloop.importers.json_input import is_list, iter_entries, iter_list, load_document, opening_keys
from loraloop.importers.react import begins_with_observation
from loraloop.training_data import Refusal

SUCCESS_REWARD = 1 - 1e-6
"""InterCode pays 1 for an answer that is wholly right, less for one that is partly so."""

_KNOWN = {"environment", "task_id", "query", "turn_history", "summary", "hardness", "dataset"}
_FORCED = "EXCEEDED MAX TURNS"
_EXAMPLE = "{environment, task_id, query, turn_history, summary}"


class InterCodeImporter:
    """Reads InterCode results. Attempts at one task of one environment are a group; the environment is the scenario."""

    name: ClassVar[str] = "intercode"
    description: ClassVar[str] = 'InterCode results: a JSON list of {"environment", "task_id", "query", "turn_history", "summary"}'
    lines_stand_alone: ClassVar[Literal[True]] = True

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True for objects with `turn_history`, whether in a list or by key."""
        inner = head.partition(":")[2].lstrip() if head.lstrip("\ufeff \t\r\n").startswith("{") else ""
        return any("turn_history" in keys for part in (head, inner) for keys in opening_keys(part))

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """None: the whole file must be parsed to count its runs."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """One Episode or Refusal for each run, in order. Raises ImportFailed for a file that is no JSON."""
        yield from convert_entries(path, _iter_runs(path), lambda run: _to_episode(run, path.stem))


def _iter_runs(path: Path) -> Iterator[Entry]:
    document = load_document(path) if path.suffix.lower() == ".json" and not is_list(path) else None
    if isinstance(document, dict) and "turn_history" not in document:
        yield from (Entry(f"entry {number} ({show(key)})", run) for number, (key, run) in enumerate(document.items(), 1))
    elif document is None and is_list(path):
        yield from iter_list(path)
    else:
        yield from iter_entries(path)


def _to_episode(value: object, strategy: str) -> Episode:
    run = require_object(value, ("query", "turn_history"), _EXAMPLE)
    require_clean(run)
    environment, task_id = require_text(run, "environment"), find_id(run, "task_id")
    if task_id is None:
        raise EntryRefused("bad_shape", "no task_id", "the task's number or name", "add it: attempts at one task are compared")
    history = require_object(run["turn_history"], ("actions", "observations"), "turn_history with actions and observations")
    summary = run.get("summary")
    summary = summary if isinstance(summary, dict) else {}
    turns = _take_turns(history)
    tags = to_tags(
        InterCodeImporter.name,
        run.keys() - _KNOWN,
        hardness=run.get("hardness"),
        max_reward=summary.get("max_reward"),
        text="rebuilt" if "thoughts" in history else None,
        invented_observations=sum(_is_invented(turn) for turn in turns if turn.role == "assistant") or None,
    )
    return Episode(
        task_id=task_id,
        group_id=f"{environment}/{task_id}",
        messages=(Message(role="user", content=require_text(run, "query")), *turns),
        outcome=_to_outcome(history, summary, is_forced=any(turn.author == "harness" for turn in turns)),
        metadata=EpisodeMetadata(scenario=environment, strategy=strategy, tags=tags),
    )


def _take_turns(history: dict[str, object]) -> list[Message]:
    actions, observations = _texts(history, "actions"), _texts(history, "observations")
    thoughts = _texts(history, "thoughts") if "thoughts" in history else None
    if not actions:
        raise EntryRefused("no_agent_turn", "no actions", "at least one", "leave it out: there is nothing to learn")
    if len({len(actions), len(observations), len(actions if thoughts is None else thoughts)}) > 1:
        found = f"{len(actions)} actions, {len(observations)} observations"
        raise EntryRefused("bad_shape", found, "as many of each", "write one observation and thought for every action")
    turns: list[Message] = []
    for number, (action, observation) in enumerate(zip(actions, observations, strict=True), 1):
        if thoughts is None:
            turns += [_own_turn(action), Message(role="user", content=observation)]
        else:
            thought = thoughts[number - 1]
            own = _own_turn(f"Thought {number}: {thought}\nAction {number}: {action}", invented=begins_with_observation(action))
            forced = own.model_copy(update={"author": "harness"}) if thought.startswith(_FORCED) else own
            turns += [forced, Message(role="user", content=f"Observation {number}: {observation}")]
    return turns


def _own_turn(text: str, *, invented: bool | None = None) -> Message:
    is_invented = begins_with_observation(text) if invented is None else invented
    return Message(role="assistant", content=text, weight=0.0 if is_invented else 1.0)


def _is_invented(turn: Message) -> bool:
    return turn.weight == 0


def _texts(history: dict[str, object], key: str) -> list[str]:
    """Texts as they are; a null observation, which some environments give, is empty."""
    values = history[key]
    if not isinstance(values, list) or not all(isinstance(value, str) or (value is None and key == "observations") for value in values):
        raise EntryRefused("bad_shape", f"turn_history.{key} = {show(values)}", "a list of texts", "write it as InterCode does")
    return [value or "" for value in values]


def _to_outcome(history: dict[str, object], summary: dict[str, object], *, is_forced: bool) -> AnyOutcome:
    """Full reward is a success. Less, when all turns were taken, is a Timeout with what was reached; else a failure that names it."""
    raw = summary.get("max_reward")
    if raw is None:
        rewards = history.get("rewards")
        raw = max(rewards, default=None) if isinstance(rewards, list) and all(find_finite(r) is not None for r in rewards) else None
        if raw is None:
            return Unknown()
    best = find_finite(raw)
    if best is None:
        raise EntryRefused("bad_reward", f"max_reward {show(raw)}", "a finite number or null", "write what was paid")
    if best >= SUCCESS_REWARD:
        return Success(best)
    taken, limit = find_finite(summary.get("turns_taken")), find_finite(summary.get("turns_max"))
    submitted = _texts(history, "actions")[-1].strip() == "submit" and not is_forced
    if is_forced or (not submitted and taken is not None and limit is not None and taken >= limit):
        return Timeout(best)
    return Failure(f"reward {best}")
