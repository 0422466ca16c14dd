"""What each outcome means to each method, as one table: `RULES`. Every learn model asks `judge`, and the documents are written from it.

A score counts as its place on the recorder's scale, 0 at the bottom and 1 at the top. The scale is 0 to 1 unless it is declared
otherwise; an episode whose score lies outside is refused, since the same number means another thing on another scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Literal

from loraloop.episode import Episode, Outcome, Success, Timeout
from loraloop.errors import SettingsError
from loraloop.training_data import Method, Refusal

_SCALE = re.compile(r"(-?[0-9.]*[0-9](?:e[+-]?[0-9]+)?)\.\.(-?[0-9.]*[0-9](?:e[+-]?[0-9]+)?)")
OutcomeKind = Literal["success", "failure", "timeout", "unknown"]


@dataclass(frozen=True)
class OutcomeSettings:
    """What may be set about outcomes. Raises SettingsError for a value outside its range."""

    min_score: float = 0.0
    """The least score, on the recorder's scale, of an episode that becomes likelier."""
    score_range: tuple[float, float] = (0.0, 1.0)
    """The bottom and the top of the recorder's scale; of an episode whose scale was declared by `ingest --scale`, that one counts."""
    include_timeouts: bool = False
    """Use timeouts where the method leaves them out by itself: learned by sft, undesirable to kto."""
    max_timeout_weight: float = 0.5
    """weighted: the most that a timeout weighs, 0 to 1, however far it had come."""
    failure_weight: float = 0.0
    """weighted: what a failure weighs, -1 to 0; below 0 its turns become less likely, at 0 it is refused."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "score_range", _check_range(self.score_range))
        low, high = self.score_range
        if not math.isfinite(self.min_score) or self.min_score > high:
            raise SettingsError(
                f"min_score={self.min_score}: expected a score within score_range, {low:g} to {high:g}; {low:g} takes every success"
            )
        if not 0 < self.max_timeout_weight <= 1:
            raise SettingsError(f"max_timeout_weight={self.max_timeout_weight}: expected a weight above 0, and 1 at most")
        if not -1 <= self.failure_weight <= 0:
            raise SettingsError(f"failure_weight={self.failure_weight}: expected a weight from -1 to 0")

    def on_scale_of(self, episode: Episode) -> OutcomeSettings:
        """These settings on the scale that was declared for this episode when it was taken in (tag `score_scale`), if one was."""
        found = _SCALE.fullmatch(episode.metadata.tags.get("score_scale", ""))
        if not found:
            return self
        own = copy(self)  # not made anew: a `min_score` above this scale leaves the episode out, and is no mistake
        object.__setattr__(own, "score_range", (float(found[1]), float(found[2])))
        return own

    def place(self, score: float) -> float:
        """Where `score` is on the scale, from 0 at the bottom to 1 at the top."""
        low, high = self.score_range
        return (score - low) / (high - low)


@dataclass(frozen=True)
class Meaning:
    """What an episode is to a method, which does learn from it."""

    quality: float
    """Its place on the scale of scores, 0 to 1; 0 for a failure, and for a timeout without a score."""
    weight: float = 1.0
    """weighted: what it weighs, before the recorder's own weight."""
    is_good: bool = True
    """Whether its turns are to become likelier: chosen or rejected to dpo it may be either way, desirable to kto."""


