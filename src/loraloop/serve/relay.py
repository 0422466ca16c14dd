"""One call: passed to the server of the version that answers it, its answer passed back as it comes, and recorded.

The answer's `model` is the version's name, in every chunk of a stream too; all else is the server's to the letter. A stream that breaks
off ends with an error event, without `[DONE]` and with a broken connection, so that no client takes it for whole. The version is held
until the last byte is out or the client has left.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx2
from starlette.types import Receive, Scope, Send

from loraloop.episode import now_ms
from loraloop.errors import NothingServes, UnknownModel
from loraloop.serve.call_record import Call
from loraloop.serve.capture import Receipt, Recorder
from loraloop.serve.gate import send_error, send_json
from loraloop.serve.request import Api, Request, read_body, read_request
from loraloop.serve.routing import Routes, Ticket
from loraloop.serve.wire import DONE, Answer, Declined, Events, data_of, describe, to_event, to_json_bytes

LEFT = "the client left before the end"


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """What the router lets in, and how much of it."""

    token: str | None = None
    """What a client must show; None lets everybody in, for tests only."""
    hosts: tuple[str, ...] = ()
    """Names that it may be called by, beside those of this machine's loopback."""
    max_request_bytes: int = 32 << 20
    max_seconds: float = 600.0
    """The longest that one call may take, from its first byte to its last."""
    max_in_flight: int = 256
    """Calls under way at one time; further ones are told to come back."""


@dataclass
class Load:
    """How many calls are under way."""

    max_in_flight: int
    n_in_flight: int = 0

    @asynccontextmanager
    async def one_more(self) -> AsyncIterator[None]:
        """Counts one while the block runs. Raises Declined (429) when there are too many."""
        if self.n_in_flight >= self.max_in_flight:
            message = f"{self.n_in_flight} calls are under way, which is all that are let in at one time; try again soon"
            raise Declined(429, message, code="too_many_in_flight", retry_after=1)
        self.n_in_flight += 1
        try:
            yield
        finally:
            self.n_in_flight -= 1


@dataclass
class _Exchange:
    """One call under way."""

    request: Request
    ticket: Ticket
    receipt: Receipt
    send: Send
    answer: Answer = field(default_factory=Answer)
    has_begun: bool = False
    """Whether the client has been sent anything."""
    error: str | None = None
    is_servers_fault: bool = False
    is_over: bool = False
    """Whether the client has been sent everything; from then on it may leave."""

    @property
    def version(self) -> str:
        return self.ticket.endpoint.version.name

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """What each answer says beside its body."""
        told = {"x-loraloop-version": self.version, "x-loraloop-record": self.receipt.header, "x-loraloop-episode": self.receipt.episode}
        if self.request.has_tools and self.ticket.endpoint.ignores_tools:
            told["x-loraloop-ignored"] = "tools"
        return [(name.encode(), value.encode()) for name, value in told.items()]

    def to_call(self, started: float, started_ms: int) -> Call:
        """What there is to record of it."""
        took_ms = round((time.perf_counter() - started) * 1000)
        return Call(
            api=self.request.api,
            alias=self.request.alias,
            version=self.version,
            body=self.request.body,
            answer=self.answer,
            started_ms=started_ms,
            latency_ms=took_ms,
            error=self.error or self.answer.error,
        )


