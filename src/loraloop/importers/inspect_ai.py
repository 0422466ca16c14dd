"""Inspect AI logs: one JSON document {version, status, eval, samples}, or the same as a `.eval` archive (see `eval_archive`).

Each sample is an episode; its epochs are attempts at one task. Long texts are kept once, under `attachments`, and put back. The results of
tools that failed are what the agent saw: the error. Turns of the assistant in the sample's own input are examples, marked `is_demo`.
Tool schemas are those of the last call to the model.

The score is the outcome where there is one: C is a success, I, P and N are failures that name it, and so is a number below 1. With several
scores, or one of several values, nothing says which counts: the outcome is Unknown and all are tags. A sample that a limit ended is a
Timeout unless it was solved; one that an error ended is refused. `target` and the scorer's words are ground truth and not stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, cast

from pydantic import JsonValue

from loraloop.chat.openai_messages import take_messages
from loraloop.chat.refused_entry import EntryRefused, find_finite, show
from loraloop.episode import AnyOutcome, Episode, EpisodeMetadata, Failure, Success, Timeout, Unknown
from loraloop.errors import ImportFailed
from loraloop.importers.agent_turns import as_list, as_object, require_list, times_of, to_call, to_outcome, to_tools
from loraloop.importers.entry import Entry, convert_entries, find_id, require_clean, require_object, to_tags
from loraloop.importers.eval_archive import has_archive, is_archive, iter_samples, load_header
from loraloop.importers.json_input import first_object_keys, load_with_list
from loraloop.importers.null_padding import without_padding
from loraloop.training_data import Refusal

_ATTACHMENT = re.compile(r"attachment://([0-9a-zA-Z]{8,64})")
_MEMBERS = ("_journal/start.json", "header.json", "samples/")
_KNOWN_MESSAGE = {"id", "role", "content", "source", "tool_calls", "tool_call_id", "function", "error", "model", "metadata", "internal"}
_LETTERS = ("I", "P", "N")


class InspectImporter:
    """Reads Inspect AI logs. The task is the evaluation's task and the sample's id."""

    name: ClassVar[str] = "inspect"
    description: ClassVar[str] = 'Inspect AI log: a .eval archive, or JSON {"version", "status", "eval", "samples"}'

    def detect(self, path: Path, head: str) -> bool:
        """True for an object with `eval` and `plan` or `status`, and for a zip that is named `.eval` or has a log's members."""
        if is_archive(head):
            return path.suffix.lower() == ".eval" or any(name in head for name in _MEMBERS)
        keys = first_object_keys(head)
        return head.lstrip("\ufeff \t\r\n").startswith("{") and "eval" in keys and bool(keys & {"plan", "status"})

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """None: the whole file must be read to count its samples."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """One Episode or Refusal for each sample, in order; of an archive one at a time. Raises ImportFailed for no such log."""
        if has_archive(path):
            log, samples = as_object(load_header(path)), iter_samples(path)
        else:
            document, long_list = load_with_list(path, "samples", "sample")
            log = as_object(document)
            if "eval" not in log:
                advice = "give a file that Inspect wrote, or the right --format"
                raise ImportFailed(
                    f"{path}: found keys {show(sorted(log))}; expected {{version, status, eval, samples}}; do this: {advice}"
                )
            samples = long_list or (Entry(f"sample {number}", one) for number, one in enumerate(as_list(log.get("samples")), 1))
        yield from convert_entries(path, samples, lambda sample: _to_episode(sample, log))


def _to_episode(value: object, log: dict[str, object]) -> Episode:
    sample = require_object(value, ("id", "messages"), "a sample with id and messages")
    if sample.get("error"):
        found = f"a sample that an error ended: {show(as_object(sample['error']).get('message'))}"
        raise EntryRefused("run_error", found, "a sample that came to its end", "run it again: this says nothing of the agent")
    setting, attachments = as_object(log.get("eval")), as_object(sample.get("attachments"))
    events = [as_object(event) for event in as_list(sample.get("events"))]
    calls = [event for event in events if event.get("event") == "model"]
    schemas = calls[-1].get("tools") if calls else None
    require_clean([sample["messages"], schemas])
    tools, n_keys = without_padding(to_tools(_with_attachments(schemas, attachments)))
    raw = [require_object(message, ("role",), "a message with its role") for message in require_list(sample["messages"], "messages")]
    messages = [_to_message(cast("dict[str, object]", _with_attachments(message, attachments))) for message in raw]
    scores, limit = _take_scores(sample), as_object(sample.get("limit")).get("type")
    task = setting.get("task")
    require_clean([messages, list(tools), scores, limit, task, sample["id"], setting.get("model"), log.get("status")])
    taken = take_messages(messages, "messages")
    number = find_id(sample, "id")
    task_id = f"{task}/{number}" if isinstance(task, str) and number else number
    tags = to_tags(
        InspectImporter.name,
        taken.ignored,
        decoded_arguments=taken.decoded_arguments,
        padded_keys_removed=n_keys or None,
        epoch=find_id(sample, "epoch"),
        limit=limit,
        status=log.get("status"),
        model=setting.get("model"),
        **{f"score.{name}": score for name, score in scores.items()},
    )
    stamps = [sample.get("started_at"), sample.get("completed_at"), *(event.get("timestamp") for event in events)]
    return Episode(
        task_id=task_id,
        group_id=task_id,
        messages=tuple(taken.messages),
        tools=cast("tuple[dict[str, JsonValue], ...]", tools),
        outcome=_find_outcome(scores, limit),
        metadata=EpisodeMetadata(scenario=InspectImporter.name, tags=tags, **times_of(stamps)),
    )


def _with_attachments(value: object, attachments: dict[str, object]) -> object:
    """`value` with every reference to an attachment replaced by its text; refused as `no_content_recorded` when it is not there."""

    def text_of(found: re.Match[str]) -> str:
        text = attachments.get(found[1])
        if not isinstance(text, str):
            raise EntryRefused("no_content_recorded", found[0], "the text under `attachments`", "write the log with its attachments")
        return text

    if isinstance(value, str):
        return _ATTACHMENT.sub(text_of, value) if "attachment://" in value else value
    if isinstance(value, list):
        return [_with_attachments(part, attachments) for part in value]
    if isinstance(value, dict):
        return {key: _with_attachments(part, attachments) for key, part in value.items()}
    return value


def _to_message(raw: dict[str, object]) -> dict[str, object]:
    message: dict[str, object] = {key: value for key, value in raw.items() if key not in _KNOWN_MESSAGE}
    role, content = raw["role"], raw.get("content")
    thoughts = [part for part in as_list(content) if as_object(part).get("type") == "reasoning"]
    if isinstance(content, list):
        content = [part for part in content if part not in thoughts]
    message |= {"role": role, "content": content}
    if role == "tool":
        error = as_object(raw.get("error")).get("message")
        message |= {"tool_call_id": raw.get("tool_call_id"), "content": error if isinstance(error, str) and not content else content}
    if role == "assistant":
        said = [as_object(part).get("reasoning") for part in thoughts]
        message["reasoning_content"] = "\n".join(text for text in said if isinstance(text, str)) or None
        message["tool_calls"] = [_to_call(call) for call in as_list(raw.get("tool_calls"))]
        message |= {"is_demo": True} if raw.get("source") == "input" else {}
    return message


def _to_call(value: object) -> dict[str, object]:
    call = require_object(value, ("function",), "a call with its function")
    return to_call(call.get("id"), call["function"], call.get("arguments"))


def _take_scores(sample: dict[str, object]) -> dict[str, object]:
    """Values by name; a score of several values gives one for each. Older logs have one `score`."""
    scores = as_object(sample.get("scores")) or ({"score": sample["score"]} if sample.get("score") else {})
    values: dict[str, object] = {}
    for name, score in scores.items():
        value = as_object(score).get("value")
        if isinstance(value, dict):
            values |= {f"{name}.{key}": part for key, part in value.items()}
        elif value is not None:
            values[name] = value
    return values


def _find_outcome(scores: dict[str, object], limit: object) -> AnyOutcome:
    score = next(iter(scores.values())) if len(scores) == 1 else None
    is_number = isinstance(score, bool) or find_finite(score) is not None
    outcome = to_outcome(score, "score") if is_number else _of_letter(score)
    if limit is None or isinstance(outcome, Success):
        return outcome
    return Unknown() if limit == "operator" else Timeout(float(cast("float", score)) if is_number else None)


def _of_letter(score: object) -> AnyOutcome:
    if score == "C":
        return Success(1.0)
    return Failure(f"score {score}") if score in _LETTERS else Unknown()
