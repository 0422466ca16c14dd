"""Alpaca data: a JSON list, or JSON Lines, of {instruction, input, output}; `output` may be a whole ReAct trace.

Instruction and input are the user's turn, the output the agent's. A trace, as FireAct writes it, is cut at its observations: these
become turns of the user, since an agent that learned them would make up what its environment says. The last one may tell the verdict
(`Episode finished, reward = True`), which is the outcome then; an entry without one is a demonstration, so a Success(1.0) by convention
of the format, tagged `outcome_from: format`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.episode import Episode, EpisodeMetadata, Message, Success
from loraloop.importers.entry import convert_entries, require_clean, require_object, require_text, to_tags
from loraloop.importers.json_input import count_entries, iter_entries, opening_keys
from loraloop.importers.react import find_verdict, has_observation, split_trace
from loraloop.training_data import Refusal

_KNOWN = {"instruction", "input", "output", "system", "task_id"}
_OTHERS = {"history", "chosen", "rejected", "kto_tag", "reward", "images"}
"""What changes the meaning of an entry and is not read here."""


class AlpacaImporter:
    """Reads Alpaca data. The instruction is the task unless the entry has a `task_id`."""

    name: ClassVar[str] = "alpaca"
    description: ClassVar[str] = 'Alpaca data: a JSON list of {"instruction", "input", "output"}'
    lines_stand_alone: ClassVar[Literal[True]] = True

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True for objects with `instruction` and `output`, or `instruction` and `input` where a long text hides the rest."""
        return any("instruction" in keys and keys & {"output", "input"} for keys in opening_keys(head))

    def count(self, path: Path) -> int | None:
        """The number of lines that are not blank; None for a JSON list."""
        return count_entries(path)

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """One Episode or Refusal for each entry, in order. Raises ImportFailed for an unreadable file."""
        return convert_entries(path, iter_entries(path), _to_episode)


def _to_episode(value: object) -> Episode:
    row = require_object(value, ("instruction", "output"), "{instruction, input, output}")
    require_clean(row)
    for key in sorted(_OTHERS & row.keys()):
        if row[key] not in (None, "", [], {}):
            advice = "write it in the OpenAI chat format, or leave it out"
            raise EntryRefused("not_a_demonstration", f"the key `{key}` = {show(row[key])}", "an instruction and its output", advice)
    output = require_text(row, "output")
    if not output.strip():
        raise EntryRefused("no_agent_turn", "an empty output", "what the agent said", "leave it out: there is nothing to learn")
    answer = split_trace(output) if has_observation(output) else [Message(role="assistant", content=output)]
    verdict = find_verdict(answer[-1].content or "") if answer[-1].role == "user" else None
    task_id = row.get("task_id")
    return Episode(
        task_id=str(task_id) if isinstance(task_id, int | str) and not isinstance(task_id, bool) and task_id != "" else None,
        messages=(*_to_prompt(row), *answer),
        outcome=verdict or Success(1.0),
        metadata=EpisodeMetadata(tags=to_tags(AlpacaImporter.name, row.keys() - _KNOWN, outcome_from="trace" if verdict else "format")),
    )


def _to_prompt(row: dict[str, object]) -> list[Message]:
    asked = [text for text in (require_text(row, "instruction"), row.get("input")) if text]
    if not all(isinstance(text, str) for text in asked):
        raise EntryRefused("bad_shape", f"input = {show(row.get('input'))}", "text or nothing", "write `input` as text")
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise EntryRefused("bad_shape", f"system = {show(system)}", "text or nothing", "write `system` as text")
    return [*([Message(role="system", content=system)] if system else []), Message(role="user", content="\n\n".join(map(str, asked)))]
