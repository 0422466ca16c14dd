"""Both sides play the same tasks with the same seeds, block by block; every finished play is on the disk before the next is counted.

A second start goes on where the first one ended. The blocks follow from the plan alone, so a play that is made again is the same play,
and whatever instant the first process died at, the results are the same.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from loraloop.episode import Frozen
from loraloop.errors import EvaluationError
from loraloop.evaluate.environment import Task, TaskSuite
from loraloop.evaluate.result import SIDES, SideName, TaskScore, mean
from loraloop.evaluate.rollout import Played, Sampling
from loraloop.evaluate.speaker import Speaker
from loraloop.files import append_jsonl, content_hash, locked_directory, read_jsonl

PLAYS_FILE = "plays.jsonl"
BLOCK = 16
"""Plays of one side at a time."""
Stop = Callable[[Sequence[float], Sequence[float]], bool]
"""Whether the scores so far, (candidate, opponent), decide."""


class Play(Frozen):
    """One play, as it is kept."""

    side: SideName
    task: str
    seed: int
    reward: float
    n_turns: int
    n_executed: int
    """Turns whose action the environment could execute."""
    finished: bool
    """The environment ended it; otherwise a limit did."""
    messages: tuple[dict[str, JsonValue], ...]
    key: str | None = None
    """A hash over all that it follows from; None where that is not known, as of a served model."""


@dataclass(frozen=True)
class Progress:
    """How far an evaluation is."""

    done: int
    """Plays, or whatever is counted, of both sides together."""
    total: int
    eta_s: float | None
    partial: tuple[TaskScore, ...] = ()
    """The tasks that both sides have played."""
    what: str = "plays"


@dataclass(frozen=True)
class Scores:
    """What both sides made of the tasks, each score the mean over the seeds."""

    success: list[TaskScore]
    reward: list[TaskScore]
    executed: list[TaskScore]
    """The share of turns whose action could be executed."""


@dataclass(frozen=True)
class Schedule:
    """What is played."""

    suite: TaskSuite
    tasks: Sequence[Task]
    seeds: int = 1
    temperature: float = 0.0
    block: int = BLOCK
    side_keys: Mapping[SideName, str] = field(default_factory=dict)
    """By side a hash over all that its plays follow from besides task and seed, as far as that is known."""

    def key(self, side: SideName, task: Task, seed: int) -> str | None:
        """What names the play among those of all evaluations."""
        known = self.side_keys.get(side)
        return content_hash([known, task.model_dump(mode="json"), seed]) if known else None

    def blocks(self) -> Iterator[list[tuple[Task, int]]]:
        """(task, seed) of the plays of one side, all seeds of a task together."""
        n_tasks = max(1, self.block // self.seeds)
        for start in range(0, len(self.tasks), n_tasks):
            yield [(task, seed) for task in self.tasks[start : start + n_tasks] for seed in range(self.seeds)]


class Plays:
    """The finished plays of one evaluation, in `plays.jsonl` of its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / PLAYS_FILE
        self._known: dict[tuple[str, str, int], Play] = {}
        for play in iter_plays(folder):
            self._remember(play)

    def find(self, side: str, task: str, seed: int) -> Play | None:
        """The play, None when it is not finished yet."""
        return self._known.get((side, task, seed))

    def add(self, play: Play) -> None:
        """Keep a play; one that is there already stays as it is."""
        if self.find(play.side, play.task, play.seed) is None:
            with locked_directory(self.folder):
                append_jsonl(self.path, play.model_dump(mode="json"))
            self._remember(play)

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[Play]:
        return iter(self._known.values())

    def _remember(self, play: Play) -> None:
        self._known.setdefault((play.side, play.task, play.seed), play)


def iter_plays(folder: Path) -> Iterator[Play]:
    """The finished plays in the folder of an evaluation, none where nothing was played."""
    if (folder / PLAYS_FILE).exists():
        for line in read_jsonl(folder / PLAYS_FILE, skip_torn=True):
            yield Play.model_validate(line)


