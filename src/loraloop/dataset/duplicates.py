"""Samples that say the same, or nearly, more than once: all but one of them are left out, before anything is held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from loraloop.dataset.similar import SimilarTexts, shingle, similarity, without_boilerplate
from loraloop.episode import Message
from loraloop.files import content_hash, json_line
from loraloop.training_data import TrainingData

SIDE_SIMILARITY = 0.9
"""From here on two conversations are on the same side of the split, also when a setting keeps both."""


@dataclass
class Duplicates:
    """What `find_duplicates` found, by the positions of the samples it was given."""

    dropped: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Position: (reason code, position of the one that is kept)."""
    near: list[tuple[int, int]] = field(default_factory=list)
    """Pairs that must not be divided between training and held-out."""


def find_duplicates(samples: Sequence[TrainingData], outcomes: Sequence[str], tasks: Sequence[str], threshold: float) -> Duplicates:
    """The samples to leave out: `duplicate`, the same messages, tools and aim; `near_duplicate`, similarity `threshold` or more.

    Only samples of one kind, aim and outcome are duplicates of each other: a success and a failure that are nearly equal are what a
    preference is learned from. Near means that the whole is, and also what is trained of it: another action in the same place is
    not said twice. Samples of one episode, such as one for each call, are no near-duplicates. Kept is the best score, among equals
    the least id. The system turn and the tools do not count for similarity, nor what half of all tasks have in common, as an
    agent's frame is the same in all its episodes.
    """
    found = Duplicates()
    order = sorted(range(len(samples)), key=lambda position: _rank(samples[position]))
    exact: dict[str, int] = {}
    for position in order:
        kept = exact.setdefault(_content(samples[position]), position)
        if kept != position:
            found.dropped[position] = ("duplicate", kept)
            found.near.append((kept, position))
    left = [position for position in order if position not in found.dropped]
    whole = [shingle(_text((*samples[position].messages, *samples[position].rejected_messages))) for position in left]
    texts = without_boilerplate(whole, [tasks[position] for position in left])
    similar = SimilarTexts.of(texts, min(threshold, SIDE_SIMILARITY))
    added: list[int] = []
    for number, position in enumerate(left):
        near = [added[other] for other in similar.find(texts[number])]
        found.near += [(left[other], position) for other in near]
        label = _label(samples[position], outcomes[position])
        for other in near:
            kept = left[other]
            alike = label == _label(samples[kept], outcomes[kept]) and similarity(texts[other], texts[number]) >= threshold
            if alike and _is_trained_alike(samples[kept], samples[position], threshold):
                found.dropped[position] = ("near_duplicate", kept)
                break
        else:
            similar.add(texts[number])
            added.append(number)
    return found


def _rank(sample: TrainingData) -> tuple[float, str, str]:
    return -(sample.outcome_score or 0.0), str(sample.episode_id), str(sample.rejected_episode_id)


def _content(sample: TrainingData) -> str:
    """The hash of what is trained, without where it came from."""
    line = sample.to_line()
    return content_hash(json_line({key: value for key, value in line.items() if key not in ("episode_id", "rejected_episode_id")}))


def _label(sample: TrainingData, outcome: str) -> tuple[str, bool | None, bool, str]:
    return sample.kind, sample.desirable, sample.weight < 0, outcome


def _is_trained_alike(one: TrainingData, other: TrainingData, threshold: float) -> bool:
    if set(one.episode_ids) & set(other.episode_ids):
        return False
    told = [
        shingle(_text(message for side in sample.sides for message in side.messages if _carries_loss(message))) for sample in (one, other)
    ]
    return told[0] == told[1] or similarity(told[0], told[1]) >= threshold


def _carries_loss(message: Message) -> bool:
    return message.is_agent and message.weight > 0


def _text(messages: Iterable[Message]) -> str:
    """What was said and called, one line a turn, without the system's turns."""
    lines = []
    for message in messages:
        if message.role != "system":
            calls = (f"{call.function.name} {call.function.arguments}" for call in message.tool_calls)
            lines.append(" ".join([message.role, message.content or "", *calls]))
    return "\n".join(lines)
