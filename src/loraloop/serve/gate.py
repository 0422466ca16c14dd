"""Who may talk to the router: whoever has the token, from this machine's own names, and no web page.

A web page that a browser on this machine shows can send requests to loopback: it is kept out by its `Origin`, and one that has made its
own name point here (DNS rebinding) by its `Host`. There is no CORS header in any answer.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from loraloop.serve.wire import Declined, to_json_bytes

LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
OPEN_PATHS = frozenset({"/healthz"})
"""Answered without a token; they tell nothing but that something is there."""


class Gate:
    """Lets through to `app` what may pass, and answers the rest with 401 or 403."""

    def __init__(self, app: ASGIApp, *, token: str | None, hosts: Sequence[str]) -> None:
        self._app = app
        self._expected = None if token is None else token.encode()
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            self._check(scope)
        except Declined as error:
            await send_error(send, error)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        found: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in found and name in {b"host", b"authorization", b"origin"}:
                raise Declined(400, f"more than one {name.decode()} header", code="bad_header")
            found[name] = value
        host = found.get(b"host", b"").decode("latin-1").lower()
        if _without_port(host) not in self._hosts:
            raise Declined(403, f"the host {host!r} is not served here; use http://127.0.0.1:PORT", code="foreign_host")
        if b"origin" in found:
            raise Declined(403, "web pages may not call this server; call it from a program", code="foreign_origin")
        if self._expected is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, token = found.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._expected):
            message = "no valid token; send `Authorization: Bearer TOKEN` with the token that `loraloop serve` printed (api_key=TOKEN)"
            raise Declined(401, message, code="invalid_api_key")


async def send_error(send: Send, error: Declined, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Answer with `error` in OpenAI's form."""
    told = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send_json(send, error.status, to_json_bytes(error.to_json()), [*told, *headers])


async def send_json(send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """A whole answer of JSON."""
    sized = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": sized})
    await send({"type": "http.response.body", "body": body})


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return name if name and port.isdigit() else host
