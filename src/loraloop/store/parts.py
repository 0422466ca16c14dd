"""An episode as bytes to store: a header, a body, and the parts of it that are kept once however many episodes have them.

A part is a message, a tool schema, or a value of a record. One of `INLINE_BYTES` or more is a blob: its key is the BLAKE2b-128 of its
JSON text, and the body has a mark in its place. Smaller ones stay in the body, where they are compressed together: a key and its
entries in an index would take as much. Joined again, body and blobs are the very text that was taken apart.
"""

from __future__ import annotations

import hashlib
import json
import marshal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import zstandard
from pydantic import TypeAdapter
from pydantic_core import PydanticSerializationError, to_json

from loraloop.episode import AnyRecord, Episode, Message
from loraloop.errors import StoreError
from loraloop.store.text import escape_surrogates

INLINE_BYTES = 512
"""The JSON text of a part from which on it is kept by key; measured in docs/decisions/0008-store.md."""
KEY_BYTES = 16
COMPRESS_BYTES = 128
"""Shorter texts do not become smaller."""
LEVEL = 3
"""Of zstd, its own default."""
MAX_CACHED_BYTES = 1 << 16
"""Of an episode's tool schemas that are remembered; those of 128 episodes are."""
MAX_TEXT_BYTES = 1 << 31
"""No text of ours is longer; a frame that claims more is damaged."""

_MARK = b"\0"  # stands for a blob: JSON text has no such byte, as strings escape it
_ZSTD = b"\x28\xb5\x2f\xfd"  # a frame begins so, JSON text never
_MESSAGES = TypeAdapter(tuple[Message, ...])
_RECORDS = TypeAdapter(tuple[AnyRecord, ...])
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True)
class Encoded:
    """An episode taken apart; texts are not compressed yet."""

    meta: bytes
    """The JSON text of its EpisodeDto."""
    body: bytes
    """The JSON text of all else, with marks for blobs."""
    keys: tuple[bytes, ...]
    """Of the blobs, in the order of the marks."""
    blobs: Mapping[bytes, bytes]
    """Their JSON texts by key."""

    @property
    def digest(self) -> bytes:
        """The same for every episode with the same messages, tools and records, whatever its id, outcome and tags."""
        return digest_of(self.body, join_keys(self.keys))


def encode(episode: Episode) -> Encoded:
    """`episode` taken apart. Raises StoreError when it holds what JSON cannot (NaN, infinity) or what is no valid value."""
    blobs: dict[bytes, bytes] = {}
    keys: list[bytes] = []

    def take(text: bytes, key: bytes | None = None) -> bytes:
        if len(text) < INLINE_BYTES:
            return text
        key = key or key_of(text)
        keys.append(key)
        blobs[key] = text
        return _MARK

    def part(value: object) -> bytes:
        return take(_to_utf8(value))

    try:
        # not mode="json": it turns some lone surrogates into U+FFFD. Fields at their defaults are left out of messages, which have many;
        # not out of records, which are told apart by such a one
        meta = _to_utf8(episode.to_dto().model_dump(warnings="error"))
        messages = _MESSAGES.dump_python(episode.messages, exclude_defaults=True, warnings="error")
        records = _RECORDS.dump_python(episode.records, warnings="error")
        body = b'{"is_open":%s,"messages":%s,"tools":%s,"records":%s}' % (
            b"true" if episode.is_open else b"false",
            _list(take(_to_utf8_fast(message)) for message in messages),
            _list(take(*tool) for tool in _tools(episode.tools)),
            _list(_record(record, part) for record in records),
        )
    except (ValueError, TypeError) as error:  # pydantic's own serialization error is a ValueError
        raise StoreError(f"episode {episode.id} cannot be stored as JSON: {error}; correct that value and append it again") from error
    return Encoded(meta=meta, body=body, keys=tuple(keys), blobs=blobs)


