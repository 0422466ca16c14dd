"""The rows of one optimizer step, made once by loraloop and read by every engine: the same token ids, the same loss weights.

A shape says which samples of an agent's episodes make up the step; nothing is ever truncated, what is too long is left out and
counted. Trains nothing and loads no model, only a tokenizer's chat template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

from loraloop.chat.render import Row
from loraloop.chat.rows import build_units
from loraloop.chat.template import ChatTemplate
from loraloop.episode import Frozen
from loraloop.files import write_atomic
from loraloop.training_data import TrainingData

Shape = Literal["calls", "episodes", "pairs-sft", "control"]
SHAPES: tuple[Shape, ...] = ("calls", "episodes", "pairs-sft", "control")
WARM_UP_TOKENS = 512
NO_LIMIT = 1 << 40
"""Rows are rendered whole, so that one that is too long is seen to be, rather than cut into windows."""


class BenchRow(Frozen):
    """One sequence to train on."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    """Loss weight of each token as a target, 0 or 1: TRL's labels know no other."""

    def to_row(self) -> Row:
        """The same as loraloop's own engines take it."""
        return Row(ids=list(self.ids), weights=list(self.weights), text="")


class Workload(Frozen):
    """The samples of one optimizer step, and the part of them that all engines are checked on."""

    shape: Shape
    source: str
    """Name of the recordings."""
    max_length: int
    n_episodes: int
    """Episodes that gave at least one row."""
    rows: tuple[BenchRow, ...]
    check: tuple[int, ...]
    """Indices into `rows`: the longest, the shortest, and others between them. Every engine's first step is over these; loss and
    gradient must agree. Engines that compute each row for itself are timed on them too, as their time is a sum over rows."""
    left_out: dict[str, int]
    """What was not taken, by reason."""

    @property
    def n_tokens(self) -> int:
        """Logical tokens of a step: those of all samples, as often as they occur."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def check_rows(self) -> list[BenchRow]:
        """The rows that every engine's first step is over."""
        return [self.rows[index] for index in self.check]

    @property
    def warm_up_rows(self) -> list[BenchRow]:
        """The beginning of the shortest row, every token trained: enough to load kernels and start threads, and never timed."""
        ids = min((row.ids for row in self.rows), key=len)[:WARM_UP_TOKENS]
        return [BenchRow(ids=ids, weights=(0.0, *[1.0] * (len(ids) - 1)))]

    def timed_rows(self, *, shares: bool) -> list[BenchRow]:
        """The rows of a timed step of an engine that `shares` prefixes between rows, or that does not."""
        return list(self.rows) if shares else self.check_rows

    def save(self, path: Path) -> None:
        """Write the file that engines read."""
        write_atomic(path, self.model_dump_json())

    @classmethod
    def load(cls, path: Path) -> Workload:
        """Read it."""
        return cls.model_validate_json(path.read_bytes())


class NoRows(Exception):
    """No sample of this shape is short enough; the message has the counts."""


class Sizes(Frozen):
    """How much a step holds."""

    n_episodes: int
    """Episodes to use (calls, control), or at most so many (episodes); pairs-sft makes half as many pairs."""
    max_length: int
    """A longer row is left out."""
    check_tokens: int
    """The check takes the longest row and others, about so many tokens in all; 0 is the whole step."""


def make_workload(
    shape: Shape, samples: Sequence[tuple[str, TrainingData]], template: ChatTemplate, sizes: Sizes, source: str = ""
) -> Workload:
    """The step of `shape` from (task, sample) pairs, the first that fit. Raises NoRows when none does."""
    left_out: Counter[str] = Counter()
    makers = {"calls": _calls, "episodes": _episodes, "pairs-sft": _pairs, "control": _control}
    rows = list(islice(makers[shape](samples, template, sizes, left_out), sizes.n_episodes))
    flat = tuple(row for group in rows for row in group)
    if not flat:
        raise NoRows(f"{shape}: no row of at most {sizes.max_length} tokens; left out: {dict(left_out)}; raise --max-length")
    return Workload(
        shape=shape,
        source=source,
        max_length=sizes.max_length,
        n_episodes=len(rows),
        rows=flat,
        check=_check(flat, sizes.check_tokens),
        left_out=dict(left_out),
    )


