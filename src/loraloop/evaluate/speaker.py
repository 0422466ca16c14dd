"""Who plays: a model in this process, or one that is served behind the OpenAI API.

A speaker is given plays of one suite and tells each as it ends. The same speaker, plays and sampling give the same results; of a served
model that holds as far as its server keeps to greedy decoding and seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, Protocol

from loraloop.episode import Message
from loraloop.errors import EvaluationError
from loraloop.evaluate.environment import Task, TaskSuite
from loraloop.evaluate.rollout import Played, Player, Sampling, play

OnEnded = Callable[[int, Played[Task]], None]
RETRIED = (429, 502, 503, 504)
"""HTTP statuses that may pass."""


class Speaker(Protocol):
    """A model that plays."""

    def play(self, suite: TaskSuite, tasks: Sequence[Task], sampling: Sampling, on_ended: OnEnded) -> None:
        """Play each task once; `on_ended` hears (place among `tasks`, play) from the caller's thread. Raises EvaluationError."""
        ...


@dataclass(frozen=True)
class InProcessSpeaker:
    """A model whose weights are in this process."""

    player: Player
    on_token: Callable[[int, int, int], None] = lambda done, total, step: None

    def play(self, suite: TaskSuite, tasks: Sequence[Task], sampling: Sampling, on_ended: OnEnded) -> None:
        """All plays at once, in one cache."""
        play(
            self.player,
            [suite.open() for _ in tasks],
            tasks,
            system=suite.system,
            limits=suite.limits,
            to_action=suite.to_action,
            sampling=sampling,
            on_progress=self.on_token,
            on_ended=on_ended,
        )


@dataclass(frozen=True)
class ServedSpeaker:
    """A model behind the OpenAI API: `url` with or without `/v1`, the name that it goes by there, and its token, if it wants one."""

    url: str
    model: str
    token: str | None = field(default=None, repr=False)
    n_parallel: int = 4
    timeout_s: float = 300.0
    n_tries: int = 4
    """Of a request that fails for want of a connection or with a status that may pass."""

    def play(self, suite: TaskSuite, tasks: Sequence[Task], sampling: Sampling, on_ended: OnEnded) -> None:
        """`n_parallel` plays at a time, each a request a turn."""
        import httpx2

        seeds = list(sampling.seeds) or [0] * len(tasks)
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        with httpx2.Client(timeout=self.timeout_s, headers=headers) as client, ThreadPoolExecutor(self.n_parallel) as pool:
            plays = {
                pool.submit(self._play_one, client, suite, task, (seed, sampling.temperature)): place
                for place, (task, seed) in enumerate(zip(tasks, seeds, strict=True))
            }
            try:
                for done in as_completed(plays):
                    on_ended(plays[done], done.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _play_one(self, client: Any, suite: TaskSuite, task: Task, drawn: tuple[int, float]) -> Played[Task]:
        environment, limits = suite.open(), suite.limits
        head = [Message(role="system", content=suite.system)] if suite.system is not None else []
        played = Played(task, [*head, Message(role="user", content=environment.reset(task))])
        n_tokens = 0
        while played.n_turns < limits.max_turns and n_tokens < limits.max_tokens and not played.finished:
            text, n_new = self._ask(client, played.messages, min(limits.max_turn_tokens, limits.max_tokens - n_tokens), drawn)
            n_tokens += n_new
            observation, played.reward, played.finished = environment.step(suite.to_action(text))
            played.n_turns += 1
            played.messages += [Message(role="assistant", content=text), Message(role="user", content=observation)]
        return played

    def _ask(self, client: Any, messages: Sequence[Message], max_tokens: int, drawn: tuple[int, float]) -> tuple[str, int]:
        """(the next turn, its tokens)."""
        body = {
            "model": self.model,
            "messages": [message.to_openai() for message in messages],
            "max_tokens": max_tokens,
            "seed": drawn[0],
            "temperature": drawn[1],
        }
        answer = self._post(client, body)
        try:
            text = answer["choices"][0]["message"]["content"] or ""
            n_tokens = answer.get("usage", {}).get("completion_tokens", max_tokens)
            return str(text), int(n_tokens)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EvaluationError(f"{self.url} answered without choices[0].message.content: {str(answer)[:200]}") from error

    def _post(self, client: Any, body: dict[str, Any]) -> Any:
        import httpx2

        where = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
        trouble = ""
        for attempt in range(self.n_tries):
            if attempt:
                time.sleep(0.25 * 4**attempt)
            try:
                response = client.post(where, json=body)
            except httpx2.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
                continue
            if response.status_code in RETRIED:
                trouble = f"status {response.status_code}: {response.text[:200]}"
                continue
            if response.status_code != 200:
                raise EvaluationError(f"{where} refuses the model {self.model!r} (status {response.status_code}): {response.text[:300]}")
            return response.json()
        raise EvaluationError(f"{where} does not answer for the model {self.model!r} after {self.n_tries} tries ({trouble}); is it served?")
