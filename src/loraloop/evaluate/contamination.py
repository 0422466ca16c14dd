"""Which held-out tasks a candidate has trained on: by name, by content, and by near-equal content.

A score on such a task proves memory, not skill. Nothing is estimated: every pair that shares a part is compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from loraloop.episode import Frozen

NEAR = 0.7
"""From this similarity on two tasks are one, as where a dataset is split."""


class TaskTrace(Frozen):
    """What identifies a task."""

    task_id: str
    content: str | None = None
    """A hash of what the task says, where it is known."""
    parts: frozenset[int] = frozenset()
    """Hashes of the pieces of its text, such as of each three words; empty where unknown."""


class Overlap(Frozen):
    """A held-out task that was trained on."""

    held_out: str
    training: str
    """The task of the training data that it is."""
    by: Literal["task_id", "content", "near"]
    similarity: float = 1.0
    """The share of the parts in common, of those that either has."""


def find_overlaps(held_out: Iterable[TaskTrace], training: Iterable[TaskTrace], near: float = NEAR) -> tuple[Overlap, ...]:
    """The held-out tasks that are in the training data, in their order, each once with the strongest reason; none for no tasks."""
    names: set[str] = set()
    contents: dict[str, str] = {}
    having: dict[int, list[int]] = {}
    trained = list(training)
    for number, trace in enumerate(trained):
        names.add(trace.task_id)
        if trace.content is not None:
            contents.setdefault(trace.content, trace.task_id)
        for part in trace.parts:
            having.setdefault(part, []).append(number)
    found = []
    for trace in held_out:
        if trace.task_id in names:
            found.append(Overlap(held_out=trace.task_id, training=trace.task_id, by="task_id"))
        elif trace.content in contents:
            found.append(Overlap(held_out=trace.task_id, training=contents[trace.content], by="content"))
        elif (nearest := _find_nearest(trace, trained, having)) and nearest[0] >= near:
            found.append(Overlap(held_out=trace.task_id, training=nearest[1], by="near", similarity=nearest[0]))
    return tuple(found)


def _find_nearest(trace: TaskTrace, trained: list[TaskTrace], having: dict[int, list[int]]) -> tuple[float, str] | None:
    """(similarity, task) of the most similar one that has a part in common."""
    common = Counter(number for part in trace.parts for number in having.get(part, ()))
    ranked = (
        (count / (len(trace.parts) + len(trained[number].parts) - count), -number, trained[number].task_id)
        for number, count in common.items()
    )
    best = max(ranked, default=None)
    return (best[0], best[2]) if best else None
