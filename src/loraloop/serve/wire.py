"""What goes over the wire in OpenAI's forms: errors, server-sent events, and an answer as it comes in, whole or chunk by chunk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic import JsonValue

from loraloop.errors import ServingError

DONE = b"[DONE]"
MAX_EVENT_BYTES = 16 << 20


class Declined(ServingError):
    """A request that is answered with an error; `status`, `kind` and `code` are what the client is told beside the message."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int | None = None
    ) -> None:
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after
        self.message = message
        super().__init__(status, message)

    def __str__(self) -> str:
        return self.message

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After`, where trying again may help."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}

    def to_json(self) -> dict[str, JsonValue]:
        """As OpenAI's clients read it."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": self.param}}


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def to_json_bytes(value: object) -> bytes:
    """JSON in ASCII: half an emoji, which a stream of pieces may hold, goes through as the escape that it came as."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def to_event(value: object) -> bytes:
    """A server-sent event of one line of JSON."""
    return b"data: " + to_json_bytes(value) + b"\n\n"


class Events:
    """Cuts a stream of bytes into server-sent events, each with the blank line that ends it."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The events that are whole now. Raises Declined for one that does not end within `MAX_EVENT_BYTES`."""
        self._rest += piece.replace(b"\r\n", b"\n") if b"\r" in piece else piece
        while (end := self._rest.find(b"\n\n")) >= 0:
            event, self._rest = self._rest[: end + 2], self._rest[end + 2 :]
            yield event
        if len(self._rest) > MAX_EVENT_BYTES:
            raise Declined(502, f"the server sent an event of more than {MAX_EVENT_BYTES >> 20} MiB", code="upstream_failed")

    @property
    def is_between(self) -> bool:
        """Whether nothing is left of an event that did not end."""
        return not self._rest.strip()


def data_of(event: bytes) -> bytes | None:
    """The data of an event; None for a comment, as servers send to keep a connection alive."""
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


@dataclass
class Choice:
    """One choice of an answer, as far as it has come."""

    message: dict[str, Any] = field(default_factory=lambda: {"role": "assistant", "content": None})
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def add(self, said: Mapping[str, Any]) -> None:
        """Add what a chunk says of this choice, or the whole of it."""
        if isinstance(said.get("text"), str):  # a text completion
            self._add_text("content", said["text"])
        delta = said.get("delta") if "delta" in said else said.get("message")
        if isinstance(delta, dict):
            self._add_delta(delta)
        if said.get("finish_reason") is not None:
            self.finish_reason = str(said["finish_reason"])
        if said.get("logprobs") or said.get("token_ids"):
            _add_measures(self, said)

    def _add_delta(self, delta: dict[str, Any]) -> None:
        for key, value in delta.items():
            if key == "tool_calls" and isinstance(value, list):
                self._add_calls(value)
            elif key != "role" and isinstance(value, str):
                self._add_text(key, value)
            elif key != "role" and value is not None:
                self.message[key] = value

    def _add_text(self, key: str, text: str) -> None:
        self.message[key] = (self.message.get(key) or "") + text

    def _add_calls(self, pieces: list[Any]) -> None:
        """Calls come in pieces with an index, or whole without one."""
        calls: list[dict[str, Any]] = self.message.setdefault("tool_calls", [])
        for piece in pieces:
            if not isinstance(piece, dict):
                continue
            at = piece.get("index")
            at = at if isinstance(at, int) and 0 <= at <= len(calls) else len(calls)
            if at == len(calls):
                calls.append({"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
            call, function = calls[at], piece.get("function")
            call["id"] = piece.get("id") or call["id"]
            call["type"] = piece.get("type") or call["type"]
            if isinstance(function, dict):
                for key in ("name", "arguments"):
                    if isinstance(function.get(key), str):
                        call["function"][key] += function[key]


@dataclass
class Answer:
    """What a model answered to one request: its choices by index."""

    choices: dict[int, Choice] = field(default_factory=dict)
    error: str | None = None
    """What the server said instead, or in the middle of it."""

    def add(self, body: Mapping[str, Any]) -> None:
        """Add a chunk of a stream, or the body of a whole answer."""
        if body.get("error"):
            self.error = describe(body["error"])
        for at, said in enumerate(_as_list(body.get("choices"))):
            if isinstance(said, dict):
                index = said.get("index")
                self.choices.setdefault(index if isinstance(index, int) else at, Choice()).add(said)


def describe(error: object) -> str:
    """What an error of another server says, in a line."""
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message if message is not None else error).split())[:500]


def _add_measures(choice: Choice, said: Mapping[str, Any]) -> None:
    """Token ids and log-probabilities, where the server gives them."""
    ids, measures = said.get("token_ids"), said.get("logprobs")
    measured = measures if isinstance(measures, dict) else {}
    tokens = [token for token in _as_list(measured.get("content")) if isinstance(token, dict)]
    found = [token.get("id") for token in tokens]
    if isinstance(ids, list):
        choice.token_ids += [each for each in ids if isinstance(each, int)]
    elif all(isinstance(each, int) for each in found):
        choice.token_ids += cast("list[int]", found)
    likely = [token.get("logprob") for token in tokens] or _as_list(measured.get("token_logprobs"))
    choice.log_probs += [float(each) for each in likely if isinstance(each, int | float)]


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
