"""The text that an imported episode's id is a hash of: what it says, as canonical JSON.

Exactly `canonical_json` of the fields that are not at their defaults, made faster: messages by pydantic's writer, which writes strings as
Python does, and tool schemas once for all episodes that share them. A letter changed here makes every store take in everything twice.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, JsonValue, TypeAdapter
from pydantic_core import PydanticSerializationError, to_json

from loraloop.episode import LICENSE_TAG, Episode, EpisodeMetadata, FunctionCall, Message, ToolCall
from loraloop.files import canonical_json
from loraloop.importers.remembered import Remembered

MAX_KEPT_CHARS = 1 << 17
"""Of tool schemas whose text is remembered: twice what `Repeated` finds again, for schemas that other importers share."""

_MESSAGES = TypeAdapter(tuple[Message, ...])
_FIELDS: dict[type[BaseModel], list[tuple[str, Any]]] = {
    kind: [(name, field.default) for name, field in sorted(kind.model_fields.items())] for kind in (Message, ToolCall, FunctionCall)
}
"""(name, default) by the alphabet."""


def content_text(episode: Episode) -> str:
    """Everything that `episode` says except its id, the time it was taken in, and its terms.

    The order of keys in tool schemas counts, as chat templates render them in that order. Fields at their defaults do not, so a
    field added to Episode later leaves the text of episodes without it as it was.
    """
    unsaid = {"id", "outcome", "messages", "tools", "metadata"}
    said = episode.model_dump(mode="json", exclude=unsaid, exclude_defaults=True)
    said["outcome"] = episode.model_dump(mode="json", include={"outcome"})["outcome"]
    said["metadata"] = _without_terms(episode.metadata).model_dump(mode="json", exclude={"created_at"}, exclude_defaults=True)
    texts = {key: canonical_json(value) for key, value in said.items()} | {"tools": _tools_text(episode.tools)}
    if episode.messages:
        texts["messages"] = messages_text(episode.messages)
    return "{" + ",".join(f'"{key}":{text}' for key, text in sorted(texts.items())) + "}"


def _without_terms(metadata: EpisodeMetadata) -> EpisodeMetadata:
    if LICENSE_TAG not in metadata.tags:
        return metadata
    return metadata.model_copy(update={"tags": {tag: said for tag, said in metadata.tags.items() if tag != LICENSE_TAG}})


def messages_text(messages: tuple[Message, ...]) -> str:
    """`canonical_json` of the messages without what is at its default."""
    if all(message.weight == 1 for message in messages):  # the writers differ in numbers such as 1e-5
        try:
            return to_json(list(map(_by_name, messages))).decode()
        except PydanticSerializationError:  # half a surrogate pair, or what is no valid value
            pass
    return canonical_json(_MESSAGES.dump_python(messages, mode="json", exclude_defaults=True))


def _by_name(model: BaseModel) -> dict[str, object]:
    """What is said in `model` and the models in it, by the alphabet."""
    said: dict[str, object] = {}
    state = vars(model)
    for name, default in _FIELDS[type(model)]:
        value = state[name]
        if value is not default and value != default:
            if isinstance(value, tuple):
                value = list(map(_by_name, value))
            elif isinstance(value, BaseModel):
                value = _by_name(value)
            said[name] = value
    return said


def _to_tools_text(tools: tuple[dict[str, JsonValue], ...]) -> str:
    return canonical_json([json.dumps(tool, ensure_ascii=False) for tool in tools])


_tools_text = Remembered(_to_tools_text, lambda _, text: len(text) <= MAX_KEPT_CHARS)
