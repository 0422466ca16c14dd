"""Who&When: one JSON file a failed run of several agents: {question, history, mistake_agent, mistake_step, mistake_reason, …}.

A run is told from the side of the agent that made the decisive mistake: its turns are the agent's, its system prompt the system turn;
whatever the others said, people, tools and the harness too, is a user's turn with its speaker as name and author. So only the words of
the agent that erred can become less likely, and never another's. Generated runs name the speaker in `name`, hand-crafted ones in `role`,
with its purpose in brackets. The first turn is the task, whoever the file says spoke it. `ground_truth` is not stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.episode import AnyOutcome, Episode, EpisodeMetadata, Failure, Message, Success
from loraloop.importers.entry import convert_entries, find_id, require_clean, require_object, require_text, to_tags
from loraloop.importers.json_input import iter_entries, opening_keys
from loraloop.training_data import Refusal

_VERDICTS = ("is_correct", "is_corrected")
_GROUND_TRUTH = {"ground_truth", "groundtruth"}
_KNOWN = {"question", "question_ID", "level", "history", "mistake_agent", "mistake_step", "mistake_reason", "system_prompt", "labels"}
_HARNESS = "termination condition"
"""The purpose of turns that only tell what the harness printed at the end."""
_EXAMPLE = "{question, history, mistake_agent, mistake_step, mistake_reason}"


class WhoAndWhenImporter:
    """Reads Who&When. The question is the task; step and agent of the mistake are tags."""

    name: ClassVar[str] = "who-and-when"
    description: ClassVar[str] = 'Who&When: one JSON file a run, {"question", "history", "mistake_agent", "mistake_step", "mistake_reason"}'

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True for objects with `mistake_agent`, or with nothing but a history of speakers where that is long enough to hide the rest."""
        openings = opening_keys(head)
        is_cut = openings[:1] == [{"history"}] and re.search(r'"role":\s*"human"', head) is not None
        return is_cut or any("mistake_agent" in keys or {"question", "history", "ground_truth"} <= keys for keys in openings)

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """None: a file may hold one run or a list of them."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """One Episode or Refusal for each run, in order. Raises ImportFailed for a file that is no JSON."""
        return convert_entries(path, iter_entries(path), _to_episode)


def _to_episode(value: object) -> Episode:
    run = require_object(value, ("history", "mistake_agent"), _EXAMPLE)
    said = {key: part for key, part in run.items() if key not in _GROUND_TRUTH}
    require_clean(said)
    history, agent = run["history"], require_text(run, "mistake_agent")
    if not isinstance(history, list) or not history:
        raise EntryRefused("bad_shape", f"history = {show(history)}", "a list of messages", "write it as the data set does")
    turns = [_to_turn(message, number, agent) for number, message in enumerate(history, 1)]
    if not any(turn.is_agent for turn in turns):
        found = f"no turn of {show(agent)} among {len(turns)}"
        raise EntryRefused("no_agent_turn", found, "turns of the agent that made the mistake", "check its name, or leave the run out")
    task_id = find_id(run, "question_ID")
    tags = to_tags(
        WhoAndWhenImporter.name,
        said.keys() - _KNOWN - set(_VERDICTS),
        mistake_agent=agent,
        mistake_step=run.get("mistake_step"),
        level=run.get("level"),
        labels=run.get("labels"),
    )
    return Episode(
        task_id=task_id,
        group_id=task_id,
        messages=(*_system_turn(run.get("system_prompt"), agent), *turns),
        outcome=_to_outcome(run),
        metadata=EpisodeMetadata(scenario=WhoAndWhenImporter.name, tags=tags),
    )


def _to_turn(raw: object, number: int, agent: str) -> Message:
    message = require_object(raw, ("content", "role"), f"message {number} of the history with content and role")
    content, role = require_text(message, "content"), require_text(message, "role")
    named = message.get("name")
    speaker = named if isinstance(named, str) and named else role
    who, _, purpose = speaker.partition(" (")
    if number > 1 and who == agent and not purpose.startswith(_HARNESS):
        return Message(role="assistant", content=content, name=speaker)
    return Message(role="user", content=content, name=speaker, author=speaker)


def _system_turn(prompts: object, agent: str) -> list[Message]:
    prompt = prompts.get(agent) if isinstance(prompts, dict) else None
    return [Message(role="system", content=prompt)] if isinstance(prompt, str) else []


def _to_outcome(run: dict[str, object]) -> AnyOutcome:
    verdict = next((run[key] for key in _VERDICTS if run.get(key) is not None), False)
    if not isinstance(verdict, bool):
        raise EntryRefused("bad_shape", f"the verdict {show(verdict)}", "true or false", "write `is_correct` as one of these")
    if verdict:
        return Success(1.0)
    reason = run.get("mistake_reason")
    return Failure(reason if isinstance(reason, str) and reason else "a mistake whose reason is not recorded")
