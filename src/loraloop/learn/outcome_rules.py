"""What each outcome means to supervised training: success is learned from its score on, nothing else is unless asked for."""

from __future__ import annotations

import math

from loraloop.episode import Episode, Failure, Outcome, Success, Timeout


def refusal_for_outcome(outcome: Outcome, min_score: float, *, include_timeouts: bool) -> str | None:
    """The reason code for leaving an episode out of sft, or None when it is learned."""
    if isinstance(outcome, Success):
        return None if outcome.score >= min_score else "score_below_minimum"
    if isinstance(outcome, Timeout):
        return None if include_timeouts else "outcome_timeout"
    return "outcome_failure" if isinstance(outcome, Failure) else "outcome_unknown"


def sample_weight(episode: Episode) -> float:
    """The weight that the recorder gave the whole episode (an importer keeps it as the tag `weight`), 1 otherwise.

    0 means that the recorder wants it left out; learn models refuse such an episode as `weight_zero`.
    """
    try:
        weight = float(episode.metadata.tags.get("weight", "1"))
    except ValueError:
        return 1.0
    return weight if weight >= 0 and math.isfinite(weight) else 1.0