def decode(meta: bytes, body: bytes, keys: Iterable[bytes], blobs: Mapping[bytes, bytes]) -> Episode:
    """The episode that was taken apart; the texts are not compressed. Raises ValueError when they are none, KeyError for a missing blob."""
    pieces = body.split(_MARK)
    texts = [blobs[key] for key in keys]
    if len(pieces) != len(texts) + 1:
        raise ValueError(f"it has {len(texts)} keys for {len(pieces) - 1} places")
    joined = b"".join(piece + text for piece, text in zip(pieces, [*texts, b""], strict=True))
    header, _, counts = meta.rpartition(b',"n_messages":')  # the last one is ours, as are the two counts behind it
    if not counts:
        raise ValueError("its header is not whole")
    text = header + b"," + joined[1:]
    try:
        return Episode.model_validate_json(text)
    except ValueError:  # it refuses the escapes of lone surrogates
        return Episode.model_validate(json.loads(text))


def digest_of(body: bytes, joined_keys: bytes) -> bytes:
    """`Encoded.digest` of what is stored."""
    state = hashlib.blake2b(body.partition(b",")[2], digest_size=KEY_BYTES)  # behind whether it is open
    state.update(joined_keys)
    return state.digest()


def key_of(text: bytes) -> bytes:
    """The key of a blob with this JSON text."""
    return hashlib.blake2b(text, digest_size=KEY_BYTES).digest()


def join_keys(keys: Iterable[bytes]) -> bytes:
    """Keys in one value, as an episode's row has them."""
    return b"".join(keys)


def split_keys(joined: bytes) -> list[bytes]:
    """The keys in such a value."""
    return [joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)]


class Packer:
    """Compresses texts where that pays; for one thread."""

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False)

    def pack(self, text: bytes) -> bytes:
        """`text` as it is stored."""
        if len(text) < COMPRESS_BYTES:
            return text
        packed = self._compressor.compress(text)
        return packed if len(packed) < len(text) else text


class Unpacker:
    """Gives texts back as they were; for one thread."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor()

    def unpack(self, stored: bytes) -> bytes:
        """The text that was packed. Raises ValueError when it is damaged."""
        if not stored.startswith(_ZSTD):
            return stored
        try:
            if not 0 <= zstandard.frame_content_size(stored) <= MAX_TEXT_BYTES:
                raise ValueError("a compressed text of it does not say its length")
            return self._decompressor.decompress(stored)
        except zstandard.ZstdError as error:
            raise ValueError(f"a compressed text of it is damaged ({error})") from error

    def unpack_blob(self, key: bytes, stored: bytes) -> bytes:
        """The text of the blob `key`. Raises ValueError when it is not that."""
        text = self.unpack(stored)
        if key_of(text) != key:
            raise ValueError(f"the blob {key.hex()} is damaged")
        return text


def _record(record: Mapping[str, object], part: Any) -> bytes:
    """Lists within a record (messages, tools) part by part, as one call repeats what the call before it had."""
    fields = (
        _to_utf8(name) + b":" + (_list(map(part, value)) if isinstance(value, list | tuple) else part(value))
        for name, value in record.items()
    )
    return b"{" + b",".join(fields) + b"}"


def _list(texts: Iterable[bytes]) -> bytes:
    return b"[" + b",".join(texts) + b"]"


def _tools(tools: tuple[Mapping[str, object], ...]) -> Sequence[tuple[bytes, bytes]]:
    """The text and key of each; those that many episodes have are made once. Equal bytes of marshal are equal values, to the type."""
    try:
        marshalled = marshal.dumps(cast("Any", tools), 2)
    except ValueError:  # of a type that JSON has not either
        marshalled = b""
    if 0 < len(marshalled) < MAX_CACHED_BYTES:
        return _tools_again(marshalled)
    return [_tool(tool) for tool in tools]


@lru_cache(maxsize=128)
def _tools_again(marshalled: bytes) -> Sequence[tuple[bytes, bytes]]:
    return [_tool(tool) for tool in marshal.loads(marshalled)]  # noqa: S302  it is ours, of a moment ago


def _tool(tool: Mapping[str, object]) -> tuple[bytes, bytes]:
    text = _to_utf8(tool)
    return text, key_of(text)


def _to_utf8_fast(value: object) -> bytes:
    """The same as `_to_utf8`, of what holds strings, numbers, lists and dicts only; five times as fast."""
    try:
        text = to_json(value, inf_nan_mode="constants")
    except PydanticSerializationError:  # a lone surrogate
        return _to_utf8(value)
    return _to_utf8(value) if b"NaN" in text or b"Infinity" in text else text


def _to_utf8(value: object) -> bytes:
    text = _to_json(value)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return escape_surrogates(text).encode()
