"""KtoLearn: learn from single episodes that some were desirable and others not."""

from __future__ import annotations

from loraloop.learn.form import Form, FormedLearn
from loraloop.learn.outcome_rules import OutcomeSettings
from loraloop.training_data import Method


class KtoLearn(FormedLearn):
    """A success is a desirable sample, a failure an undesirable one; one kind alone is allowed.

    With `include_timeouts` a timeout is undesirable, else it is refused; unknown outcomes are refused. `of` is what of an episode
    is learned: the name of a learn model, or nothing for its messages, else its actions.
    """

    own_name = "kto"

    def __init__(
        self,
        min_score: float = 0.0,
        *,
        include_timeouts: bool = False,
        score_range: tuple[float, float] = (0.0, 1.0),
        of: str | Form | None = None,
    ) -> None:
        super().__init__(of, OutcomeSettings(min_score=min_score, score_range=score_range, include_timeouts=include_timeouts))

    @property
    def objective(self) -> str:
        """One sentence for people."""
        return "Act as in the episodes that ended well, and not as in those that failed."

    @property
    def method(self) -> Method:
        """Trained by desirable and undesirable samples."""
        return "kto"
