"""PreferenceLearn: learn from pairs of attempts at one task which of the two is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from loraloop.episode import Episode
from loraloop.errors import SettingsError
from loraloop.learn.form import Form, FormedLearn
from loraloop.learn.outcome_rules import Meaning, OutcomeSettings, recorded_weight, score_of
from loraloop.learn.pair import Aligned, NoPair, align, count_shared
from loraloop.learn.transcript import Transcript, refuse, split_key
from loraloop.training_data import Method, Refusal, TrainingData

Pairing = Literal["best_worst", "divergence"]


class PreferenceLearn(FormedLearn):
    """A sample is a pair of attempts at one task: the same group, else the same scenario and task. The better one is a success.

    `min_quality_gap` is how far apart the two must be at least, as a share of the scale `score_range`; equals are never a pair.
    `pairing` `best_worst` takes the pairs that are farthest apart first, and learns both from where they part to their ends;
    `divergence` takes those that go together longest first, and learns only the first turn in which the agent did otherwise.
    Each episode is in one pair, or in any number with `allow_reuse`; a group gives `max_pairs` at most. Ties go by episode id.
    Failures are at the bottom of the scale, timeouts at their partial score, and neither is ever preferred. `of` is what of an
    episode is learned: the name of a learn model, or nothing for its messages, else its actions.
    """

    own_name = "preference"

    def __init__(
        self,
        min_score: float = 0.0,
        *,
        min_quality_gap: float = 0.1,
        max_pairs: int | None = None,
        allow_reuse: bool = False,
        pairing: Pairing = "best_worst",
        score_range: tuple[float, float] = (0.0, 1.0),
        of: str | Form | None = None,
    ) -> None:
        super().__init__(of, OutcomeSettings(min_score=min_score, score_range=score_range))
        if not (math.isfinite(min_quality_gap) and 0 <= min_quality_gap <= 1):
            raise SettingsError(f"min_quality_gap={min_quality_gap}: expected a share of the scale, 0 to 1")
        if max_pairs is not None and max_pairs < 1:
            raise SettingsError(f"max_pairs={max_pairs}: expected a whole number >= 1, or None for no limit")
        if pairing not in get_args(Pairing):
            raise SettingsError(f"pairing={pairing!r}: expected {' or '.join(get_args(Pairing))}")
        self.min_quality_gap = min_quality_gap
        self.max_pairs = max_pairs
        self.allow_reuse = allow_reuse
        self.pairing = pairing

    @property
    def objective(self) -> str:
        """One sentence for people."""
        return "Prefer what the better of two attempts at one task did."

    @property
    def method(self) -> Method:
        """Trained by preference within a pair."""
        return "dpo"

    def group_key(self, episode: Episode) -> str:
        """The scenario with the group, else with the task; an episode without either is alone."""
        scenario = episode.metadata.scenario or ""
        if episode.group_id is not None:
            return f"group {scenario}/{episode.group_id}"
        return f"task {split_key(episode)}" if episode.task_id is not None else f"episode {episode.id}"

    def convert(self, episode: Episode) -> TrainingData | Refusal:
        """Always a Refusal: one episode is no pair. `convert_group` makes pairs."""
        return self.convert_group([episode])[0]

    def convert_group(self, episodes: Sequence[Episode]) -> list[TrainingData | Refusal]:
        """The pairs of one group, then a refusal for each episode that is in none."""
        refusals: list[Refusal] = []
        attempts: list[_Attempt] = []
        for episode in episodes:
            found = self._attempt(episode)
            if isinstance(found, Refusal):
                refusals.append(found)
            else:
                attempts.append(found)
        pairs, unpaired = self._choose(self._candidates(attempts))
        paired = {attempt.episode.id for pair in pairs for attempt in (pair.better, pair.worse)}
        for attempt in attempts:
            if attempt.episode.id not in paired:
                why = unpaired.get(attempt.episode.id) or _explain_alone(attempt, attempts)
                refusals.append(Refusal(episode_id=attempt.episode.id, reason=why.reason, detail=why.detail))
        return [*map(_to_sample, pairs), *sorted(refusals, key=lambda refusal: str(refusal.episode_id))]

    def _attempt(self, episode: Episode) -> _Attempt | Refusal:
        found = self.read(episode)
        if isinstance(found, Refusal):
            return found
        meaning, transcripts = found
        if len(transcripts) > 1:
            return refuse(episode, "history_rewritten", "its calls do not continue one another, so it is no single side of a pair")
        return _Attempt(episode, meaning, transcripts[0])

    def _candidates(self, attempts: Sequence[_Attempt]) -> list[tuple[_Attempt, _Attempt]]:
        """(better, worse) of all that are far enough apart, those to take first at the front."""
        keyed = []
        for better in attempts:
            for worse in attempts:
                gap = better.meaning.quality - worse.meaning.quality
                if better.meaning.is_good and gap > 0 and gap > self.min_quality_gap - _ROUNDING and _same_task(better, worse):
                    n_shared = count_shared(better.transcript.messages, worse.transcript.messages) if self.pairing == "divergence" else 0
                    keyed.append(((-n_shared, -gap, better.episode.id, worse.episode.id), (better, worse)))
        return [pair for _, pair in sorted(keyed, key=lambda both: both[0])]

    def _choose(self, candidates: Sequence[tuple[_Attempt, _Attempt]]) -> tuple[list[_Pair], dict[str, NoPair]]:
        """The pairs, and by episode the first thing that kept a candidate with it from being one."""
        pairs: list[_Pair] = []
        used: set[str] = set()
        unpaired: dict[str, NoPair] = {}
        for better, worse in candidates:
            ids = (better.episode.id, worse.episode.id)
            found: Aligned | NoPair
            if self.max_pairs is not None and len(pairs) >= self.max_pairs:
                found = NoPair("max_pairs", f"the group has its {self.max_pairs} pairs already")
            elif not self.allow_reuse and used & set(ids):
                found = NoPair("no_partner", "those that it could be compared with are in other pairs; allow_reuse lets them be in several")
            else:
                found = align(better.transcript, worse.transcript, one_turn=self.pairing == "divergence")
            if isinstance(found, NoPair):
                for episode_id in ids:
                    unpaired.setdefault(episode_id, found)
            else:
                pairs.append(_Pair(better, worse, found))
                used.update(ids)
        return pairs, unpaired


_ROUNDING = 1e-9
"""0.3 and 0.2 are 0.1 apart, though not to a computer."""


@dataclass(frozen=True, eq=False)
class _Attempt:
    episode: Episode
    meaning: Meaning
    transcript: Transcript


@dataclass(frozen=True, eq=False)
class _Pair:
    better: _Attempt
    worse: _Attempt
    turns: Aligned


def _same_task(one: _Attempt, other: _Attempt) -> bool:
    """A group of several tasks is no reason to compare them, or to carry one over the held-out line with another."""
    return split_key(one.episode) == split_key(other.episode)


def _explain_alone(attempt: _Attempt, attempts: Sequence[_Attempt]) -> NoPair:
    """Why an attempt is in no candidate."""
    others = [other for other in attempts if other is not attempt and _same_task(attempt, other)]
    if not others:
        return NoPair("no_partner", "it is the only attempt at its task that can be compared")
    if not attempt.meaning.is_good and not any(other.meaning.is_good for other in others):
        return NoPair("no_partner", "no attempt at its task is good enough to be preferred")
    return NoPair("gap_too_small", "no attempt at its task is so much better or worse")


def _to_sample(pair: _Pair) -> TrainingData:
    better, worse = pair.better.episode, pair.worse.episode
    return TrainingData(
        kind="dpo",
        messages=pair.turns.messages,
        rejected_messages=pair.turns.rejected_messages,
        n_prompt=pair.turns.n_prompt,
        tools=pair.better.transcript.tools,
        weight=recorded_weight(better) * recorded_weight(worse),
        episode_id=better.id,
        rejected_episode_id=worse.id,
        split_key=split_key(better),
        outcome_score=score_of(better.outcome),
        model=better.metadata.tags.get("model"),
    )