@dataclass(frozen=True)
class LeftOut:
    """The method does not learn from the episode."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Rule:
    """One cell of the table."""

    text: str
    """What happens, for the documents."""
    decide: Callable[[float | None, OutcomeSettings], Meaning | LeftOut]
    """From the place on the scale (None where there is no score), what happens."""


_UNKNOWN = LeftOut("outcome_unknown", "nobody said how it ended; label it first")
_FAILURE = LeftOut("outcome_failure")
_TIMEOUT = LeftOut("outcome_timeout")


def score_of(outcome: Outcome) -> float | None:
    """The score of a success, how far a timeout had come; None where there is no such number."""
    if isinstance(outcome, Success):
        return outcome.score
    return outcome.partial_score if isinstance(outcome, Timeout) else None


def judge(method: Method, episode: Episode, settings: OutcomeSettings) -> Meaning | Refusal:
    """What `episode` is to `method`, by its outcome; a Refusal when nothing is learned from it."""
    outcome, score = episode.outcome, score_of(episode.outcome)
    settings = settings.on_scale_of(episode)
    low, high = settings.score_range
    if score is not None and not low <= score <= high:
        declare = f"score_range=({min(low, score):g}, {max(high, score):g})"
        detail = f"its score {score:g} is outside the scale {low:g} to {high:g}; declare the recorder's, such as {declare} or --score-max"
        return Refusal(episode_id=episode.id, reason="score_outside_scale", detail=detail)
    decided = RULES[method, outcome.kind].decide(None if score is None else settings.place(score), settings)
    if isinstance(decided, LeftOut):
        return Refusal(episode_id=episode.id, reason=decided.reason, detail=decided.detail or str(outcome))
    return decided


def recorded_weight(episode: Episode) -> float:
    """The weight that the recorder gave the whole episode (an importer keeps it as the tag `weight`), 1 otherwise.

    0 means that the recorder wants it left out; learn models refuse such an episode as `weight_zero`.
    """
    try:
        weight = float(episode.metadata.tags.get("weight", "1"))
    except ValueError:
        return 1.0
    return weight if weight >= 0 and math.isfinite(weight) else 1.0


def to_markdown() -> str:
    """The table as the documents show it."""
    methods = list(dict.fromkeys(method for method, _ in RULES))
    kinds = list(dict.fromkeys(kind for _, kind in RULES))
    rows = [f"| {kind} | " + " | ".join(RULES[method, kind].text for method in methods) + " |" for kind in kinds]
    return "\n".join([f"| outcome | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|", *rows])


# --- the cells --------------------------------------------------------------------------------------------------------------


def _good(place: float | None, settings: OutcomeSettings) -> Meaning | LeftOut:
    """An episode to learn from, when its score is good enough; without a score it is at the bottom."""
    quality = place or 0.0
    if quality < settings.place(settings.min_score):
        low, high = settings.score_range
        score = "no score" if place is None else f"score {low + place * (high - low):g}"
        return LeftOut("score_below_minimum", f"{score}, min_score={settings.min_score:g}")
    return Meaning(quality)


def _good_by_score(place: float | None, settings: OutcomeSettings) -> Meaning | LeftOut:
    """As `_good`, weighing what the score says; what weighs nothing is left out."""
    good = _good(place, settings)
    if isinstance(good, LeftOut):
        return good
    return Meaning(good.quality, good.quality) if good.quality else LeftOut("weight_zero", "its score is the bottom of the scale")


def _good_or_rejected(place: float | None, settings: OutcomeSettings) -> Meaning | LeftOut:
    """One of a pair, either way; below `min_score` only the worse."""
    return Meaning(place or 0.0, is_good=not isinstance(_good(place, settings), LeftOut))


def _bad(place: float | None, _: OutcomeSettings) -> Meaning | LeftOut:
    return Meaning(place or 0.0, is_good=False)


def _bad_weight(_: float | None, settings: OutcomeSettings) -> Meaning | LeftOut:
    if settings.failure_weight == 0:
        return LeftOut("outcome_failure", "a failure weighs 0; failure_weight=-0.2 makes its turns less likely")
    return Meaning(0.0, settings.failure_weight, is_good=False)


def _timeout_if_asked(place: float | None, settings: OutcomeSettings) -> Meaning | LeftOut:
    return _good(place, settings) if settings.include_timeouts else _TIMEOUT


def _timeout_bad_if_asked(place: float | None, settings: OutcomeSettings) -> Meaning | LeftOut:
    return _bad(place, settings) if settings.include_timeouts else _TIMEOUT


def _timeout_weight(place: float | None, settings: OutcomeSettings) -> Meaning | LeftOut:
    if place is None:
        return LeftOut("outcome_timeout", "it has no partial score to weigh it by")
    meaning = _good_by_score(place, settings)
    if isinstance(meaning, LeftOut):
        return meaning
    return Meaning(meaning.quality, min(meaning.weight, settings.max_timeout_weight))


RULES: dict[tuple[Method, OutcomeKind], Rule] = {
    ("sft", "success"): Rule("trained when score ≥ `min_score`, else `score_below_minimum`", _good),
    ("weighted", "success"): Rule("weighs its place on the scale; `score_below_minimum`, or `weight_zero` at the bottom", _good_by_score),
    ("dpo", "success"): Rule("chosen when score ≥ `min_score`; rejected when another is better by `min_quality_gap`", _good_or_rejected),
    ("kto", "success"): Rule("desirable when score ≥ `min_score`, else `score_below_minimum`", _good),
    ("sft", "failure"): Rule("`outcome_failure`", lambda _place, _settings: _FAILURE),
    ("weighted", "failure"): Rule("`outcome_failure`, unless `failure_weight` is below 0: weighs that", _bad_weight),
    ("dpo", "failure"): Rule("rejected, at the bottom of the scale", _bad),
    ("kto", "failure"): Rule("undesirable", _bad),
    ("sft", "timeout"): Rule("`outcome_timeout`, unless `include_timeouts`: as a success with the partial score", _timeout_if_asked),
    ("weighted", "timeout"): Rule(
        "as a success with the partial score, `max_timeout_weight` at most; `outcome_timeout` without one", _timeout_weight
    ),
    ("dpo", "timeout"): Rule("rejected, only against a success, at its partial score", _bad),
    ("kto", "timeout"): Rule("`outcome_timeout`, unless `include_timeouts`: undesirable", _timeout_bad_if_asked),
    ("sft", "unknown"): Rule("`outcome_unknown`", lambda _place, _settings: _UNKNOWN),
    ("weighted", "unknown"): Rule("`outcome_unknown`", lambda _place, _settings: _UNKNOWN),
    ("dpo", "unknown"): Rule("`outcome_unknown`", lambda _place, _settings: _UNKNOWN),
    ("kto", "unknown"): Rule("`outcome_unknown`", lambda _place, _settings: _UNKNOWN),
}
"""(method, kind of outcome) -> what happens. A score outside `score_range` is refused before, as `score_outside_scale`."""


def _check_range(score_range: tuple[float, float]) -> tuple[float, float]:
    """The range as two floats; TOML gives a list."""
    try:
        low, high = map(float, score_range)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"score_range={score_range!r}: expected two numbers, the bottom and the top of the scale") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise SettingsError(f"score_range={score_range!r}: expected a bottom below a top")
    return low, high
