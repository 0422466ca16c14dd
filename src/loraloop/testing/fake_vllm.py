"""A server that speaks vLLM's LoRA endpoints, for tests without vLLM: what it answers, and when it breaks, as vLLM 0.32 does.

Scores come from the adapter's bytes. A test of an applier runs the same against a real server.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VOCABULARY = 64
_HEADER_BYTES = 8
_OK = 200


class FakeVllm:
    """The state of the server; `with FakeVllm().running() as url:`."""

    def __init__(self, root: str = "no/such-model", *, max_lora_rank: int = 16, allows_updates: bool = True) -> None:
        self.root = root
        self.max_lora_rank = max_lora_rank
        self.allows_updates = allows_updates
        self.adapters: dict[str, str] = {}
        """name -> path"""
        self.is_dead = False
        """The engine has died, as it does when the files of a listed adapter are gone."""
        self.calls: list[tuple[str, dict[str, Any]]] = []

    @contextmanager
    def running(self) -> Iterator[str]:
        """The server on a free port of loopback; its URL."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(*fake.answer(self.path, {}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(*fake.answer(self.path, body))

            def _answer(self, status: int, told: object) -> None:
                data = told.encode() if isinstance(told, str) else json.dumps(told).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain" if isinstance(told, str) else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  as in http.server
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, object]:
        """Status and body of the answer to one request."""
        self.calls.append((path, body))
        if path.endswith("_lora_adapter") and self.allows_updates:
            return self._update(path, str(body["lora_name"]), str(body.get("lora_path")))
        if path == "/v1/completions":
            return self._complete(body)
        if path == "/health":
            return (503, "") if self.is_dead else (200, "")
        if path == "/v1/models":
            base = {"id": "base", "object": "model", "root": self.root, "parent": None}
            loaded = [{"id": name, "object": "model", "root": root, "parent": "base"} for name, root in self.adapters.items()]
            return 200, {"object": "list", "data": [base, *loaded]}
        return 404, {"detail": "Not Found"}

    def _update(self, path: str, name: str, folder: str) -> tuple[int, object]:
        if path == "/v1/load_lora_adapter":
            status, message = self._load(name, folder)
            return (status, message) if status == _OK else _error(status, message)
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        return _OK, f"Success: LoRA adapter '{name}' removed successfully."

    def _load(self, name: str, path: str) -> tuple[int, str]:
        if name in (*self.adapters, "base"):
            return 400, f"The lora adapter '{name}' has already been loaded."
        try:
            config = json.loads((Path(path) / "adapter_config.json").read_bytes())
            data = (Path(path) / "adapter_model.safetensors").read_bytes()
        except FileNotFoundError:
            return 404, f"Loading lora {name} failed: No adapter found for {path}"
        broken = {
            "vLLM does not yet support DoRA.": config.get("use_dora"),
            f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_lora_rank}.": config["r"] > self.max_lora_rank,
            "Error while deserializing header: invalid header length": int.from_bytes(data[:_HEADER_BYTES], "little") > len(data),
        }
        for message, is_so in broken.items():
            if is_so:
                return 500, message
        self.adapters[name] = path
        return _OK, f"Success: LoRA adapter '{name}' added successfully."

    def _complete(self, body: dict[str, Any]) -> tuple[int, object]:
        name = str(body["model"])
        if self.is_dead:
            return _error(500, "EngineCore encountered an issue.")
        if name != "base" and name not in self.adapters:
            return _error(404, f"The model `{name}` does not exist.")
        seed = b""
        if name != "base":
            try:
                seed = (Path(self.adapters[name]) / "adapter_model.safetensors").read_bytes()
            except FileNotFoundError:
                self.is_dead = True
                return _error(500, "EngineCore encountered an issue.")
        logits = [_draw(body["prompt"], token, b"") + (_draw(body["prompt"], token, seed) if seed else 0) for token in range(VOCABULARY)]
        total = math.log(sum(map(math.exp, logits)))
        best = sorted(range(VOCABULARY), key=lambda token: -logits[token])[: int(body["logprobs"])]
        top = {f"token_id:{token}": logits[token] - total for token in best}
        choice = {"index": 0, "text": "x", "logprobs": {"top_logprobs": [top]}, "finish_reason": "length"}
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": name, "choices": [choice]}


def _draw(prompt: list[int], token: int, seed: bytes) -> float:
    digest = hashlib.sha256(repr((prompt, token)).encode() + seed).digest()
    return int.from_bytes(digest[:8]) / 2**62 - 2


def _error(status: int, message: str) -> tuple[int, object]:
    return status, {"error": {"message": message, "type": "error", "param": None, "code": status}}
