"""A user's own measurement: what a model says to three questions, over HTTP with the standard library."""

from __future__ import annotations

import json
import os
import urllib.request


def ask(url: str, model: str, words: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": words}], "max_tokens": 8}
    headers = {"Authorization": f"Bearer {os.environ['LORALOOP_TOKEN']}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def lengths(url: str, model: str) -> dict[str, float]:
    return {words: sum(map(ord, ask(url, model, words))) / 1000 for words in ("one", "two", "three")}
