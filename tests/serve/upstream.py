"""The other side of the router in tests: a real HTTP server that answers like a model's, and routes that lead to it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from loraloop.errors import NothingServes, UnknownModel
from loraloop.serve.applier import Endpoint, Version
from loraloop.serve.listener import open_listener

VERSION = Version(name="agent@0123456789ab")
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":  "Oslo"}'}}


class Upstream:
    """Answers by what the last message says; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.cancelled = threading.Event()
        self.app = Starlette(routes=[Route("/v1/{api:path}", self.answer, methods=["POST"])])

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        if request.path_params["api"] == "completions":
            return JSONResponse(
                {"object": "text_completion", "model": "raw", "choices": [{"index": 0, "text": "and so on", "finish_reason": "stop"}]}
            )
        last = body["messages"][-1]
        said = last.get("content") or ""
        if said.startswith("status "):
            return JSONResponse({"error": {"message": "as you wish", "type": "t", "code": "c", "param": "p"}}, int(said.split()[1]))
        if said == "no json":
            return PlainTextResponse("{", media_type="application/json")
        if said == "no choices":
            return JSONResponse({"object": "chat.completion"})
        if said == "slow":
            await self._wait(request)
        message: dict[str, Any] = {"role": "assistant", "content": f"You said: {said} ☃"}
        reason = "stop"
        if last["role"] == "user" and body.get("tools"):
            message, reason = {"role": "assistant", "content": None, "tool_calls": [CALL]}, "tool_calls"
        if body.get("stream"):
            return StreamingResponse(self._stream(message, reason, said), media_type="text/event-stream")
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": reason}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": "a", "id": 5, "logprob": -0.25}, {"token": "b", "id": 6, "logprob": -1.5}]}
        return JSONResponse({"id": "x", "object": "chat.completion", "created": 1, "model": "raw", "choices": [choice]})

    async def _wait(self, request: Request) -> None:
        for _ in range(500):
            await asyncio.sleep(0.02)
            if await request.is_disconnected():
                self.cancelled.set()
                return

    async def _stream(self, message: dict[str, Any], reason: str, said: str) -> Any:
        try:
            for delta in pieces(message):
                yield chunk(delta, None)
                if said == "never ends":
                    while True:
                        await asyncio.sleep(0.02)
                        yield chunk({"content": "."}, None)
                if said == "breaks off":
                    return
                if said == "dies":
                    raise ConnectionAbortedError
                if said == "error within":
                    yield b'data: {"error":{"message":"out of memory"}}\n\n'
            yield b": still here\n\n"
            yield chunk({}, reason)
            yield b"data: [DONE]\n\n"
        finally:
            self.cancelled.set()


def pieces(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """As a server streams it: the role, then a bit at a time."""
    yield {"role": "assistant", "content": None}
    for at, call in enumerate(message.get("tool_calls", [])):
        arguments = call["function"]["arguments"]
        yield {"tool_calls": [{**call, "index": at, "function": {"name": call["function"]["name"], "arguments": ""}}]}
        for begin in range(0, len(arguments), 5):
            yield {"tool_calls": [{"index": at, "function": {"arguments": arguments[begin : begin + 5]}}]}
    for letter in message["content"] or "":
        yield {"content": letter}


def chunk(delta: dict[str, Any], reason: str | None) -> bytes:
    said = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "raw"}
    return b"data: " + json.dumps({**said, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}).encode() + b"\n\n"


@dataclass
class OneTicket:
    """Counts how often it was released."""

    alias: str
    endpoint: Endpoint
    is_canary: bool = False
    released: list[bool] = field(default_factory=list)

    def release(self, *, failed: bool = False) -> None:
        self.released.append(failed)


class OneRoute:
    """Everything that is called `agent` leads to one endpoint."""

    def __init__(self, url: str) -> None:
        self.endpoint = Endpoint(VERSION, url, "raw", {"authorization": "Bearer inner"}, {"lora": [{"id": 0, "scale": 1.0}]})
        self.tickets: list[OneTicket] = []
        self.conversations: list[str] = []
        self.serves = True

    def acquire(self, model: str, conversation: str) -> OneTicket:
        if model not in self.list_names() and model != "agent":
            raise UnknownModel(f"no model {model!r}; there is agent")
        if not self.serves:
            raise NothingServes("nothing answers to 'agent' now")
        self.conversations.append(conversation)
        self.tickets.append(OneTicket(model, self.endpoint))
        return self.tickets[-1]

    def list_names(self) -> dict[str, str]:
        return {"agent": VERSION.name, VERSION.name: VERSION.name} if self.serves else {}

    @property
    def released(self) -> list[list[bool]]:
        return [ticket.released for ticket in self.tickets]


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The URL of `app`, served in a thread by uvicorn while the block runs."""
    with open_listener() as listener:
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)
