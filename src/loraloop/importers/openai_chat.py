"""OpenAI chat fine-tuning data: JSON Lines, or a JSON list, of objects with `messages` and often `tools`.

Every line of this format is a demonstration, so its episode is a Success(1.0) by convention, tagged `outcome_from: format`. A
line with a verdict or a preference of its own (`reward`, `kto_tag`, …) is none and is refused, never booked as a success.
What a line says beyond messages, tools and task becomes tags; nothing is dropped without being named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast

from pydantic import JsonValue, TypeAdapter

from loraloop.chat.openai_messages import Taken, require_turns, take_messages, take_tools
from loraloop.chat.refused_entry import EntryRefused, find_finite, show
from loraloop.episode import LICENSE_TAG, Episode, EpisodeMetadata, Failure, Message, Success
from loraloop.files import canonical_json
from loraloop.importers.anthropic import is_anthropic
from loraloop.importers.entry import convert_entries, ignored_tag, require_clean
from loraloop.importers.exported import KEY, Exported
from loraloop.importers.json_input import count_entries, iter_entries, opening_keys
from loraloop.importers.null_padding import without_padded_arguments, without_padding
from loraloop.importers.openai_calls import is_call_log
from loraloop.importers.plain_messages import find_plain
from loraloop.importers.react import find_verdict, has_observation
from loraloop.importers.remembered import Remembered
from loraloop.importers.repeated import Repeated
from loraloop.training_data import Refusal

MAX_TAG_CHARS = 1000
"""An unknown key whose value, as JSON, is this long or longer is named in the tag `ignored_keys` and not kept."""

_KNOWN = {"messages", "tools", "functions", "weight", "task_id"}
_OWN_TAGS = {"format", "outcome_from", "ignored_keys", "decoded_arguments", "padded_keys_removed"}
_VERDICTS = {"reward", "reward_info", "outcome", "success", "kto_tag", "is_correct"}
_PREFERENCES = {"rejected_message", "rejected", "chosen", "preferred_output", "non_preferred_output"}
_MEDIA = {"images", "videos", "audios"}
_OTHER_FORMATS = {"trajectory_format", "termination_reason"}
_SCHEMAS = TypeAdapter(tuple[dict[str, JsonValue], ...])
_OTHER_MARKS = ('"mini_version"', '"model_stats"')


class OpenAIChatImporter:
    """Reads OpenAI chat data. A `task_id` in a line (text or integer) becomes the task; without it an episode has none."""

    name: ClassVar[str] = "openai"
    description: ClassVar[str] = 'OpenAI chat data: JSON Lines or a JSON list of {"messages": [...], "tools": [...]}'
    lines_stand_alone: ClassVar[Literal[True]] = True

    def detect(self, path: Path, head: str) -> bool:
        """True for objects with `messages` on their first level, and for an empty `.jsonl`, which is data with no lines."""
        if not head.strip("\ufeff \t\r\n"):
            return path.suffix.lower() == ".jsonl"
        openings = opening_keys(head)
        if (
            is_anthropic(head)
            or is_call_log(head)
            or (any("info" in keys for keys in openings) and any(mark in head for mark in _OTHER_MARKS))
        ):
            return False
        return any("messages" in keys and not keys & _OTHER_FORMATS for keys in openings)

    def count(self, path: Path) -> int | None:
        """The number of lines that are not blank; None for a JSON list."""
        return count_entries(path)

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """One Episode or Refusal for each line that is not blank, in order. Raises ImportFailed for an unreadable file."""
        return _read(path)

    def read_scored(self, path: Path, key: str) -> Iterator[Episode | Refusal]:
        """`read` of lines whose `key` says how they ended: they need not be demonstrations, and it becomes a tag."""
        return _read(path, key)


def _read(path: Path, score_key: str | None = None) -> Iterator[Episode | Refusal]:
    lines = Repeated("tools")
    return convert_entries(path, iter_entries(path, lines.parse), _Reading(lines, score_key).to_episode)


@dataclass(frozen=True)
class _Tools:
    """The tool schemas of a line as an Episode has them, and how many padded keys were taken out."""

    schemas: tuple[dict[str, JsonValue], ...]
    n_keys: int


class _Reading:
    """Makes episodes of the `lines` of one file, whose tool schemas are mostly the same. `score_key` says how each line ended."""

    def __init__(self, lines: Repeated, score_key: str | None = None) -> None:
        self._score_key = score_key
        self._find_clean_tools = Remembered(_find_clean_tools, lambda tools, _: lines.keeps(tools))

    def to_episode(self, row: object) -> Episode:
        """The episode of a line; refused where it is none."""
        if not isinstance(row, dict) or "messages" not in row:
            keys = f"keys {show(sorted(row))}" if isinstance(row, dict) else show(row)
            raise EntryRefused("bad_shape", keys, "an object with `messages`", "write one conversation a line, or give its --format")
        if KEY in row:
            return _restore(row)
        weight = _find_weight(row.get("weight"))
        messages, tools = find_plain(row["messages"]), self._find_clean_tools(row.get("tools"))
        is_seen = {"weight": True, "messages": messages is not None, "tools": tools is not None}
        require_clean({key: value for key, value in row.items() if not is_seen.get(key)})
        _require_demonstration({key: value for key, value in row.items() if key != self._score_key} if self._score_key else row)
        if tools is None or row.get("functions"):
            tools = _take_tools(row.get("tools"), row.get("functions"))
        taken, n_arguments = _take_messages(row["messages"], messages, tools)
        require_own_words(taken.messages)
        if self._score_key is None:
            _require_no_failed_end(taken.messages)
        extra, ignored = _other_keys(row)
        task_id = _find_task_id(row)
        notes = {"decoded_arguments": taken.n_decoded, "padded_keys_removed": tools.n_keys + n_arguments}
        tags = {"format": OpenAIChatImporter.name, "outcome_from": "format", **extra, **ignored_tag(taken.ignored | ignored)}
        tags |= {name: str(count) for name, count in notes.items() if count}
        if weight is not None:
            tags["weight"] = str(weight)
        episode = Episode(
            task_id=task_id,
            group_id=task_id,
            messages=tuple(taken.messages),
            outcome=Success(1.0),
            metadata=EpisodeMetadata(tags=dict(sorted(tags.items()))),
        )
        return episode.model_copy(update={"tools": tools.schemas})  # which were validated once for all lines


def _take_tools(tools: object, functions: object = None) -> _Tools:
    schemas, n_keys = without_padding(take_tools(tools, functions))
    return _Tools(_SCHEMAS.validate_python(schemas), n_keys)


def _find_clean_tools(raw: object) -> _Tools | None:
    """The tools in `raw`; None where there is something to refuse, which is told in its turn."""
    try:
        require_clean({"tools": raw})
        return _take_tools(raw)
    except EntryRefused:
        return None


def _take_messages(raw: object, plain: tuple[Message, ...] | None, tools: _Tools) -> tuple[Taken, int]:
    """(the messages, how many padded arguments were taken out); plain ones have none."""
    if plain is not None:
        require_turns(plain, "messages")
        return Taken(list(plain)), 0
    unpadded, n_arguments = without_padded_arguments(raw, cast("tuple[dict[str, object], ...]", tools.schemas))
    return take_messages(unpadded, "messages"), n_arguments


def _restore(row: dict[str, object]) -> Episode:
    """An episode that `loraloop export` wrote."""
    require_clean(row)
    tools = cast("tuple[dict[str, JsonValue], ...]", take_tools(row.get("tools")))
    return Exported.parse(row[KEY]).restore(take_messages(row["messages"], "messages").messages, tools)


def require_own_words(messages: Sequence[Message]) -> None:
    """Refuse turns to be learned that hold an observation after an action: it would teach the agent to make up observations."""
    for number, message in enumerate(messages, 1):
        if message.is_agent and message.weight and has_observation(message.content or ""):
            found = f"an Observation behind an Action inside message {number}, a turn of the agent: {show(message.content)}"
            advice = "put each observation into a turn of the user, or its `weight` to 0"
            raise EntryRefused("observation_in_turn", found, "only the agent's own words in its turns", advice)


def _require_demonstration(row: dict[str, object]) -> None:
    """Refuse lines that mean something else than "learn this": booking them as a success would train on the wrong thing."""
    telling = _VERDICTS | _PREFERENCES | _MEDIA | {"system", "choices"}
    for key in (key for key, value in row.items() if key in telling and value not in (None, "", [], {})):
        found = f"the key `{key}` = {show(row[key])}"
        if key in _VERDICTS | _PREFERENCES:
            advice = f"keep the lines worth learning and remove `{key}` from them, or import with a format that reads it"
            raise EntryRefused("not_a_demonstration", found, "demonstrations, which carry no verdict or preference", advice)
        if key in _MEDIA:
            raise EntryRefused("unsupported_content", found, "text and function calls only", "leave the entry out")
        if key == "system":
            raise EntryRefused("bad_shape", found, "the system prompt as the first message", "move it there, with role system")
        if key == "choices":
            raise EntryRefused("bad_shape", found, "the whole conversation in `messages`", "append the answer to `messages`")


def _require_no_failed_end(messages: Sequence[Message]) -> None:
    """Refuse a trace whose last words, from its environment, tell that it failed."""
    last = messages[-1]
    if not last.is_agent and isinstance(find_verdict(last.content or ""), Failure):
        found = f"an end that tells of a failure: {show(last.content)}"
        raise EntryRefused("not_a_demonstration", found, "demonstrations, which end well", "leave the entry out")


def _find_weight(raw: object) -> float | None:
    if raw is None:
        return None
    weight = find_finite(raw)
    if weight is None or weight < 0:
        advice = "write 0 to leave the line out of training, or remove the key for 1"
        raise EntryRefused("bad_weight", f"weight {show(raw)}", "a finite number from 0 up", advice)
    return abs(weight)  # -0.0 is 0.0


def _has_task_id(row: dict[str, object]) -> bool:
    value = row.get("task_id")
    return isinstance(value, int | str) and not isinstance(value, bool) and value != ""


def _find_task_id(row: dict[str, object]) -> str | None:
    return str(row["task_id"]) if _has_task_id(row) else None


def _other_keys(row: dict[str, object]) -> tuple[dict[str, str], set[str]]:
    """(tags, names left behind) for the keys that an Episode has no field for; a `task_id` of a wrong type is one of them."""
    known = _KNOWN if _has_task_id(row) or row.get("task_id") is None else _KNOWN - {"task_id"}
    texts = {key: canonical_json(value) for key, value in row.items() if key not in known}
    kept = {key: text for key, text in texts.items() if len(text) < MAX_TAG_CHARS and key not in _OWN_TAGS}
    if isinstance(terms := row.get(LICENSE_TAG), str) and LICENSE_TAG in kept:
        kept[LICENSE_TAG] = terms  # as `--license` says them
    return kept, texts.keys() - kept.keys()
