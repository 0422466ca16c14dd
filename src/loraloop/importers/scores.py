"""Which of several scores counts, and the scale it is on, declared for a source (`ingest --score reward.correct --scale 0..1`).

A score is looked for among what importers keep of an entry: a tag of that name, `reward.NAME` or `score.NAME`, a key of an object in a
tag, or what the outcome itself says. True and false are the top and the bottom of the scale, and Inspect's letters lie on it: C at the
top, P in the middle, I and N at the bottom. A score from `success_from` on, without it the top, is a Success with that score; a run that
ended in time and one that did not stay apart. What was declared stays with the episode, in the tags `score` and `score_scale`, and learn
models go by that scale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from loraloop.chat.refused_entry import EntryRefused, find_finite, show
from loraloop.episode import AnyOutcome, Episode, Failure, Success, Timeout, Unknown
from loraloop.errors import SettingsError
from loraloop.importers.entry import with_content_id

_LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
_SCALE = re.compile(r"\s*(-?[\d.]*\d(?:e[+-]?\d+)?)\s*\.\.\s*(-?[\d.]*\d(?:e[+-]?\d+)?)\s*")
_CLOSE = 1e-6
"""Of the width of the scale: so near to full marks is full marks."""


@dataclass(frozen=True)
class ScoreRule:
    """`key` names the score, None whichever the importer takes; the scale goes from `low` to `high`."""

    key: str | None
    low: float = 0.0
    high: float = 1.0
    success_from: float = 1.0

    @classmethod
    def parse(cls, key: str | None, scale: str | None, success_from: float | None = None) -> Self | None:
        """From what was typed, None when nothing was; the scale is 0..1 unless it is said. Raises SettingsError."""
        if key is None and scale is None and success_from is None:
            return None
        found = _SCALE.fullmatch(scale or "0..1")
        try:
            low, high = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
        except ValueError:
            low, high = 0.0, 0.0
        if low >= high or key == "":
            raise SettingsError(f"--scale {scale} --score {key}: expected the bottom and the top, such as 0..1, and the name of a score")
        least = high if success_from is None else success_from
        if not low <= least <= high:
            raise SettingsError(f"--success-from {least:g}: expected a score on the scale {low:g}..{high:g}")
        return cls(key, low, high, least)

    @property
    def scale(self) -> str:
        """The scale as it is typed."""
        return f"{self.low:g}..{self.high:g}"

    @property
    def top_key(self) -> str | None:
        """The key of an entry that the score stands in."""
        return self.key.partition(".")[0] if self.key else None

    def apply(self, episode: Episode) -> Episode:
        """`episode` with the outcome that its score says. Refused as `no_score`, `bad_reward` or `score_outside_scale`."""
        name, value = self._find(episode)
        score = self._to_number(value, name)
        tags = {**episode.metadata.tags, "score": name, "score_scale": self.scale}
        if "outcome_from" in tags:
            tags["outcome_from"] = "score"
        metadata = episode.metadata.model_copy(update={"tags": dict(sorted(tags.items()))})
        judged = episode.model_copy(update={"outcome": self._to_outcome(score, name, episode.outcome), "metadata": metadata})
        return with_content_id(judged)

    def _find(self, episode: Episode) -> tuple[str, object]:
        tags = episode.metadata.tags
        if self.key is not None:
            for name in (self.key, f"reward.{self.key}", f"score.{self.key}"):
                if name in tags:
                    return self.key, _parsed(tags[name])
            top, *below = self.key.split(".")
            value = _parsed(tags[top]) if top in tags else None
            for part in below:
                value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
            if top in tags and value is not _MISSING:
                return self.key, value
        said = _said(episode.outcome) if tags.get("outcome_from") != "format" else None  # a convention is no score
        if said and self.key in (None, said[0], "reward", "score"):
            return self.key or said[0], said[1]
        known = sorted(name for name in tags if name in ("reward", "score") or name.startswith(("reward.", "score.")))
        found = f"no score {self.key or ''}".rstrip() + f"; scores are {show(known)}"
        raise EntryRefused("no_score", found, "the score that was named", "name one that is there, or leave --score out")

    def _to_number(self, value: object, name: str) -> float | None:
        if value is None:
            return None
        place = float(value) if isinstance(value, bool) else _LETTERS.get(value.strip().upper()) if isinstance(value, str) else None
        number = self.low + place * (self.high - self.low) if place is not None else find_finite(value)
        if number is None:
            advice = "name one part of it, as KEY.SUBKEY" if isinstance(value, dict) else "write what was paid"
            raise EntryRefused("bad_reward", f"{name} {show(value)}", "a finite number, a boolean, or C, P, I or N", advice)
        if not self.low <= number <= self.high:
            raise EntryRefused("score_outside_scale", f"{name} {number:g}", f"a score on {self.scale}", "say the scale that it is on")
        return number

    def _to_outcome(self, score: float | None, name: str, before: AnyOutcome) -> AnyOutcome:
        if score is None:
            return before if isinstance(before, Timeout) else Unknown()
        if score >= self.success_from - _CLOSE * (self.high - self.low):
            return Success(score)
        return Timeout(score) if isinstance(before, Timeout) else Failure(f"{name} {score:g}")


_MISSING = object()


def describe(rule: ScoreRule | None, scores: Iterable[float]) -> str:
    """What a report says of scores: the declared one, or that they were taken as recorded, and from where to where; empty without any."""
    if rule is not None:
        return f"{rule.key or 'score'} on {rule.scale}"
    seen = sorted(scores)
    return (f"as recorded, {seen[0]:g}..{seen[-1]:g}" if seen[0] < seen[-1] else f"as recorded, {seen[0]:g}") if seen else ""


def score_of(outcome: AnyOutcome) -> float | None:
    """The number in an outcome, None where there is none."""
    return outcome.score if isinstance(outcome, Success) else outcome.partial_score if isinstance(outcome, Timeout) else None


def _said(outcome: AnyOutcome) -> tuple[str, object] | None:
    """The name and value of the score that an importer took: of a failure, `reward 0.3` says it."""
    if isinstance(outcome, Failure):
        found = re.fullmatch(r"(\w+) (\S+)", outcome.reason)
        value = _parsed(found[2]) if found else None
        is_score = isinstance(value, float | int) or value in _LETTERS
        return (found[1], value) if found and is_score else None
    score = score_of(outcome)
    return ("score", score) if score is not None else None


def _parsed(text: str) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value
