"""Which texts say nearly the same: exact Jaccard similarity of their three-word sequences, without comparing all with all.

Two sets of which either's share in common is at least t have one of their rarest elements in common, so only the rarest
(1 - t) of each set are looked up (prefix filtering: Bayardo, Ma and Srikant, "Scaling up all pairs similarity search", 2007).
Nothing is estimated: no near-equal pair is missed, none is found by chance, and neither order nor hash seeds matter.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

Shingles = frozenset[int]

SHINGLE_WORDS = 3
BOILERPLATE_SHARE = 0.5
"""What so many of the tasks have in common is their frame (instructions, format of answers) and tells none from another."""
BOILERPLATE_MIN_TASKS = 20
"""Among fewer tasks nothing counts as frame."""
_WORD = re.compile(r"\w+")


def shingle(text: str) -> Shingles:
    """The hashes of all sequences of three words in `text`, of all its words when they are fewer; case and punctuation do not count."""
    words = _WORD.findall(text.casefold())
    if not words:
        return frozenset()
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return frozenset(zlib.crc32(" ".join(words[at : at + SHINGLE_WORDS]).encode("utf-8", "surrogatepass")) for at in range(last))


def without_boilerplate(texts: Sequence[Shingles], tasks: Sequence[str]) -> list[Shingles]:
    """Each of `texts` without what half of the distinct `tasks` or more have; unchanged among fewer than 20 tasks."""
    by_task: dict[str, set[int]] = {}
    for text, task in zip(texts, tasks, strict=True):
        by_task.setdefault(task, set()).update(text)
    if len(by_task) < BOILERPLATE_MIN_TASKS:
        return list(texts)
    having = Counter(part for parts in by_task.values() for part in parts)
    frame = frozenset(part for part, count in having.items() if count >= BOILERPLATE_SHARE * len(by_task))
    return [text - frame for text in texts]


class SimilarTexts:
    """Finds, among the texts added so far, those whose similarity to another is at least `threshold`."""

    def __init__(self, frequency: Mapping[int, int], threshold: float) -> None:
        self._frequency = frequency
        self._threshold = threshold
        self._texts: list[Shingles] = []
        self._having: dict[int, list[int]] = {}

    @classmethod
    def of(cls, texts: Iterable[Shingles], threshold: float) -> SimilarTexts:
        """An empty one, to which only `texts` will be added: how often their parts occur decides which are rare."""
        return cls(Counter(part for text in texts for part in text), threshold)

    def add(self, text: Shingles) -> int:
        """Add `text`; gives its number, counted from 0."""
        number = len(self._texts)
        self._texts.append(text)
        for part in self._rarest(text):
            self._having.setdefault(part, []).append(number)
        return number

    def find(self, text: Shingles) -> list[int]:
        """The numbers of those near-equal to `text`, sorted; none for an empty text."""
        candidates = {number for part in self._rarest(text) for number in self._having.get(part, ())}
        return sorted(number for number in candidates if similarity(self._texts[number], text) >= self._threshold)

    def _rarest(self, text: Shingles) -> Collection[int]:
        n_looked_up = len(text) - math.ceil(self._threshold * len(text) - 1e-9) + 1  # 1e-9: 0.7 * 10 is 7.000…1 elsewhere
        return sorted(text, key=lambda part: (self._frequency.get(part, 0), part))[: n_looked_up if text else 0]


def similarity(one: Shingles, other: Shingles) -> float:
    """The share that both have of what either has; 0 when both are empty."""
    common = len(one & other)
    return common / (len(one) + len(other) - common) if common else 0.0