Groups = Iterator[list[BenchRow]]
"""The rows of one episode after another."""


def _calls(samples: Sequence[tuple[str, TrainingData]], template: ChatTemplate, sizes: Sizes, left_out: Counter[str]) -> Groups:
    """One row for each agent turn: its whole history, the loss on that turn alone, as a recorder of model calls stores them."""
    for _, sample in samples:
        turns = [index for index, message in enumerate(sample.messages) if message.is_agent]
        rows = [row for turn in turns for row in _fitting(_call(sample, turn), template, sizes, left_out)]
        if rows:
            yield rows


def _call(sample: TrainingData, turn: int) -> TrainingData:
    """The sample up to turn `turn`, which alone is trained."""
    before = [message.model_copy(update={"weight": 0.0}) if message.is_agent else message for message in sample.messages[:turn]]
    return sample.model_copy(update={"messages": (*before, sample.messages[turn])})


def _episodes(samples: Sequence[tuple[str, TrainingData]], template: ChatTemplate, sizes: Sizes, left_out: Counter[str]) -> Groups:
    """One row for each whole episode, every agent turn trained."""
    for _, sample in samples:
        if rows := _fitting(sample, template, sizes, left_out):
            yield rows


def _pairs(samples: Sequence[tuple[str, TrainingData]], template: ChatTemplate, sizes: Sizes, left_out: Counter[str]) -> Groups:
    """Two different attempts at one task after another, as whole episodes; a task without two that fit is counted, once."""
    by_task: dict[str, list[list[BenchRow]]] = {}
    for task, sample in samples:
        attempts = by_task.setdefault(task, [])
        if len(attempts) < 2:
            rows = _fitting(sample, template, sizes, left_out)
            if rows and all(rows[0].ids != other[0].ids for other in attempts):
                attempts.append(rows)
                if len(attempts) == 2:
                    yield from attempts
    if single := sum(len(attempts) < 2 for attempts in by_task.values()):
        left_out["task_without_two_attempts"] += single


def _control(samples: Sequence[tuple[str, TrainingData]], template: ChatTemplate, sizes: Sizes, left_out: Counter[str]) -> Groups:
    """Whole episodes that share no prefix: before each stands one token more, another for each row, without loss."""
    openers = iter(range(len(template.tokenizer)))
    for rows in _episodes(samples, template, sizes.model_copy(update={"max_length": sizes.max_length - 1}), left_out):
        yield [BenchRow(ids=(next(openers), *row.ids), weights=(0.0, *row.weights)) for row in rows]


def _fitting(sample: TrainingData, template: ChatTemplate, sizes: Sizes, left_out: Counter[str]) -> list[BenchRow]:
    """The row of a sample in a list, or nothing, counted, when it is too long or the template cannot keep it in one piece."""
    built = build_units([sample], template, NO_LIMIT)
    if len(built.rows) > 1 or built.refusals:
        left_out["not_one_row"] += 1
        return []
    row = built.rows[0]
    if len(row.ids) > sizes.max_length:
        left_out["too_long"] += 1
        return []
    return [BenchRow(ids=tuple(row.ids), weights=tuple(map(float, row.weights)))]


def _check(rows: Sequence[BenchRow], max_tokens: int) -> tuple[int, ...]:
    """The longest row, the shortest, and others at even distances in order of length; two at least, where there are two."""
    n_tokens = sum(len(row.ids) for row in rows)
    if not max_tokens or n_tokens <= max_tokens:
        return tuple(range(len(rows)))
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    count = max(2, round(max_tokens * len(rows) / n_tokens))
    return tuple(sorted({by_length[number * (len(rows) - 1) // (count - 1)] for number in range(count)}))
