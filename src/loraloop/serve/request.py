"""One request of a client, read within limits and checked before any server sees it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from starlette.types import Receive, Scope

from loraloop.episode import EpisodeId
from loraloop.serve.applier import Endpoint
from loraloop.serve.wire import Declined, to_json_bytes

Api = Literal["chat/completions", "completions"]

CHOOSES_WEIGHTS = frozenset({"lora", "lora_name", "lora_path", "lora_request", "lora_adapter"})
"""Refused: the version that answers is the router's choice, and a server would take another for these in silence."""
SERVERS_OWN = frozenset({"cache_prompt", "id_slot", "slot_id", "n_cache_reuse", "kv_transfer_params", "vllm_xargs", "cache_salt"})
"""Dropped: they are about the server's memory, not about the answer."""
EPISODE_HEADER = b"x-loraloop-episode"


@dataclass(frozen=True)
class Request:
    """A request that may be passed on."""

    api: Api
    alias: str
    """What it calls: an alias, or a version's name."""
    body: Mapping[str, Any]
    """As the client sent it, without what is the server's own."""
    episode: str | None
    """The episode that it names; None when it names none."""

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        """Of a chat; a text completion has none."""
        found = self.body.get("messages")
        return found if isinstance(found, list) else ()

    def to_upstream(self, endpoint: Endpoint) -> bytes:
        """What `endpoint`'s server is sent."""
        return to_json_bytes({**self.body, **endpoint.body, "model": endpoint.model})


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes | None:
    """The body of a request; None when the client left before its end. Raises Declined (413) above `max_bytes`."""
    told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    pieces, size = [], int(told) if told.isdigit() else 0
    too_large = Declined(413, f"the request has more than {max_bytes:,} bytes, the most that is taken; send less", code="too_large")
    if size > max_bytes:
        raise too_large
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > max_bytes:
            raise too_large
        if not message.get("more_body"):
            return b"".join(pieces)


def read_request(api: Api, scope: Scope, raw: bytes) -> Request:
    """What the client asks for. Raises Declined (400) naming what is wrong with it."""
    try:
        body = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Declined(400, f"the request is not JSON ({error}); send an object", code="bad_json") from error
    if not isinstance(body, dict):
        raise Declined(400, "the request is not a JSON object; send one", code="bad_json")
    alias = body.get("model")
    if not isinstance(alias, str) or not alias:
        message = f"`model` is {alias!r}; name one that /v1/models lists"
        raise Declined(400, message, code="missing_model", param="model")
    for key in body:
        if key in CHOOSES_WEIGHTS:
            message = f"`{key}` cannot be chosen by a request; name a version as `model` instead, /v1/models lists them"
            raise Declined(400, message, code="unsupported_parameter", param=key)
    if api == "chat/completions":
        _check_messages(body.get("messages"))
    kept = {key: value for key, value in body.items() if key not in SERVERS_OWN}
    return Request(api, alias, kept, _find_episode(scope))


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise Declined(400, "`messages` is no list of objects; send at least one message", code="bad_messages", param="messages")
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            found = part.get("image_url") if isinstance(part, dict) else None
            url = found.get("url") if isinstance(found, dict) else found
            if url is not None and not str(url).startswith("data:"):
                shown = f"the server would fetch {str(url)[:80]!r}; send the image itself as a data: URL"
                raise Declined(400, shown, code="remote_content", param="messages")


def _find_episode(scope: Scope) -> str | None:
    """The episode in the header or in the path; the header counts."""
    named = next((value.decode("latin-1") for name, value in scope["headers"] if name == EPISODE_HEADER), None)
    named = named or scope.get("path_params", {}).get("episode")
    if named is None:
        return None
    try:
        return str(EpisodeId.parse(named))
    except ValueError as error:
        raise Declined(400, str(error), code="bad_episode_id") from error


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
