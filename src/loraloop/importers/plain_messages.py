"""Messages that are in the OpenAI shape already, to the letter: taken over all at once, several times as fast as one by one.

Only what nothing has to be repaired, refused or left behind of; anything else, and whatever might be, goes the careful way
(`openai_messages.take_messages`), which says what is the matter. Of the messages given here both ways make the same.
"""

from __future__ import annotations

from itertools import chain

from pydantic import TypeAdapter, ValidationError

from loraloop.episode import Message, ToolCall
from loraloop.importers.entry import is_clean_text

_KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id"})
_MESSAGES = TypeAdapter(tuple[Message, ...])


def find_plain(raw: object) -> tuple[Message, ...] | None:
    """The messages in `raw`, with clean texts (see `require_clean`); None when one of them is not plain.

    That the agent has a turn, and that results pair with calls, is still to be checked.
    """
    try:
        if not isinstance(raw, list) or not _KEYS.issuperset(chain.from_iterable(raw)):
            return None
        messages = _MESSAGES.validate_python(raw)
    except (TypeError, ValidationError):  # what is no object has keys that are none, or no keys
        return None
    texts: list[str | None] = []
    for message in messages:
        texts += (message.content, message.name, message.tool_call_id)
        if message.tool_calls and (message.role != "assistant" or any(map(_is_encoded_twice, message.tool_calls))):
            return None
        for call in message.tool_calls:
            texts += (call.id, call.function.name, call.function.arguments)
    return messages if is_clean_text("\n".join(text for text in texts if text)) else None


def _is_encoded_twice(call: ToolCall) -> bool:
    return call.function.arguments.lstrip().startswith('"')
