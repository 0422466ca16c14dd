"""What scores of a trace say about its outcome, and what they leave open.

Anybody may score a trace under any name, on any scale, and in `toxicity` less is better, so only names that can mean nothing but
"the task was solved" decide, in the order of `OUTCOME_NAMES`; every score is a tag `score.NAME`. A number is a Success from full reward
on, with that very number, and a Failure that names it below; true, false and words like `pass` and `incorrect` are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterable

from loraloop.chat.refused_entry import find_finite
from loraloop.episode import AnyOutcome, Failure, Success, Unknown
from loraloop.importers.span_tree import Score

OUTCOME_NAMES = (
    "outcome",
    "success",
    "task_success",
    "resolved",
    "passed",
    "task_completion",
    "goal_achieved",
    "reward",
    "correctness",
    "correct",
)
"""Lower case, with `_` for blanks, hyphens and dots."""
FULL_SCORE = 1 - 1e-6

_GOOD = {"success", "succeeded", "pass", "passed", "correct", "resolved", "solved", "yes", "true", "c"}
_BAD = {"failure", "failed", "fail", "incorrect", "unresolved", "unsolved", "no", "false", "i", "partial", "partially_correct", "p"}


def outcome_of(scores: Iterable[Score]) -> tuple[AnyOutcome, str | None, dict[str, str]]:
    """(the outcome, the name of the score that decided it, all scores as tags); of one name scored again, the latest counts."""
    latest: dict[str, Score] = {}
    for score in sorted(scores, key=lambda score: score.at or 0):
        latest[score.name] = score
    tags = {f"score.{name}": _shown(score) for name, score in latest.items()}
    by_plain_name = {_plain(name): score for name, score in latest.items()}
    for name in OUTCOME_NAMES:
        if name in by_plain_name and (outcome := _to_outcome(by_plain_name[name])) is not None:
            return outcome, by_plain_name[name].name, tags
    return Unknown(), None, tags


def _to_outcome(score: Score) -> AnyOutcome | None:
    if isinstance(score.value, bool):
        return Success(1.0) if score.value else Failure(f"{score.name} false")
    number = find_finite(score.value)
    if number is not None:
        return Success(number) if number >= FULL_SCORE else Failure(f"{score.name} {number:g}")
    said = score.value if isinstance(score.value, str) else score.label
    word = _plain(said or "")
    if word in _GOOD:
        return Success(1.0)
    return Failure(f"{score.name} {said}") if word in _BAD else None


def _shown(score: Score) -> str:
    if isinstance(score.value, bool):
        return str(score.value).lower()
    number = find_finite(score.value)
    if number is not None:
        return f"{number:.10g}"
    return score.value if isinstance(score.value, str) else score.label or ""


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_").replace(".", "_")
