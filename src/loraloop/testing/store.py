"""The conformance check of episode stores."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from loraloop.episode import (
    ActionRecord,
    Episode,
    EpisodeFilter,
    EpisodeMetadata,
    Failure,
    LlmCallRecord,
    Success,
    Timeout,
    Unknown,
)
from loraloop.errors import StoreError
from loraloop.plugins import EpisodeStore
from loraloop.testing.episodes import expect, make_episode
from loraloop.testing.store_changes import CHECKS_OF_CHANGES, expect_store_error


def check_store(open_store: Callable[[], EpisodeStore]) -> None:
    """Check that a store does all that `plugins.EpisodeStore` promises.

    `open_store` gives a new, empty store at every call; one that has a `close()` is closed after use.
    """
    for check in (
        _check_empty,
        _check_order,
        _check_append_again,
        _check_conflict,
        _check_open,
        _check_append_many,
        _check_filters,
        _check_times,
        _check_limit_and_offset,
        _check_long_iteration,
        _check_append_while_iterating,
        _check_kept_to_the_letter,
        _check_strange_text,
        _check_not_json,
        _check_not_shared,
        *CHECKS_OF_CHANGES,
    ):
        store = open_store()
        expect(isinstance(store, EpisodeStore), f"{type(store).__name__} has not all methods of loraloop.plugins.EpisodeStore")
        expect(store.count() == 0, "open_store() must give an empty store each time")
        try:
            check(store)
        finally:
            close = getattr(store, "close", None)
            if callable(close):
                close()


def _check_empty(store: EpisodeStore) -> None:
    missing = "ep-0000000000000-0123456789abcdef"
    expect(store.find(missing) is None, "find() of a missing id gives None")
    expect(store.find("no id at all; drop table'") is None, "find() of any text that is no id gives None")
    with expect_store_error("get() of a missing id", naming=missing):
        store.get(missing)
    expect(store.append_many([]) == [], "append_many([]) gives []")
    expect(store.query() == [] and store.list_meta() == [], "an empty store lists nothing")


def _check_order(store: EpisodeStore) -> None:
    ids = [f"ep-{number:013d}-00000000" for number in range(4)]
    early, late = [EpisodeMetadata(created_at=ms) for ms in (999, 1_000)]
    by_time = [make_episode(id=ids[3], metadata=early), *(make_episode(id=ids[n], metadata=late) for n in range(3))]
    for position in (2, 0, 3, 1):
        expect(store.append(by_time[position]) is True, "append() of a new episode gives True")
    expect(store.query() == by_time, "query() is ordered by created_at, then id")
    expect(list(store.iter_episodes()) == by_time, "iter_episodes() has the order of query()")
    expect(store.list_meta() == [episode.to_dto() for episode in by_time], "list_meta() gives to_dto() of each, in that order")
    expect(store.count() == len(by_time), "count() without a filter counts all")
    for episode in by_time:
        expect(store.get(episode.id) == episode and store.find(str(episode.id)) == episode, "get() and find() give what was appended")


def _check_append_again(store: EpisodeStore) -> None:
    first = _created(make_episode(), 5)
    store.append(first)
    expect(store.append(first) is False, "append() of the very same gives False")
    expect(store.append(_created(first, 77)) is False, "created_at alone does not make another episode")
    expect(store.query() == [first], "what came first stays as it is")


def _check_conflict(store: EpisodeStore) -> None:
    """One change at a time, in every part of an episode."""
    first = make_episode(tools=[{"b": 1, "a": 2}], metadata=EpisodeMetadata(created_at=5, tags={"split": "test"}))
    store.append(first)
    no_content = {"messages": [*first.messages[:2], {"role": "assistant", "content": None}]}
    changes: list[dict[str, Any]] = [
        {"messages": first.messages[:2]},
        no_content,
        {"outcome": Success(0.5)},
        {"outcome": Unknown()},
        {"task_id": None},
        {"group_id": "g"},
        {"learn_model": "worker_task"},
        {"tools": []},
        {"tools": [{"a": 2, "b": 1}]},
        {"records": [ActionRecord(action="boil", timestamp_ms=1)]},
        {"metadata": EpisodeMetadata(created_at=5)},
    ]
    for change in changes:
        with expect_store_error(f"append() of another episode with the same id, by {change}", naming=first.id):
            store.append(Episode.model_validate({**dict(first), **change}))
    expect(store.query() == [first], "a conflict leaves the store as it was")


def _check_open(store: EpisodeStore) -> None:
    """An open episode is continued and closed; a closed one never again."""
    records = [ActionRecord(action=action, timestamp_ms=number, task_id="egg") for number, action in enumerate(("look", "boil", "done"))]
    started = _created(make_episode(messages=(), records=records[:1], outcome=Unknown(), is_open=True), 5)
    other = _created(make_episode(), 6)
    store.append_many([started, other])
    more = started.model_copy(update={"records": tuple(records[:2])})
    whole = started.model_copy(update={"records": tuple(records), "outcome": Success(0.5), "is_open": False, "group_id": "g"})
    expect(store.append(_created(more, 77)) is True, "append() of what continues an open episode gives True")
    expect(store.query() == [more, other], "what continues an episode takes its place in the order")
    expect(store.append(started) is False, "append() of an earlier state of an open episode gives False")
    judged = more.model_copy(update={"outcome": Success(0.25)})
    expect(store.append(judged) is True and store.append(more) is False, "what is known of an open episode is added, and not undone")
    expect(store.get(started.id) == judged, "what is known of an open episode is added, and not undone")
    with expect_store_error("append() of another run with the id of an open episode", naming=started.id):
        store.append(started.model_copy(update={"records": tuple(records[1:])}))
    with expect_store_error("append() of another task with the id of an open episode", naming=started.id):
        store.append(whole.model_copy(update={"task_id": "ham"}))
    expect(store.append_many([whole, more, whole]) == [True, False, False], "append_many() continues, too, and knows what it was given")
    expect(store.query(EpisodeFilter(outcome="success", group_id="g")) == [whole], "filters find an episode as it is now")
    expect(store.list_meta() == [whole.to_dto(), other.to_dto()] and store.count() == 2, "an episode that was continued is still one")
    with expect_store_error("append() of what continues a closed episode", naming=started.id):
        store.append(whole.model_copy(update={"records": (*records, records[0])}))
    talk = make_episode(is_open=True, outcome=Unknown())
    longer = talk.model_copy(update={"messages": (*talk.messages, *talk.messages[1:]), "is_open": False})
    expect(store.append_many([talk, longer]) == [True, True], "an open episode of messages is continued by more messages")
    expect(store.get(talk.id) == longer, "an episode can begin and be continued in one batch")


def _check_append_many(store: EpisodeStore) -> None:
    old, new, other = [_created(make_episode(), n) for n in range(3)]
    store.append(old)
    expect(store.append_many([new, old, new, _created(new, 9)]) == [True, False, False, False], "append_many() says which were new")
    with expect_store_error("append_many() with a conflict", naming=old.id):
        store.append_many([other, old.model_copy(update={"task_id": "another"})])
    with expect_store_error("append_many() with a conflict within the batch", naming=other.id):
        store.append_many([other, other.model_copy(update={"task_id": "another"})])
    expect(store.query() == [old, new], "append_many() adds all or none")
    expect(store.append(other) is True, "after a refused batch the store goes on")


def _check_filters(store: EpisodeStore) -> None:
    plain = make_episode(task_id=None, outcome=Unknown())
    by_filter = [
        ({"learn_model": "worker_task"}, make_episode(task_id=None, outcome=Unknown(), learn_model="worker_task")),
        ({"scenario": "kitchen"}, make_episode(task_id=None, outcome=Unknown(), metadata=EpisodeMetadata(scenario="kitchen"))),
        ({"outcome": "success"}, make_episode(task_id=None, outcome=Success(0.0))),
        ({"outcome": Failure}, make_episode(task_id=None, outcome=Failure("burnt"))),
        ({"outcome": "timeout"}, make_episode(task_id=None, outcome=Timeout())),
        ({"task_id": "egg"}, make_episode(task_id="egg", outcome=Unknown())),
        ({"task_id": ""}, make_episode(task_id="", outcome=Unknown())),
        ({"group_id": "Käse'; --"}, make_episode(task_id=None, outcome=Unknown(), group_id="Käse'; --")),
    ]
    store.append_many([plain, *(episode for _, episode in by_filter)])
    for fields, episode in by_filter:
        wanted = EpisodeFilter.model_validate(fields)
        expect(store.query(wanted) == [episode], f"query({fields}) gives the one that matches")
        expect(store.list_meta(wanted) == [episode.to_dto()], f"list_meta({fields}) gives the one that matches")
        expect(store.count(wanted) == 1, f"count({fields}) counts the one that matches")
    expect(store.count(EpisodeFilter(task_id="EGG")) == 0, "filters tell capitals apart")
    expect(store.count(EpisodeFilter(task_id="egg", group_id="other")) == 0, "all fields of a filter must match")
    expect(store.count(EpisodeFilter()) == len(by_filter) + 1, "an empty filter lets all through")


def _check_times(store: EpisodeStore) -> None:
    store.append_many([_created(make_episode(), ms) for ms in (10, 20, 30)])

    def times(**fields: int) -> list[int]:
        return [episode.metadata.created_at for episode in store.iter_episodes(EpisodeFilter.model_validate(fields))]

    expect(times(since=20) == [20, 30], "since is inclusive")
    expect(times(until=20) == [10], "until is exclusive")
    expect(times(since=11, until=30) == [20], "since and until together are a span")
    expect(times(since=31) == [], "a span without episodes is empty")


def _check_limit_and_offset(store: EpisodeStore) -> None:
    episodes = [_created(make_episode(task_id=f"task-{n % 2}"), n) for n in range(6)]
    store.append_many(episodes)
    for limit, offset in ((0, 0), (2, 0), (2, 3), (9, 4), (None, 2), (3, 6), (None, 99)):
        wanted = EpisodeFilter(limit=limit, offset=offset)
        expected = episodes[offset : None if limit is None else offset + limit]
        expect(store.query(wanted) == expected, f"query() with limit {limit}, offset {offset}")
        expect(store.list_meta(wanted) == [episode.to_dto() for episode in expected], f"list_meta(), limit {limit}, offset {offset}")
        expect(store.count(wanted) == len(episodes), "count() does not look at limit and offset")
    odd = EpisodeFilter(task_id="task-1", limit=1, offset=1)
    expect(store.query(odd) == [episodes[3]], "limit and offset count matching episodes only")


def _check_long_iteration(store: EpisodeStore) -> None:
    """More than any page, many with one time."""
    episodes = [_created(make_episode(), n // 300) for n in range(700)]
    store.append_many(episodes[::-1])
    ids = [episode.id for episode in sorted(episodes, key=lambda episode: (episode.metadata.created_at, episode.id))]
    expect([episode.id for episode in store.iter_episodes()] == ids, "a long iteration misses and repeats nothing")
    some = EpisodeFilter(limit=450, offset=130)
    expect([meta.id for meta in store.list_meta(some)] == ids[130:580], "limit and offset hold over pages")


def _check_append_while_iterating(store: EpisodeStore) -> None:
    """Each step adds one before and one after; a half-used iterator may lie about meanwhile."""
    there = [_created(make_episode(), 1_000 + n) for n in range(250)]
    store.append_many(there)
    half_used = store.iter_episodes()
    next(half_used)
    seen = []
    for n, episode in enumerate(store.iter_episodes()):
        seen.append(episode.id)
        store.append_many([_created(make_episode(), n), _created(make_episode(), 10_000 + n)])
        expect(n < 2 * len(there), "an iteration ends even when each step appends")
    old = {episode.id for episode in there}
    expect([i for i in seen if i in old] == [episode.id for episode in there], "each episode that was there comes once, in order")
    expect(len(seen) == len(set(seen)), "no episode comes twice")
    expect(store.count() == len(there) + 2 * len(seen), "what was appended meanwhile is kept")
    expect({episode.id for episode in half_used} >= {episode.id for episode in there[1:]}, "a paused iteration goes on to its end")


def _check_kept_to_the_letter(store: EpisodeStore) -> None:
    call = {
        "id": "c1",
        "function": {"name": "boil", "arguments": '{"n":  1.0, "unit":"min" , "n": 2'},
    }  # as written, not valid JSON
    messages = [
        {"role": "user", "content": "", "author": "simulated_user"},
        {"role": "assistant", "content": None, "tool_calls": [call, call], "weight": 0.25},
        {"role": "assistant", "content": "", "tool_calls": [call], "is_demo": True},
        {"role": "tool", "content": "7", "tool_call_id": "c1", "name": "boil"},
    ]
    tools = [
        {
            "type": "function",
            "function": {"name": "boil", "parameters": {"z": 1, "a": [1.0, 10**30, None, True, {"y": 0, "b": 0}]}},
        }
    ]
    records = [
        ActionRecord(action="boil", success=False, error="no pot", tick=3, timestamp_ms=1, worker_id="w"),
        LlmCallRecord.model_validate({"messages": messages[:1], "response": messages[1], "tools": tools, "timestamp_ms": 2}),
    ]
    metadata = EpisodeMetadata(created_at=0, started_at=-5, ended_at=2**53 + 1, strategy="", tags={"z": "1", "a": ""})
    changes: dict[str, Any] = {"messages": messages, "tools": tools, "records": records, "metadata": metadata}
    for outcome in (Success(0.1 + 0.2), Failure("burnt"), Timeout(0.0), Timeout(None), Unknown()):
        episode = make_episode(outcome=outcome, **changes)
        store.append(episode)
        _expect_same(store.get(episode.id), episode)
        _expect_same(store.query(EpisodeFilter(outcome=outcome.kind))[-1], episode)
    contents = [message.content for message in episode.messages]
    expect(contents == ["", None, "", "7"], "make_episode keeps content None and '' apart")


def _check_strange_text(store: EpisodeStore) -> None:
    text = "naïve 日本語 \U0001f95a e\u0301 \u2028 \x00 \x7f \ufeff \\ \" ' % :x"
    episode = make_episode(task_id=text, group_id=text, metadata=EpisodeMetadata(scenario=text, tags={text: text}), tools=[{text: text}])
    episode = episode.model_copy(update={"messages": tuple(m.model_copy(update={"content": text}) for m in episode.messages)})
    store.append(episode)
    _expect_same(store.get(episode.id), episode)
    wanted = EpisodeFilter(task_id=text, group_id=text, scenario=text)
    expect(store.count(wanted) == 1, "any text can be filtered by")
    half = "cut \ud83e"  # half an emoji: JSON logs that were cut off have it
    for change in (
        {"messages": [{"role": "user", "content": half}]},
        {"tools": [{half: half}]},
        {"metadata": EpisodeMetadata(tags={half: half})},
        {"task_id": half},
    ):
        _check_kept_or_refused(store, make_episode(**change), f"a lone surrogate in {next(iter(change))}")


def _check_not_json(store: EpisodeStore) -> None:
    for number in (float("inf"), float("-inf"), float("nan")):
        _check_kept_or_refused(store, make_episode(tools=[{"default": number}]), f"the number {number}")
    expect(store.append(make_episode()) is True, "after a refusal the store goes on")


def _check_not_shared(store: EpisodeStore) -> None:
    episode = make_episode(metadata=EpisodeMetadata(tags={"split": "test"}))
    store.append(episode)
    episode.metadata.tags["split"] = "train"
    store.get(episode.id).metadata.tags["split"] = "train"
    next(iter(store.iter_episodes())).metadata.tags["split"] = "train"
    store.list_meta()[0].metadata.tags["split"] = "train"
    expect(store.get(episode.id).metadata.tags == {"split": "test"}, "changing an episode outside does not change what is kept")
    expect(store.list_meta()[0].metadata.tags == {"split": "test"}, "changing what list_meta() gave does not change what is kept")


def _check_kept_or_refused(store: EpisodeStore, episode: Episode, what: str) -> None:
    try:
        store.append(episode)
    except StoreError as error:
        expect(bool(str(error)), f"{what}: the error says something")
        expect(store.find(episode.id) is None, f"{what}: what was refused is not there")
    else:
        _expect_same(store.get(episode.id), episode)


def _created(episode: Episode, created_at: int) -> Episode:
    return episode.model_copy(update={"metadata": episode.metadata.model_copy(update={"created_at": created_at})})


def _expect_same(given: Episode, expected: Episode) -> None:
    """Equal to the letter: the order of keys too, and 1 is not 1.0."""
    expect(json.dumps(given.model_dump()) == json.dumps(expected.model_dump()), f"kept as it was: {expected!r}, not {given!r}")
