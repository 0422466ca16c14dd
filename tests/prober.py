"""Clients that ask without pause while what serves them changes, as Knative's prober watches an upgrade, and what they were told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import httpx2


@dataclass(frozen=True)
class Answer:
    """One streamed answer. `version` is what the header says, `models` what its chunks say."""

    prompt: int
    status: int
    version: str
    models: frozenset[str]
    text: str
    finish: str | None
    is_whole: bool
    """Whether `[DONE]` came."""
    record: str
    seconds: float
    error: str = ""

    @property
    def is_good(self) -> bool:
        """Whether a client would be content with it."""
        return self.status == 200 and self.is_whole and not self.error and self.finish is not None and self.models == {self.version}


def ask(client: httpx2.Client, url: str, model: str, number: int, prompt: dict[str, Any]) -> Answer:
    """Ask once, streaming; whatever goes wrong is in the answer."""
    started = time.monotonic()
    status, version, record, finish, is_whole, error = 0, "", "", None, False, ""
    models: set[str] = set()
    text = ""
    try:
        with client.stream("POST", f"{url}/chat/completions", json={**prompt, "model": model, "stream": True}) as response:
            status = response.status_code
            version = response.headers.get("X-Loraloop-Version", "")
            record = response.headers.get("X-Loraloop-Record", "")
            for line in response.iter_lines():
                if status != 200:
                    error += line
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    is_whole = True
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    error = json.dumps(chunk["error"])
                    continue
                models.add(chunk["model"])
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                    finish = choice.get("finish_reason") or finish
    except httpx2.HTTPError as problem:
        error = repr(problem)
    return Answer(number, status, version, frozenset(models), text, finish, is_whole, record, time.monotonic() - started, error)


@dataclass
class Prober:
    """`n_clients` threads, each of which asks one prompt after the other until the block ends."""

    url: str
    """With `/v1`."""
    token: str
    model: str
    prompts: Sequence[dict[str, Any]]
    n_clients: int = 4
    answers: list[Answer] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(self.n_clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        with httpx2.Client(headers={"Authorization": f"Bearer {self.token}"}, timeout=120) as client:
            while not self._stop.is_set():
                number = (number + 1) % len(self.prompts)
                self.answers.append(ask(client, self.url, self.model, number, self.prompts[number]))

    def wait_for(self, more: int, seconds: float = 60.0) -> None:
        """Until `more` answers have come from now on."""
        wanted, deadline = len(self.answers) + more, time.monotonic() + seconds
        while len(self.answers) < wanted:
            assert time.monotonic() < deadline, f"{len(self.answers)} answers, waiting for {wanted}: {self.answers[-3:]}"
            time.sleep(0.05)
