"""The text behind an id is canonical JSON to the letter, however it is made."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloop.episode import Episode, EpisodeMetadata, Failure, FunctionCall, Message, Success, Timeout, ToolCall, Unknown
from loraloop.files import canonical_json
from loraloop.importers.content_text import content_text, messages_text

TEXT = st.text(max_size=8) | st.sampled_from(["\u2028", "\x7f", "\x00\x1f\b\f", '"\\/', "😀", "é\u0301", "</s>"])
MAYBE = st.none() | TEXT
CALLS = st.builds(ToolCall, id=MAYBE, function=st.builds(FunctionCall, name=TEXT, arguments=TEXT))
MESSAGES = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=MAYBE,
    name=MAYBE,
    tool_calls=st.lists(CALLS, max_size=2).map(tuple),
    tool_call_id=MAYBE,
    is_demo=st.booleans(),
    author=MAYBE,
    weight=st.sampled_from([1.0, 1, 0.0, 1e-5, 1e22, 0.1]),
    reasoning=MAYBE,
)
OUTCOMES = st.sampled_from([Success(1.0), Success(1e-7), Failure("x"), Timeout(), Timeout(0.5), Unknown()])


def plainly(episode):
    """As it was made at first: every part as Python values, then one text."""
    said = episode.model_dump(mode="json", exclude={"id", "outcome", "tools", "metadata"}, exclude_defaults=True)
    said["outcome"] = episode.model_dump(mode="json", include={"outcome"})["outcome"]
    tags = {tag: text for tag, text in episode.metadata.tags.items() if tag != "license"}
    metadata = episode.metadata.model_copy(update={"tags": tags})
    said["metadata"] = metadata.model_dump(mode="json", exclude={"created_at"}, exclude_defaults=True)
    said["tools"] = [json.dumps(tool, ensure_ascii=False) for tool in episode.tools]
    return canonical_json(said)


TOOLS = st.dictionaries(TEXT, MAYBE | st.integers() | st.lists(TEXT, max_size=2), max_size=3)
EPISODES = st.builds(
    Episode,
    messages=st.lists(MESSAGES, max_size=4).map(tuple),
    tools=st.lists(TOOLS, max_size=2).map(tuple),
    outcome=OUTCOMES,
    task_id=MAYBE,
    is_open=st.booleans(),
    metadata=st.builds(EpisodeMetadata, tags=st.dictionaries(TEXT | st.just("license"), TEXT, max_size=2), scenario=MAYBE),
)


@settings(max_examples=300, deadline=None)
@given(EPISODES)
def test_it_is_canonical_json(episode):
    assert content_text(episode) == plainly(episode)


@pytest.mark.parametrize("text", ["\ud83d", "a\udc00b", "\ude00\ud83d"])
def test_half_a_surrogate_pair_is_written_as_ever(text):
    episode = Episode(messages=(Message(role="user", content=text),))
    assert content_text(episode) == plainly(episode)


def test_every_field_of_a_message_is_in_it():
    said = {"role": "tool", "content": "a", "name": "b", "tool_call_id": "c", "is_demo": True, "author": "d", "reasoning": "e"}
    call = ToolCall(id="f", function=FunctionCall(name="g", arguments="h"))
    message = Message(**said, tool_calls=(call,))
    assert said.keys() | {"tool_calls", "weight"} == Message.model_fields.keys()
    assert json.loads(messages_text((message,))) == [said | {"tool_calls": [{"id": "f", "function": {"name": "g", "arguments": "h"}}]}]
