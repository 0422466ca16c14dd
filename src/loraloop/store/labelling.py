"""What labels mean to an episode that comes again: it is compared as it was recorded, and a label stays until something newer is said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from loraloop.episode import LICENSE_TAG, RECORDED, Episode, EpisodeDto, Label, Outcome
from loraloop.errors import StoreError
from loraloop.files import json_line
from loraloop.store.text import escape_surrogates, follow

Labelled = TypeVar("Labelled", Episode, EpisodeDto)


@dataclass(frozen=True)
class Followed:
    """An episode to keep, and its labels when it has any."""

    episode: Episode
    labels: tuple[Label, ...] = ()


def follow_labelled(kept: Episode, labels: Sequence[Label], episode: Episode, where: str) -> Followed | None:
    """`follow`, of an episode that has `labels`; where the recorded outcome changes with what follows, that is one label more."""
    recorded = [label for label in labels if label.source == RECORDED]
    before = kept.model_copy(update={"outcome": recorded[-1].outcome}) if recorded else kept
    following = follow(before, episode, where)
    if following is None or not labels:
        return None if following is None else Followed(following)
    if following.outcome == before.outcome:
        return Followed(following.model_copy(update={"outcome": kept.outcome}), tuple(labels))
    return Followed(following, (*labels, Label(episode_id=episode.id, outcome=following.outcome, source=RECORDED)))


def recorded_label(episode: Episode | EpisodeDto) -> Label:
    """What an episode says of its own outcome before anybody else has."""
    return Label(episode_id=episode.id, outcome=episode.outcome, at=episode.metadata.created_at, source=RECORDED)


def as_kept(label: Label, now: Outcome) -> Label:
    """`label` as it is kept of an episode with the outcome `now`, which one that says terms leaves as it is."""
    return label if label.license is None else label.model_copy(update={"outcome": now})


def labelled(model: Labelled, kept: Label) -> Labelled:
    """`model` as `kept` says that it is."""
    said = model.model_copy(update={"outcome": kept.outcome})
    if kept.license is None:
        return said
    tags = dict(sorted({**model.metadata.tags, LICENSE_TAG: kept.license}.items()))
    return said.model_copy(update={"metadata": model.metadata.model_copy(update={"tags": tags})})


def to_json(label: Label) -> str:
    """`label` as JSON text. Raises StoreError when it is not valid (`model_copy` checks nothing)."""
    try:
        return escape_surrogates(json_line(label.model_dump(warnings="error")))
    except (ValueError, TypeError) as error:
        raise StoreError(f"the label of {label.episode_id} cannot be stored as JSON: {error}; correct that value") from error


def from_json(text: str) -> Label:
    """What `to_json` made."""
    return Label.model_validate(json.loads(text))
