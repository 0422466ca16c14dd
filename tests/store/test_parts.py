"""An episode taken apart and put together is the same to the letter, shares what is large, and is not read when a part is damaged."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloop.episode import ActionRecord, Episode, EpisodeMetadata, LlmCallRecord
from loraloop.errors import StoreError
from loraloop.store.parts import INLINE_BYTES, Packer, Unpacker, decode, encode, join_keys, split_keys
from loraloop.store.sql import SqlEpisodeStore
from loraloop.store.text import to_body
from loraloop.testing import make_episode

texts = st.text(st.characters(exclude_categories=()), max_size=30) | st.integers(1, 900).map(lambda n: '"\\\n\0é' * n)
"""Lone surrogates too."""
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
tools = st.dictionaries(texts, json_values, max_size=5)
messages = st.fixed_dictionaries({"role": st.just("user"), "content": texts | st.none()})
calls = st.builds(
    lambda history, tool: LlmCallRecord.model_validate({"messages": history, "response": history[0], "tools": [tool], "timestamp_ms": 1}),
    st.lists(messages, min_size=1, max_size=3),
    tools,
)
records = calls | st.builds(lambda text: ActionRecord(action=text, output=text, timestamp_ms=1), texts)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(messages, max_size=4), st.lists(tools, max_size=3), st.lists(records, max_size=3), st.dictionaries(texts, texts, max_size=3)
)
def test_any_episode_comes_back_to_the_letter(said, schemas, recorded, tags):
    episode = make_episode(messages=said, tools=schemas, records=recorded, metadata=EpisodeMetadata(created_at=1, tags=tags))
    encoded = encode(episode)
    packer, unpacker = Packer(), Unpacker()
    stored = {key: packer.pack(text) for key, text in encoded.blobs.items()}
    read = {key: unpacker.unpack_blob(key, data) for key, data in stored.items()}
    again = decode(encoded.meta, unpacker.unpack(packer.pack(encoded.body)), split_keys(join_keys(encoded.keys)), read)
    assert to_body(again) == to_body(episode)
    assert encode(again) == encoded, "the same episode has the same keys"
    assert all(len(text) >= INLINE_BYTES for text in encoded.blobs.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), b"bytes", {1, 2}, object()])
@pytest.mark.parametrize("where", ["tools", "content"])
def test_what_json_cannot_hold_is_refused_and_never_bent(value, where):
    changes = (
        {"tools": ({"x": value},)} if where == "tools" else {"messages": (make_episode().messages[0].model_copy(update={"weight": value}),)}
    )
    for _ in range(2):
        with pytest.raises(StoreError, match="cannot be stored as JSON"):
            encode(make_episode().model_copy(update=changes))


@pytest.mark.parametrize("text", ["NaN", "Infinity", '-Infinity is "NaN"'])
def test_words_that_look_like_numbers_are_words(text):
    episode = make_episode(messages=[{"role": "user", "content": text}, {"role": "assistant", "content": text}])
    encoded = encode(episode)
    assert decode(encoded.meta, encoded.body, encoded.keys, encoded.blobs) == episode


def test_schemas_that_compare_equal_and_are_not_the_same_are_kept_apart():
    """1, 1.0 and true are equal in Python, and three things to a chat template; so is the order of keys."""
    schemas = [{"a": 1, "b": 2}, {"a": 1.0, "b": 2}, {"a": True, "b": 2}, {"b": 2, "a": 1}]
    for _ in range(2):
        episode = make_episode(tools=schemas)
        assert to_body(rebuilt(episode)) == to_body(episode)


def rebuilt(episode: Episode) -> Episode:
    encoded = encode(episode)
    return decode(encoded.meta, encoded.body, encoded.keys, encoded.blobs)


def test_a_history_that_each_call_repeats_is_stored_once(tmp_path: Path):
    """Calls of one run, each its own episode, with the whole history of words up to it."""
    said = [{"role": ("user", "assistant")[n % 2], "content": f"{n} " * 600} for n in range(20)]
    schema = {"type": "function", "function": {"name": "boil", "description": "Boils. " * 200}}
    episodes = [make_episode(messages=said[:n], tools=[schema]) for n in range(2, 21)]
    with SqlEpisodeStore(tmp_path / "episodes.db") as store:
        store.append_many(episodes[:9])
        store.append_many(episodes[9:])
        with store._database.connecting() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM blobs").scalar_one() == len(said) + 1
        assert store.query() == episodes
    calls = [LlmCallRecord.model_validate({"messages": said[:n], "response": said[n], "timestamp_ms": n}) for n in range(1, 19)]
    assert len(encode(make_episode(messages=[], records=calls)).blobs) == 19, "in records of one episode, too"


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM blobs",
        "UPDATE blobs SET data = x'28b52ffd00'",
        "UPDATE blobs SET data = CAST('\"boiled\"' AS BLOB)",
        "UPDATE episodes SET blob_keys = x''",
    ],
)
def test_a_damaged_blob_is_told_and_never_read(tmp_path: Path, damage: str):
    episode = make_episode(messages=[{"role": "user", "content": "boil " * 300}])
    with SqlEpisodeStore(tmp_path / "episodes.db") as store:
        store.append(episode)
        with closing(sqlite3.connect(tmp_path / "episodes.db", isolation_level=None)) as connection:
            connection.execute(damage)
        for read in (lambda: store.get(episode.id), store.query):
            with pytest.raises(StoreError, match=rf"episode {episode.id} cannot be read.*restore it from a backup"):
                read()
        assert store.list_meta() == [episode.to_dto()]