class Relay:
    """Answers `POST` to one of the two calls there are."""

    def __init__(
        self, api: Api, routes: Routes, recorder: Recorder, client: httpx2.AsyncClient, limits: tuple[RouterSettings, Load]
    ) -> None:
        self._api: Api = api
        self._routes, self._recorder, self._client = routes, recorder, client
        self._settings, self._load = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        try:
            async with self._load.one_more():
                async with asyncio.timeout(self._settings.max_seconds):
                    raw = await read_body(scope, receive, self._settings.max_request_bytes)
                if raw is not None:
                    await self._unless_left(self._serve(read_request(self._api, scope, raw), send), receive)
        except TimeoutError:
            await send_error(send, Declined(408, "the request did not come to its end in time; send it again", code="timeout"))
        except Declined as error:
            await send_error(send, error)

    async def _unless_left(self, serving: Coroutine[None, None, None], receive: Receive) -> None:
        """Serve, and stop at once when the client leaves."""
        work, left = asyncio.ensure_future(serving), asyncio.ensure_future(_wait_for_end(receive))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            if not work.done():
                work.cancel()
            await asyncio.gather(work, left, return_exceptions=True)
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error

    async def _serve(self, request: Request, send: Send) -> None:
        started, started_ms = time.perf_counter(), now_ms()
        receipt = self._recorder.begin(request.alias, request.messages, request.episode)
        try:
            ticket = self._acquire(request, receipt.episode)
        except BaseException:
            self._recorder.cancel(receipt)
            raise
        exchange = _Exchange(request, ticket, receipt, send)
        try:
            await self._exchange(exchange)
        except asyncio.CancelledError:
            exchange.error = exchange.error if exchange.is_over else LEFT
            raise
        finally:
            ticket.release(failed=exchange.is_servers_fault)
            self._recorder.end(receipt, exchange.to_call(started, started_ms))

    def _acquire(self, request: Request, conversation: str) -> Ticket:
        try:
            ticket = self._routes.acquire(request.alias, conversation)
        except UnknownModel as error:
            raise Declined(404, str(error), code="model_not_found", param="model") from error
        except NothingServes as error:
            raise Declined(503, str(error), code="nothing_serves", retry_after=2) from error
        if request.has_tools and request.demands_call and ticket.endpoint.ignores_tools:
            ticket.release()
            message = f"{ticket.endpoint.version.name} cannot be made to call a tool: its chat template has no place for tools; "
            raise Declined(400, message + "leave `tool_choice`, or serve a model whose template has", code="no_tools", param="tool_choice")
        return ticket

    async def _exchange(self, exchange: _Exchange) -> None:
        """Ask, and answer whatever comes of it."""
        try:
            async with asyncio.timeout(self._settings.max_seconds):
                await self._ask(exchange)
        except TimeoutError:
            problem = Declined(504, f"no whole answer within {self._settings.max_seconds:g} s; ask for less", code="timeout")
        except httpx2.TimeoutException as error:
            problem = Declined(504, f"the server of {exchange.version} did not take the call in time ({_why(error)})", code="timeout")
        except httpx2.HTTPError as error:
            problem = Declined(502, f"the server of {exchange.version} failed: {_why(error)}", code="upstream_failed")
        except Declined as error:
            problem = error
        else:
            return
        exchange.is_servers_fault = True
        exchange.error = f"truncated: {problem}" if exchange.has_begun else str(problem)
        if not exchange.has_begun:
            await send_error(exchange.send, problem, exchange.headers)
            return
        event = to_event(problem.to_json())  # and no end of the body after it: the connection is broken off
        await exchange.send({"type": "http.response.body", "body": event, "more_body": True})

    async def _ask(self, exchange: _Exchange) -> None:
        response = await self._send(exchange)
        try:
            kind = response.headers.get("content-type", "")
            if response.status_code != 200:
                await _pass_refusal(exchange, response.status_code, kind, await response.aread())
            elif kind.startswith("text/event-stream"):
                await _pass_stream(exchange, response)
            else:
                await _pass_whole(exchange, await response.aread())
        finally:
            await response.aclose()

    async def _send(self, exchange: _Exchange) -> httpx2.Response:
        """Send the call; once more where a connection that was kept turned out to be closed before anything came of it."""
        endpoint = exchange.ticket.endpoint
        headers = {"content-type": "application/json", "accept-encoding": "identity", **endpoint.headers}
        content = exchange.request.to_upstream(endpoint)
        url = f"{endpoint.url}/v1/{self._api}"
        for is_last in (False, True):
            asking = self._client.build_request("POST", url, content=content, headers=headers)
            try:
                return await self._client.send(asking, stream=True)
            except (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError):
                if is_last:
                    raise
        raise AssertionError  # the last try returns or raises


async def _pass_refusal(exchange: _Exchange, status: int, kind: str, body: bytes) -> None:
    """What is wrong with the request is the client's to know, verbatim; all else is the server's failure."""
    said = describe(_error_in(body))
    if not 400 <= status < 500 or status in {401, 403}:
        message = f"the server of {exchange.version} answered with status {status}: {said}"
        raise Declined(502, message, code="upstream_failed")
    exchange.error = f"refused with status {status}: {said}"
    exchange.has_begun = True
    headers = [(b"content-type", kind.encode() or b"application/json"), (b"content-length", str(len(body)).encode()), *exchange.headers]
    await exchange.send({"type": "http.response.start", "status": status, "headers": headers})
    await exchange.send({"type": "http.response.body", "body": body})
    exchange.is_over = True


async def _pass_whole(exchange: _Exchange, body: bytes) -> None:
    try:
        said = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Declined(502, f"the server of {exchange.version} answered with what is no JSON ({error})", code="upstream_failed") from error
    if not isinstance(said, dict) or said.get("error") or not isinstance(said.get("choices"), list):
        shown = describe(said.get("error") or sorted(said)) if isinstance(said, dict) else type(said).__name__
        raise Declined(502, f"the server of {exchange.version} answered without choices: {shown}", code="upstream_failed")
    exchange.answer.add(said)
    said["model"] = exchange.version
    exchange.has_begun = True
    await send_json(exchange.send, 200, to_json_bytes(said), exchange.headers)
    exchange.is_over = True


async def _pass_stream(exchange: _Exchange, response: httpx2.Response) -> None:
    events, is_whole = Events(), False
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache"), *exchange.headers]
    exchange.has_begun = True
    await exchange.send({"type": "http.response.start", "status": 200, "headers": headers})
    async for piece in response.aiter_bytes():
        out = []
        for event in events.feed(piece):
            data = data_of(event)
            is_whole = is_whole or data == DONE
            out.append(event if data is None or data == DONE else _read_chunk(exchange, data))
        if out:
            await exchange.send({"type": "http.response.body", "body": b"".join(out), "more_body": True})
    if not is_whole or not events.is_between:
        message = f"the server of {exchange.version} broke off in the middle of its answer; ask again"
        raise Declined(502, message, code="truncated")
    exchange.is_servers_fault = exchange.answer.error is not None
    await exchange.send({"type": "http.response.body", "body": b""})
    exchange.is_over = True


def _read_chunk(exchange: _Exchange, data: bytes) -> bytes:
    """The event to send instead: parsed once, for the record and for the version's name in it."""
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Declined(502, f"the server of {exchange.version} sent a chunk that is no JSON ({error})", code="upstream_failed") from error
    if not isinstance(chunk, dict):
        raise Declined(502, f"the server of {exchange.version} sent a chunk that is no object", code="upstream_failed")
    exchange.answer.add(chunk)
    if "error" not in chunk:
        chunk["model"] = exchange.version
    return to_event(chunk)


async def _wait_for_end(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _error_in(body: bytes) -> object:
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return body[:500].decode("utf-8", "replace")
    return said["error"] if isinstance(said, dict) and "error" in said else said


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
