"""A call that went through the router: as a line of the journal, as the client's own JSON, and as the records that an episode holds.

The line keeps what was said as it was said, so that nothing about it can fail while a client waits. What a Message has no place for
(pictures, forms nobody knows) becomes a record with `error` that has the words as far as they go: kept, and never learned from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import JsonValue

from loraloop.chat.openai_messages import take_tools, to_message
from loraloop.chat.refused_entry import EntryRefused
from loraloop.episode import LlmCallRecord, Message, ServedCall
from loraloop.files import json_line
from loraloop.serve.request import Api
from loraloop.serve.wire import Answer, Choice

_NOT_PARAMETERS = {"messages", "prompt", "tools", "functions", "model"}
_TEXT_ONLY = "a text completion: it has no messages to learn from"


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call that a server was asked, whatever came of it."""

    api: Api
    alias: str
    version: str
    """The name of the version that answered."""
    body: Mapping[str, Any]
    """The client's request."""
    answer: Answer
    started_ms: int
    latency_ms: int
    error: str | None = None


def to_line(record_id: str, episode: str, call: Call) -> dict[str, Any]:
    """`call` as a line of the journal."""
    choices = {str(index): asdict(choice) for index, choice in sorted(call.answer.choices.items())}
    told = {"api": call.api, "alias": call.alias, "version": call.version, "body": dict(call.body), "choices": choices}
    times = {"started_ms": call.started_ms, "latency_ms": call.latency_ms, "error": call.error}
    return {"kind": "call", "id": record_id, "episode": episode, **told, **times}


def to_records(line: Mapping[str, Any]) -> list[LlmCallRecord]:
    """The records of a line: one for each choice, and one where there was no answer at all."""
    body = line["body"]
    problems = [line["error"]] if line["error"] else []
    if line["api"] == "completions":
        messages: tuple[Message, ...] = tuple(Message(role="user", content=text) for text in _prompts(body.get("prompt")))
        problems.append(_TEXT_ONLY)
    else:
        messages = tuple(_take(raw, f"messages {number}", problems) for number, raw in enumerate(body.get("messages") or [], 1))
    tools = _take_tools(body, problems)
    n_problems = len(problems)
    records = []
    for index, said in sorted((line["choices"] or {"0": asdict(Choice())}).items(), key=lambda pair: int(pair[0])):
        del problems[n_problems:]
        response = _take(_clean(said["message"]), "the answer", problems)
        served = ServedCall(
            id=line["id"],
            choice=int(index),
            alias=line["alias"],
            api=line["api"],
            finish_reason=said["finish_reason"],
            token_ids=tuple(said["token_ids"]),
            log_probs=tuple(said["log_probs"]),
            parameters={key: value for key, value in body.items() if key not in _NOT_PARAMETERS},
        )
        records.append(
            LlmCallRecord(
                timestamp_ms=line["started_ms"],
                messages=messages,
                response=response,
                tools=tools,
                model=line["version"],
                latency_ms=max(0, line["latency_ms"]),
                error="; ".join(problems) or None,
                served=served,
            )
        )
    return records


def _take(raw: Any, place: str, problems: list[str]) -> Message:
    try:
        return to_message(raw, place)
    except EntryRefused as error:
        problems.append(f"{error.reason}: {error}")
    role = raw.get("role") if isinstance(raw, dict) else None
    content = raw.get("content") if isinstance(raw, dict) else raw
    known = role if role in {"system", "user", "assistant", "tool"} else "user"
    return Message.model_validate(
        {"role": known, "content": content if content is None or isinstance(content, str) else json_line(content)}
    )


def _clean(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The answer without keys of servers that say nothing (`"annotations": []`)."""
    return {key: value for key, value in answer.items() if key in {"role", "content"} or value}


def _take_tools(body: Mapping[str, Any], problems: list[str]) -> tuple[dict[str, JsonValue], ...]:
    try:
        return tuple(take_tools(body.get("tools"), body.get("functions")))  # type: ignore[arg-type]  # JSON, as it was parsed
    except EntryRefused as error:
        problems.append(f"{error.reason}: {error}")
    return ()


def _prompts(prompt: object) -> Sequence[str]:
    if isinstance(prompt, list) and all(isinstance(each, str) for each in prompt):
        return prompt
    return [prompt if isinstance(prompt, str) else re.sub(r"\s+", "", json_line(prompt))]