def play_both(
    schedule: Schedule,
    speakers: Mapping[SideName, Callable[[], Speaker]],
    plays: Plays,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stop: Stop | None = None,
) -> tuple[Scores, bool]:
    """What both sides made of each task that both have played, and whether `stop` ended it early.

    Speakers are made when they are first needed: where all is played already, none is. Raises EvaluationError.
    """
    clock = Clock(2 * len(schedule.tasks) * schedule.seeds, len(plays))
    ready: dict[SideName, Speaker] = {}
    tasks: list[Task] = []
    told: list[TaskScore] = []
    stopped = False
    for block in schedule.blocks():
        for side in SIDES:
            if any(plays.find(side, task.id, seed) is None for task, seed in block):
                ready[side] = ready.get(side) or speakers[side]()

                _play_block(schedule, (side, ready[side]), block, plays, lambda: on_progress(clock.tell(len(plays), told)))  # noqa: B023
        tasks += list({task.id: task for task, _ in block}.values())
        told = _scores(schedule, tasks, plays).success
        on_progress(clock.tell(len(plays), told))
        if stop is not None and len(tasks) < len(schedule.tasks):
            stopped = stop([one.candidate for one in told], [one.opponent for one in told])
            if stopped:
                break
    return _scores(schedule, tasks, plays), stopped


def _play_block(
    schedule: Schedule, who: tuple[SideName, Speaker], block: Sequence[tuple[Task, int]], plays: Plays, on_kept: Callable[[], None]
) -> None:
    """One side's plays of a block, each kept as it ends."""
    side, speaker = who

    def keep(place: int, played: Played[Any]) -> None:
        play = _to_play(schedule.suite, side, block[place], played)
        plays.add(play.model_copy(update={"key": schedule.key(side, *block[place])}))
        on_kept()

    sampling = Sampling(schedule.temperature, [_seed_of(task, seed) for task, seed in block])
    speaker.play(schedule.suite, [task for task, _ in block], sampling, keep)


def _scores(schedule: Schedule, tasks: Sequence[Task], plays: Plays) -> Scores:
    def played(side: str, task: Task) -> list[Play]:
        found = [plays.find(side, task.id, seed) for seed in range(schedule.seeds)]
        if None in found:
            raise EvaluationError(f"{side} has not ended every play of task {task.id!r}; start the evaluation again to go on")
        return [play for play in found if play is not None]

    def score(task: Task, figure: Callable[[Play], float]) -> TaskScore:
        first, second = (mean([figure(play) for play in played(side, task)]) for side in SIDES)
        return TaskScore(task=task.id, candidate=first, opponent=second)

    return Scores(
        success=[score(task, lambda play: float(play.reward >= schedule.suite.success_reward)) for task in tasks],
        reward=[score(task, lambda play: play.reward) for task in tasks],
        executed=[score(task, lambda play: play.n_executed / max(1, play.n_turns)) for task in tasks],
    )


def _to_play(suite: TaskSuite, side: SideName, what: tuple[Task, int], played: Played[Any]) -> Play:
    messages = tuple(message.to_openai() for message in played.messages)
    answers = [message.content or "" for message in played.messages if message.role == "user"][1:]
    return Play(
        side=side,
        task=what[0].id,
        seed=what[1],
        reward=played.reward,
        n_turns=played.n_turns,
        n_executed=sum(map(suite.is_executed, answers)),
        finished=played.finished,
        messages=messages,
    )


def _seed_of(task: Task, seed: int) -> int:
    """The same for both sides; different for two tasks, so that they do not draw the same noise."""
    return zlib.crc32(f"{seed}\0{task.id}".encode())


class Clock:
    """Estimates what is left from what this process has done itself."""

    def __init__(self, total: int, done_before: int, what: str = "plays") -> None:
        self.total, self.done_before, self.what, self.started = total, done_before, what, time.monotonic()

    def tell(self, done: int, partial: Sequence[TaskScore] = ()) -> Progress:
        """How far it is when so much is done."""
        own = done - self.done_before
        eta = (time.monotonic() - self.started) / own * (self.total - done) if own > 0 else None
        return Progress(done, self.total, eta, tuple(partial), self.what)
