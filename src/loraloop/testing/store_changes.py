"""The conformance checks of what changes an episode store: labels and forgetting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loraloop.episode import (
    LICENSE_TAG,
    RECORDED,
    ActionRecord,
    Episode,
    EpisodeFilter,
    EpisodeMetadata,
    Failure,
    Label,
    Outcome,
    Success,
    Timeout,
    Unknown,
)
from loraloop.errors import StoreError
from loraloop.plugins import EpisodeStore
from loraloop.testing.episodes import expect, make_episode


@contextmanager
def expect_store_error(what: str, naming: str) -> Iterator[None]:
    """Raise AssertionError unless the block raises a StoreError that has `naming` in its message."""
    try:
        yield
    except StoreError as error:
        expect(naming in str(error), f"{what}: the StoreError names {naming}, not only: {error}")
    else:
        raise AssertionError(f"{what} raises StoreError")


def _check_labels(store: EpisodeStore) -> None:
    """The newest counts everywhere, and all are kept."""
    first, other = [_created(make_episode(outcome=Unknown()), ms) for ms in (5, 6)]
    store.append_many([first, other])
    recorded = Label(episode_id=first.id, outcome=Unknown(), at=5, source=RECORDED)
    expect(store.get_labels(first.id) == [recorded], "get_labels() begins with what was recorded")
    said = [
        Label(episode_id=first.id, outcome=outcome, at=at, source="judge", comment="half a pot \ud83e")
        for at, outcome in ((9, Success(0.1 + 0.2)), (7, Failure("burnt")), (8, Timeout(0.5)))
    ]
    for number, label in enumerate(said):
        store.add_labels([label])
        expect(store.get(first.id) == _ended(first, label.outcome), "get() gives the outcome that was said last, whenever it is dated")
        expect(store.list_meta()[0] == _ended(first, label.outcome).to_dto(), "list_meta() gives it, too")
        expect(store.query(EpisodeFilter(outcome=label.outcome.kind)) == [_ended(first, label.outcome)], "filters find it")
        expect(store.get_labels(first.id) == [recorded, *said[: number + 1]], "get_labels() gives all, in the order they were said")
    expect(store.get(other.id) == other and store.count(EpisodeFilter(outcome="unknown")) == 1, "other episodes stay as they are")
    expect(store.append(first) is False, "an episode is compared as it was recorded, whatever its labels")
    with expect_store_error("append() of an episode with a label as its own outcome", naming=first.id):
        store.append(_ended(first, said[-1].outcome))
    missing = "ep-0000000000000-0123456789abcdef"
    with expect_store_error("add_labels() of a missing id", naming=missing):
        store.add_labels([Label(episode_id=other.id, outcome=Success(1.0)), said[0].model_copy(update={"episode_id": missing})])
    expect(store.get(other.id) == other and len(store.get_labels(other.id)) == 1, "add_labels() adds all or none")
    with expect_store_error("get_labels() of a missing id", naming=missing):
        store.get_labels(missing)
    store.add_labels([])
    both = [Label(episode_id=each.id, outcome=Success(score), at=10) for score, each in ((0.1, other), (0.2, first), (0.3, other))]
    store.add_labels(both)
    expect([each.outcome for each in store.list_meta()] == [Success(0.2), Success(0.3)], "labels of one call count in their order")


def _check_terms(store: EpisodeStore) -> None:
    """Terms are no content: they are said by a label, and count from then on."""
    bare, whole = make_episode(outcome=Unknown()), make_episode(outcome=Success(1.0))
    store.append_many([bare, _under(whole, "MIT")])
    expect(store.get(whole.id) == _under(whole, "MIT"), "the tag `license` is kept as any other")
    known = [bare, _under(bare, "MIT"), whole, _under(whole, "Apache-2.0")]
    expect(store.append_many(known) == [False] * 4, "an episode is the same under whatever terms")
    expect(store.get(bare.id) == bare and store.get(whole.id) == _under(whole, "MIT"), "append() changes the terms of none")
    store.add_labels([Label(episode_id=bare.id, outcome=Success(0.5)), Label(episode_id=bare.id, outcome=Unknown(), license="MIT")])
    expect(store.get(bare.id) == _ended(_under(bare, "MIT"), Success(0.5)), "a label of terms sets them, and leaves the outcome")
    expect(store.list_meta(EpisodeFilter(outcome="success", limit=9)).count(store.get(bare.id).to_dto()) == 1, "list_meta() gives them")
    said = [(label.outcome, label.license) for label in store.get_labels(bare.id)]
    expect(said == [(Unknown(), None), (Success(0.5), None), (Success(0.5), "MIT")], "get_labels() tells the terms, and the outcome then")
    store.add_labels([Label(episode_id=bare.id, outcome=Failure("burnt"))])
    expect(store.get(bare.id) == _ended(_under(bare, "MIT"), Failure("burnt")), "the terms stay when an outcome is said")
    expect(store.append(bare) is False, "an episode with terms by a label is known")
    begun = make_episode(messages=(), records=[ActionRecord(action="look", timestamp_ms=0)], outcome=Unknown(), is_open=True)
    store.append(begun)
    store.add_labels([Label(episode_id=begun.id, outcome=Unknown(), license="own")])
    ended = begun.model_copy(update={"is_open": False})
    expect(store.append(ended) is True and store.get(begun.id) == _under(ended, "own"), "the terms stay when an episode goes on")


def _under(episode: Episode, terms: str) -> Episode:
    tags = dict(sorted({**episode.metadata.tags, LICENSE_TAG: terms}.items()))
    return episode.model_copy(update={"metadata": episode.metadata.model_copy(update={"tags": tags})})


def _check_labels_of_open_episodes(store: EpisodeStore) -> None:
    """A label stays when an episode goes on, until the recording itself says how it ended."""
    records = [ActionRecord(action=action, timestamp_ms=number) for number, action in enumerate(("look", "boil", "done"))]
    begun = make_episode(messages=(), records=records[:1], outcome=Unknown(), is_open=True)
    store.append(begun)
    store.add_labels([Label(episode_id=begun.id, outcome=Success(0.5))])
    more = begun.model_copy(update={"records": tuple(records[:2])})
    expect(store.append(more) is True, "an episode with a label is continued")
    expect(store.get(begun.id) == _ended(more, Success(0.5)), "a label stays when an episode goes on")
    expect(store.append(begun) is False and store.append(more) is False, "what is there, or was before, is known")
    whole = _ended(more, Failure("burnt")).model_copy(update={"records": tuple(records), "is_open": False})
    expect(store.append(whole) is True and store.get(begun.id) == whole, "what is recorded after a label is newer than it")
    outcomes = [label.outcome for label in store.get_labels(begun.id)]
    expect(outcomes == [Unknown(), Success(0.5), Failure("burnt")], "get_labels() has what was recorded later, too")
    expect(store.append(whole) is False, "an episode that was continued after a label is known")


def _check_forget(store: EpisodeStore) -> None:
    policy = {"role": "system", "content": "Ask first. " * 200}
    kept, gone, third = [_created(make_episode(messages=[policy, *_talk(word)]), 5) for word in ("egg", "ham", "rice")]
    store.append_many([kept, gone, third])
    store.add_labels([Label(episode_id=gone.id, outcome=Success(0.5))])
    expect(store.find_forgotten([kept, gone]) == [False, False], "nothing is forgotten that nobody asked for")
    missing = "ep-0000000000000-0123456789abcdef"
    expect(store.forget([gone.id, missing, gone.id]) == 1, "forget() says how many were there")
    expect(store.find(gone.id) is None and store.count() == 2, "forget() removes an episode")
    expect({each.id for each in store.iter_episodes()} == {kept.id, third.id}, "iterations do not give it")
    expect(store.get(kept.id) == kept, "what others have in common with it stays")
    with expect_store_error("get_labels() of a forgotten episode", naming=gone.id):
        store.get_labels(gone.id)
    copy = gone.model_copy(update={"id": make_episode().id, "task_id": "another"})
    by_id = make_episode(id=missing)
    expect(store.append_many([gone, copy, by_id]) == [False] * 3, "append() keeps out what has a forgotten id or content")
    expect(store.count() == 2, "what is kept out is not there")
    expect(store.find_forgotten([gone, copy, by_id, kept]) == [True, True, True, False], "find_forgotten() tells which are kept out")
    expect(store.append(third) is False and store.append(make_episode()) is True, "others come and stay as ever")
    store.readmit([gone])
    expect(store.append(gone) is True and store.get(gone.id) == gone, "readmit() lets it in again")
    expect(len(store.get_labels(gone.id)) == 1, "its labels do not come back")
    expect(store.forget([third.id], by_content=False) == 1, "forget() by id alone removes, too")
    copy = third.model_copy(update={"id": make_episode().id})
    expect(store.append_many([third, copy]) == [False, True], "forget() without by_content keeps out the id alone")
    expect(store.forget([]) == 0, "forget([]) forgets nothing")


def _talk(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Boil the {word}. " * 60}, {"role": "assistant", "content": f"The {word} is done."}]


def _ended(episode: Episode, outcome: Outcome) -> Episode:
    return episode.model_copy(update={"outcome": outcome})


def _created(episode: Episode, created_at: int) -> Episode:
    return episode.model_copy(update={"metadata": EpisodeMetadata(created_at=created_at)})


CHECKS_OF_CHANGES = (_check_labels, _check_terms, _check_labels_of_open_episodes, _check_forget)
