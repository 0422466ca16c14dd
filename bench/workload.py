"""The rows of one optimizer step, made once by loraloop and read by every engine: the same token ids, the same loss weights.

A shape says which samples of an agent's episodes make up the step, and by which method it is trained: `pairs` by preference, all
others by likelihood. Nothing is ever truncated, what is too long is left out and counted. Trains nothing and loads no model, only a
tokenizer's chat template.
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

Shape = Literal["calls", "episodes", "pairs-sft", "pairs", "control"]
SHAPES: tuple[Shape, ...] = ("calls", "episodes", "pairs-sft", "pairs", "control")
PREFERENCE: tuple[Shape, ...] = ("pairs",)
"""Shapes trained by dpo; their rows stand in pairs, the better one first."""
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
    def is_preference(self) -> bool:
        """Whether the rows are pairs for dpo, each better one before its worse one."""
        return self.shape in PREFERENCE

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
        """The beginning of the shortest row, every token trained: enough to load kernels and start threads, and never timed.

        For a pair, that and a shorter one.
        """
        ids = min((row.ids for row in self.rows), key=len)[:WARM_UP_TOKENS]
        beginnings = [ids, ids[: len(ids) // 2 + 1]] if self.is_preference else [ids]
        return [BenchRow(ids=ids, weights=(0.0, *[1.0] * (len(ids) - 1))) for ids in beginnings]

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
    """Episodes to use (calls, control), or at most so many (episodes); pairs-sft and pairs make half as many pairs."""
    max_length: int
    """A longer row is left out."""
    check_tokens: int
    """The check takes the longest row and others, about so many tokens in all; 0 is the whole step."""


def make_workload(
    shape: Shape, samples: Sequence[tuple[str, TrainingData]], template: ChatTemplate, sizes: Sizes, source: str = ""
) -> Workload:
    """The step of `shape` from (task, sample) pairs, the first that fit. Raises NoRows when none does."""
    left_out: Counter[str] = Counter()
    makers = {"calls": _calls, "episodes": _episodes, "pairs-sft": _attempts, "pairs": _pairs, "control": _control}
    n_groups = sizes.n_episodes // 2 if shape in PREFERENCE else sizes.n_episodes
    rows = list(islice(makers[shape](samples, template, sizes, left_out), n_groups))
    flat = tuple(row for group in rows for row in group)
    if not flat:
        raise NoRows(f"{shape}: no row of at most {sizes.max_length} tokens; left out: {dict(left_out)}; raise --max-length")
    return Workload(
        shape=shape,
        source=source,
        max_length=sizes.max_length,
        n_episodes=len(flat) if shape in PREFERENCE else len(rows),
        rows=flat,
        check=_check(flat, sizes.check_tokens, n_together=2 if shape in PREFERENCE else 1),
        left_out=dict(left_out),
    )


Groups = Iterator[list[BenchRow]]
"""The rows of one episode after another, or of one pair of them."""


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


def _attempts(samples: Sequence[tuple[str, TrainingData]], template: ChatTemplate, sizes: Sizes, left_out: Counter[str]) -> Groups:
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


def _pairs(samples: Sequence[tuple[str, TrainingData]], template: ChatTemplate, sizes: Sizes, left_out: Counter[str]) -> Groups:
    """Attempts at the same task side by side: the first with the second, the third with the fourth; each episode is in one pair.

    Which of them is called better says nothing about the speed, so it is the first.
    """
    waiting: dict[str, TrainingData] = {}
    for task, sample in samples:
        other = waiting.pop(task, None)
        if other is None:
            waiting[task] = sample
        elif rows := _fitting(_pair(other, sample), template, sizes, left_out):
            yield rows
    if waiting:
        left_out["episode_without_partner"] += len(waiting)


def _pair(better: TrainingData, worse: TrainingData) -> TrainingData:
    """A sample for dpo; its prompt is what both share before the first turn in which they differ."""
    shorter = min(len(better.messages), len(worse.messages)) - 1
    in_step = zip(better.messages[:shorter], worse.messages, strict=False)
    n_prompt = next((number for number, (one, other) in enumerate(in_step) if one != other), shorter)
    return better.model_copy(update={"kind": "dpo", "n_prompt": n_prompt, "rejected_messages": worse.messages[n_prompt:]})


def _control(samples: Sequence[tuple[str, TrainingData]], template: ChatTemplate, sizes: Sizes, left_out: Counter[str]) -> Groups:
    """Whole episodes that share no prefix: before each stands one token more, another for each row, without loss."""
    openers = iter(range(len(template.tokenizer)))
    for rows in _episodes(samples, template, sizes.model_copy(update={"max_length": sizes.max_length - 1}), left_out):
        yield [BenchRow(ids=(next(openers), *row.ids), weights=(0.0, *row.weights)) for row in rows]


def _fitting(sample: TrainingData, template: ChatTemplate, sizes: Sizes, left_out: Counter[str]) -> list[BenchRow]:
    """The row of a sample, or the two of a pair; nothing, counted, when one is too long or the template cannot keep it in one piece."""
    built = build_units([sample], template, NO_LIMIT, method=sample.kind)
    if len(built.rows) > (2 if sample.kind == "dpo" else 1) or built.refusals:
        left_out["not_one_row"] += 1
        return []
    if any(len(row.ids) > sizes.max_length for row in built.rows):
        left_out["too_long"] += 1
        return []
    return [BenchRow(ids=tuple(row.ids), weights=tuple(map(float, row.weights))) for row in built.rows]


def _check(rows: Sequence[BenchRow], max_tokens: int, n_together: int) -> tuple[int, ...]:
    """The longest row, the shortest, and others at even distances in order of length; two at least, where there are two.

    Of pairs, whose rows stand together, the whole of each.
    """
    n_tokens = sum(len(row.ids) for row in rows)
    if not max_tokens or n_tokens <= max_tokens:
        return tuple(range(len(rows)))
    parts = [tuple(range(start, start + n_together)) for start in range(0, len(rows), n_together)]
    parts.sort(key=lambda part: sum(len(rows[index].ids) for index in part))
    count = max(2, round(max_tokens * len(parts) / n_tokens))
    chosen = {parts[number * (len(parts) - 1) // (count - 1)] for number in range(count)}
    return tuple(sorted(index for part in chosen for index in part))
