"""The server behind `http_applier`, as a program: `adapter_server.py NAME FOLDER`. Only the standard library, so that it starts at once."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VOCABULARY = 40


def draw(*what: object) -> float:
    """A number of -1 to 1 that depends on nothing but `what`."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8]) / 2**63 - 1


def log_probs(prompt: tuple[int, ...], strength: float) -> dict[int, float]:
    logits = {token: 3 * draw("base", prompt, token) + strength * draw("adapter", prompt, token) for token in range(VOCABULARY)}
    total = math.log(sum(math.exp(value) for value in logits.values()))
    return {token: value - total for token, value in logits.items()}


class Server(BaseHTTPRequestHandler):
    """The other side: what the child process runs."""

    version_name = ""
    strength = 0.0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(body.get("seconds", 0))
        if self.path == "/score":
            answer: dict[str, Any] = {"top": [log_probs(tuple(prompt), self.strength) for prompt in body["prompts"]]}
        else:
            text = f"{self.version_name} says {body.get('messages', [{}])[-1].get('content', '')}"
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            answer = {"id": "c", "object": "chat.completion", "created": 1, "model": self.version_name, "choices": [choice]}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def main(name: str, folder: str) -> None:
    kind, strength = (Path(folder) / "effect").read_text().split() if folder else ("good", "0")
    if kind == "dies":
        sys.exit(3)
    Server.version_name, Server.strength = name, float(strength) if kind == "good" else 0.0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()  # ends with its parent
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
