"""WeightedLearn: learn every episode as much as its score says, and failures the other way round where asked."""

from __future__ import annotations

from loraloop.learn.form import Form, FormedLearn
from loraloop.learn.outcome_rules import OutcomeSettings
from loraloop.training_data import Method


class WeightedLearn(FormedLearn):
    """A sample weighs the place of its score on the scale `score_range`, times what the recorder gave it; turns keep their own weights.

    A timeout weighs its partial score, `max_timeout_weight` at most. A failure is refused unless `failure_weight` is below 0: then
    its turns become less likely, by that weight. `of` is what of an episode is learned: the name of a learn model, or nothing for
    its messages, else its actions.
    """

    own_name = "weighted"

    def __init__(
        self,
        min_score: float = 0.0,
        *,
        failure_weight: float = 0.0,
        max_timeout_weight: float = 0.5,
        score_range: tuple[float, float] = (0.0, 1.0),
        of: str | Form | None = None,
    ) -> None:
        outcomes = OutcomeSettings(
            min_score=min_score, score_range=score_range, failure_weight=failure_weight, max_timeout_weight=max_timeout_weight
        )
        super().__init__(of, outcomes)

    @property
    def objective(self) -> str:
        """One sentence for people."""
        return "Act as in every episode, as much as it was worth."

    @property
    def method(self) -> Method:
        """Trained by weighted likelihood."""
        return "weighted"
