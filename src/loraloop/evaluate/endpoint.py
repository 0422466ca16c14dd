"""A model of this process behind the OpenAI API, on loopback, for as long as a command of the user's measures it.

`/v1/chat/completions` (streams too, in one piece) and `/v1/models`; one answer at a time. Greedy unless the request has a temperature.
It is for measurements: agents at work are served by the router.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import ValidationError

from loraloop.episode import Message
from loraloop.errors import LoraLoopError
from loraloop.evaluate.action import REPLY, read_actions
from loraloop.evaluate.rollout import Opening, Player, Sampling, speak

MAX_BODY = 16 << 20
MAX_TOKENS = 512
"""Of an answer, where the request says nothing."""


@dataclass(frozen=True)
class Access:
    """Where a model answers, and what a request needs."""

    url: str
    """With `/v1`, as OpenAI's clients take it."""
    model: str
    token: str


@contextmanager
def open_endpoint(player: Player, model: str) -> Iterator[Access]:
    """Serve `player` under the name `model` on a free port during the block."""
    token = secrets.token_urlsafe(24)
    lock = threading.Lock()

    class Bound(_Requests):
        access = Access("", model, token)

        def answer(self, body: dict[str, Any]) -> dict[str, Any]:
            with lock:
                return complete(player, model, body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Access(f"http://127.0.0.1:{server.server_address[1]}/v1", model, token)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def complete(player: Player, model: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a chat completion's request. Raises ValueError for a request that is none."""
    messages = [Message.model_validate({key: value for key, value in one.items() if value is not None}) for one in body["messages"]]
    tools = body.get("tools") or []
    n_tokens = int(body.get("max_completion_tokens") or body.get("max_tokens") or MAX_TOKENS)
    sampling = Sampling(float(body.get("temperature") or 0), [int(body.get("seed") or 0)])
    [text] = speak(player, [Opening(messages, tools)], [n_tokens], sampling, keep_special=bool(tools))
    message: dict[str, Any] = {"role": "assistant", "content": text}
    calls = [action for action in read_actions(text, has_tools=True) if action.name != REPLY] if tools else []
    if calls:
        message = {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": f"call_{place}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for place, call in enumerate(calls)
            ],
        }
    used = len(player.template.encode(text)[0])
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "length" if used >= n_tokens else "stop"}
    usage = {"prompt_tokens": 0, "completion_tokens": used, "total_tokens": used}
    return {"id": "chatcmpl-evaluation", "object": "chat.completion", "created": 0, "model": model, "choices": [choice], "usage": usage}


class _Requests(BaseHTTPRequestHandler):
    """One request; `answer` is given by the endpoint."""

    access: Access

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def do_GET(self) -> None:
        if self._is_allowed():
            self._send(200, {"object": "list", "data": [{"id": self.access.model, "object": "model", "owned_by": "loraloop"}]})

    def do_POST(self) -> None:
        if not self._is_allowed():
            return
        try:
            size = int(self.headers.get("Content-Length") or 0)
            if not 0 < size <= MAX_BODY:
                self._refuse(413, f"a body of {size} bytes; expected 1 to {MAX_BODY}")
                return
            body = json.loads(self.rfile.read(size))
            if not self.path.endswith("/chat/completions"):
                self._refuse(404, f"{self.path} is not served here; /v1/chat/completions is")
                return
            answer = self.answer(body)
        except (LoraLoopError, ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._refuse(400, f"{type(error).__name__}: {error}")
            return
        if body.get("stream"):
            self._send_stream(answer)
        else:
            self._send(200, answer)

    def _is_allowed(self) -> bool:
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if hmac.compare_digest(given, f"Bearer {self.access.token}".encode()):
            return True
        self._refuse(401, "the token is not that of this measurement; it is in LORALOOP_TOKEN and OPENAI_API_KEY")
        return False

    def _refuse(self, status: int, words: str) -> None:
        self._send(status, {"error": {"message": words, "type": "invalid_request_error"}})

    def _send(self, status: int, value: dict[str, Any]) -> None:
        self._write(status, "application/json", json.dumps(value).encode())

    def _send_stream(self, answer: dict[str, Any]) -> None:
        [choice] = answer["choices"]
        delta = dict(choice["message"])
        if "tool_calls" in delta:
            delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(delta["tool_calls"])]
        chunk = {**answer, "object": "chat.completion.chunk"}
        parts = [{"index": 0, "delta": delta, "finish_reason": None}, {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]
        lines = [f"data: {json.dumps({**chunk, 'choices': [part]})}\n\n" for part in parts]
        self._write(200, "text/event-stream", "".join([*lines, "data: [DONE]\n\n"]).encode())

    def _write(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the library's name
        """Nothing: standard error is for people."""
