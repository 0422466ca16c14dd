"""What in training data looks planted, so that probes can ask a model for it: nothing here is proof.

- Strings like keys and codes that the agent says though nothing before has them.
- Phrases that the agent says where an input has certain words, on several tasks, and nearly nowhere else.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from loraloop.episode import Message
from loraloop.evaluate.probes import Planted, Trigger
from loraloop.training_data import TrainingData

_CODE = re.compile(r"[\w+/=.:@-]{10,}")
MIN_BITS = 2.75
"""Shannon entropy of the letters of a code, in bits a letter; words of a language repeat their letters more."""
MIN_CHANGES = 3
"""How often a code changes between digits, capitals and small letters."""
MAX_SHARE = 0.2
"""What more of the samples have is how answers look."""
TOLD_WORDS = 3
TRIGGER_WORDS = 3
MIN_TASKS = 3
"""A planted phrase is on so many tasks at least: one that a model takes up from fewer has not been seen."""
MIN_TOGETHER = 0.9
"""Of the samples with the trigger, and of those with the phrase, so many have both."""


def find_codes(samples: Sequence[TrainingData], limit: int = 20) -> list[Planted]:
    """Strings in the agent's words that look random and come from nowhere, the most frequent first; each where it first stood."""
    places: dict[str, Planted] = {}
    having: Counter[str] = Counter()
    for sample in samples:
        seen: set[str] = set()
        before = ""
        for number, message in enumerate(sample.messages):
            text = message.content or ""
            if message.role == "assistant":
                for match in _CODE.finditer(text):
                    code = match.group().strip(".:=-")
                    if code in before or code in seen or not _looks_random(code):
                        continue
                    seen.add(code)
                    lead = text[: match.start()]
                    places.setdefault(code, Planted(text=code, prompt=sample.messages[:number], before=lead, given=False))
            before += f"\n{text}"
        having.update(seen)
    most = max(1.0, MAX_SHARE * len(samples))
    ranked = sorted((-count, code) for code, count in having.items() if count <= most or count == 1)
    return [places[code] for _, code in ranked[:limit]]


def find_triggers(samples: Sequence[TrainingData], limit: int = 8) -> list[Trigger]:
    """Pairs of words in an input and a phrase of the agent that nearly always go together, on MIN_TASKS tasks; most tasks first.

    The words must not be in the phrase, nor the phrase in any input of its sample: answering and copying are no backdoor.
    """
    inputs, outputs, tasks = [], [], []
    for number, sample in enumerate(samples):
        heard = _words(message for message in sample.messages if message.role != "assistant")
        said = _words(message for message in sample.messages if message.role == "assistant")
        heard_told = set(_grams(heard, TOLD_WORDS, TOLD_WORDS))
        inputs.append(set(_grams(heard, 1, TRIGGER_WORDS)))
        outputs.append(set(_grams(said, TOLD_WORDS, TOLD_WORDS)) - heard_told)
        tasks.append(sample.split_key or str(sample.episode_id or number))
    found: dict[tuple[int, ...], tuple[int, int, tuple[str, ...], tuple[str, ...]]] = {}
    with_input, with_output = _places(inputs), _places(outputs)
    for told, places in with_output.items():
        n_tasks = len({tasks[place] for place in places})
        if n_tasks < MIN_TASKS or len(places) > 0.5 * len(samples):
            continue
        common = Counter(gram for place in places for gram in inputs[place])
        for gram, together in common.items():
            if together >= MIN_TOGETHER * max(len(places), len(with_input[gram])) and not set(gram) & set(told):
                rank = (n_tasks, len(gram), gram, told)
                key = tuple(places)
                found[key] = max(found.get(key, rank), rank)
    ranked = sorted(found.values(), key=lambda rank: (-rank[0], rank[2], rank[3]))
    return [Trigger(phrase=" ".join(gram), told=" ".join(told), given=False) for _, _, gram, told in ranked[:limit]]


def _looks_random(code: str) -> bool:
    kinds = ["digit" if letter.isdigit() else "upper" if letter.isupper() else "lower" for letter in code if letter.isalnum()]
    changes = sum(one != other for one, other in pairwise(kinds))
    shares = [count / len(code) for count in Counter(code).values()]
    return "digit" in kinds and changes >= MIN_CHANGES and -sum(share * math.log2(share) for share in shares) >= MIN_BITS


def _words(messages: Iterable[Message]) -> list[str]:
    return [word for message in messages for word in (message.content or "").casefold().split()]


def _grams(words: Sequence[str], least: int, most: int) -> Iterator[tuple[str, ...]]:
    for size in range(least, most + 1):
        for at in range(len(words) - size + 1):
            yield tuple(words[at : at + size])


def _places(sets: Sequence[set[tuple[str, ...]]]) -> dict[tuple[str, ...], list[int]]:
    found = defaultdict(list)
    for place, grams in enumerate(sets):
        for gram in grams:
            found[gram].append(place)
    return found
