"""Caps, and the report of what the samples to train on consist of."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

from loraloop.dataset.accounts import Candidate
from loraloop.dataset.manifest import BalanceReport, Share
from loraloop.training_data import TrainingData

MAX_SHOWN = 10
"""How many groups of one division the report has."""


def over_cap(samples: Sequence[TrainingData], groups: Sequence[str], cap: int | None) -> set[int]:
    """The positions beyond `cap` samples of one group: kept are the best scores, among equals the least hash of the ids."""
    if cap is None:
        return set()
    kept: Counter[str] = Counter()
    over = set()
    for position in sorted(range(len(samples)), key=lambda position: _rank(samples[position])):
        if kept[groups[position]] >= cap:
            over.add(position)
        else:
            kept[groups[position]] += 1
    return over


def balance(candidates: Sequence[Candidate], tasks: Sequence[str], show: Callable[[str], str]) -> BalanceReport:
    """What `candidates`, whose tasks are given, consist of; `show` makes a name fit to be shown."""
    return BalanceReport(
        source=_shares([candidate.source for candidate in candidates], show),
        task=_shares(tasks, show),
        outcome=_shares([candidate.outcome for candidate in candidates], show),
        kind=_shares([_kind(candidate.sample) for candidate in candidates], show),
    )


def _shares(names: Sequence[str], show: Callable[[str], str]) -> tuple[Share, ...]:
    largest = sorted(Counter(names).items(), key=lambda item: (-item[1], item[0]))[:MAX_SHOWN]
    return tuple(Share(name=show(name), samples=count, share=round(count / len(names), 4)) for name, count in largest)


def _kind(sample: TrainingData) -> str:
    if sample.desirable is None:
        return sample.kind
    return f"{sample.kind} {'desirable' if sample.desirable else 'undesirable'}"


def _rank(sample: TrainingData) -> tuple[float, str]:
    ids = "/".join(map(str, sample.episode_ids))
    return -(sample.outcome_score or 0.0), hashlib.blake2b(ids.encode(), digest_size=8).hexdigest()
