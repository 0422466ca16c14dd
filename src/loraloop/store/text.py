"""The text form of an episode, what it means that two are the same, and that one continues another; for every store of ours.

The text form keeps what was recorded to the letter: the order of keys in tool schemas (a chat template renders them in that
order), `content` None apart from "", and lone surrogates, which a cut-off emoji leaves behind. What JSON cannot hold is refused,
never bent.
"""

from __future__ import annotations

import json
from typing import TypeVar

from loraloop.episode import LICENSE_TAG, Episode, EpisodeDto
from loraloop.errors import StoreError
from loraloop.files import json_line

Stored = TypeVar("Stored", Episode, EpisodeDto)


def to_body(model: Episode | EpisodeDto) -> str:
    """`model` as one JSON text that `from_body` reads back equal, keys in their order.

    Only the two halves of one character that came apart, as in a stream of pieces, are put together again: JSON reads them as one.
    Raises StoreError when it holds what JSON cannot (NaN, infinity) or what is no valid value (`model_copy` checks nothing).
    """
    try:
        # not mode="json" and not model_dump_json: both turn some lone surrogates into U+FFFD, and the latter infinity into null
        return escape_surrogates(json_line(model.model_dump(warnings="error")))
    except (ValueError, TypeError) as error:  # pydantic's own serialization error is a ValueError
        raise StoreError(f"episode {model.id} cannot be stored as JSON: {error}; correct that value and append it again") from error


def from_body(kind: type[Stored], body: str | bytes) -> Stored:
    """What `to_body` made `body` of; raises ValueError when that was no `kind`."""
    # not model_validate_json: it refuses the escapes of lone surrogates
    return kind.model_validate(json.loads(body))


def follow(kept: Episode, episode: Episode, where: str) -> Episode | None:
    """What to keep instead of `kept` when `episode` comes with its id: None for the same, or for an earlier state of it.

    Raises StoreError when it neither equals nor continues what is there. Its place in the order and its terms stay.
    """
    if same_content(kept, episode):
        return None
    if not continues(kept, episode):
        if continues(episode, kept):
            return None
        raise StoreError(conflict(episode.id, where))
    terms = {tag: said for tag, said in kept.metadata.tags.items() if tag == LICENSE_TAG}
    tags = dict(sorted({**episode.metadata.tags, **terms}.items())) if terms else episode.metadata.tags
    said = {"created_at": kept.metadata.created_at, "tags": tags}
    return episode.model_copy(update={"metadata": episode.metadata.model_copy(update=said)})


def continues(earlier: Episode, later: Episode) -> bool:
    """True when `earlier` is open and `later` begins with all of its records; without records, with all of its messages.

    What was not known before may have come since: the group, the outcome, that it is over; what was known stays known.
    """
    same_run = (earlier.learn_model, earlier.task_id) == (later.learn_model, later.task_id)
    still_known = earlier.group_id in (None, later.group_id) and (earlier.outcome.is_unknown or not later.outcome.is_unknown)
    if earlier.records:
        begins = later.records[: len(earlier.records)] == earlier.records
    else:
        begins = later.messages[: len(earlier.messages)] == earlier.messages
    return earlier.is_open and same_run and still_known and begins


def same_content(one: Episode, other: Episode) -> bool:
    """True when both are equal to the letter but for `metadata.created_at`, which an importer sets to its present, and their terms."""
    return _content(one) == _content(other)


def conflict(episode_id: str, where: str) -> str:
    """The message for two different episodes with one id."""
    return (
        f"{where} has an episode {episode_id} already, with other content; episodes are never changed: "
        "give the new one an id of its own, or leave out `id`"
    )


def _content(episode: Episode) -> str:
    tags = {tag: said for tag, said in episode.metadata.tags.items() if tag != LICENSE_TAG}
    return to_body(episode.model_copy(update={"metadata": episode.metadata.model_copy(update={"created_at": 0, "tags": tags})}))


def escape_surrogates(text: str) -> str:
    """JSON text with lone surrogates, which UTF-8 cannot hold, as the escapes that JSON has for them; two halves are put together."""
    try:
        text.encode()
    except UnicodeEncodeError:
        joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        return joined.encode("utf-8", "backslashreplace").decode()
    return text
