"""For tests, ours and those of people who write plug-ins: test data by factory, and one conformance check per kind of plug-in.

A `check_<kind>()` is a plain function that returns when all is well and raises AssertionError saying what is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
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
from loraloop.plugins import EpisodeStore, Importer
from loraloop.training_data import Refusal


def make_episode(**changes: Any) -> Episode:
    """A small valid episode, solved, of a system, a user and an assistant message; `changes` are fields to set otherwise."""
    messages = [
        {"role": "system", "content": "You are a careful cook."},
        {"role": "user", "content": "How long does an egg boil?"},
        {"role": "assistant", "content": "Seven minutes."},
    ]
    return Episode.model_validate({"task_id": "egg", "messages": messages, "outcome": Success(1.0), **changes})


# --- importers --------------------------------------------------------------------------------------------------------------


def check_importer(importer: Importer, own: Iterable[Path], others: Iterable[Path] = ()) -> None:
    """Check that an importer does all that `plugins.Importer` promises.

    `own` are files of its format, with at least one episode and one refusal among them; `others` are files of other formats.
    """
    _expect(bool(importer.name) and "\n" not in importer.description, "an importer has a name and a description of one line")
    read: list[Episode | Refusal] = []
    for path in own:
        _expect(importer.detect(path, _head(path)), f"{importer.name} recognises {path}")
        entries = list(importer.read(path))
        n_entries = importer.count(path)
        _expect(n_entries in {None, len(entries)}, f"count() of {path} is {n_entries}, and read() gives {len(entries)} entries")
        _expect(_without_time(entries) == _without_time(importer.read(path)), f"reading {path} again gives the same entries, same ids")
        read += entries
    for entry in read:
        if isinstance(entry, Refusal):
            marks = (": found ", "; expected ", "; do this: ")
            _expect(all(mark in entry.detail for mark in marks), f"a refusal says found, expected, do this: {entry.detail}")
        else:
            _expect(entry.id.timestamp_ms == 0, f"the id of an imported episode follows from its content, not from the time: {entry.id}")
            _expect(entry.metadata.tags.get("format") == importer.name, f"an episode is tagged with its format: {entry.metadata.tags}")
            _expect(bool(entry.messages or entry.records), "an episode has messages or records")
    kinds = {type(entry) for entry in read}
    _expect(kinds == {Episode, Refusal}, f"the files of {importer.name} give episodes and refusals, not only {kinds}")
    for path in others:
        _expect(not importer.detect(path, _head(path)), f"{importer.name} does not take {path} for its own")


def _head(path: Path) -> str:
    return path.read_bytes()[: 64 * 1024].decode("utf-8-sig", errors="replace")


def _without_time(entries: Iterable[Episode | Refusal]) -> list[Episode | Refusal]:
    return [_created(entry, 0) if isinstance(entry, Episode) else entry for entry in entries]


# --- stores -----------------------------------------------------------------------------------------------------------------


def check_store(open_store: Callable[[], EpisodeStore]) -> None:
    """Check that a store does all that `plugins.EpisodeStore` promises.

    `open_store` gives a new, empty store at every call; one that has a `close()` is closed after use.
    """
    for check in (
        _check_empty,
        _check_order,
        _check_append_again,
        _check_conflict,
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
    ):
        store = open_store()
        _expect(isinstance(store, EpisodeStore), f"{type(store).__name__} has not all methods of loraloop.plugins.EpisodeStore")
        _expect(store.count() == 0, "open_store() must give an empty store each time")
        try:
            check(store)
        finally:
            close = getattr(store, "close", None)
            if callable(close):
                close()


def _check_empty(store: EpisodeStore) -> None:
    missing = "ep-0000000000000-0123456789abcdef"
    _expect(store.find(missing) is None, "find() of a missing id gives None")
    _expect(store.find("no id at all; drop table'") is None, "find() of any text that is no id gives None")
    with _expect_store_error("get() of a missing id", naming=missing):
        store.get(missing)
    _expect(store.append_many([]) == [], "append_many([]) gives []")
    _expect(store.query() == [] and store.list_meta() == [], "an empty store lists nothing")


def _check_order(store: EpisodeStore) -> None:
    ids = [f"ep-{number:013d}-00000000" for number in range(4)]
    early, late = [EpisodeMetadata(created_at=ms) for ms in (999, 1_000)]
    by_time = [make_episode(id=ids[3], metadata=early), *(make_episode(id=ids[n], metadata=late) for n in range(3))]
    for position in (2, 0, 3, 1):
        _expect(store.append(by_time[position]) is True, "append() of a new episode gives True")
    _expect(store.query() == by_time, "query() is ordered by created_at, then id")
    _expect(list(store.iter_episodes()) == by_time, "iter_episodes() has the order of query()")
    _expect(store.list_meta() == [episode.to_dto() for episode in by_time], "list_meta() gives to_dto() of each, in that order")
    _expect(store.count() == len(by_time), "count() without a filter counts all")
    for episode in by_time:
        _expect(store.get(episode.id) == episode and store.find(str(episode.id)) == episode, "get() and find() give what was appended")


def _check_append_again(store: EpisodeStore) -> None:
    first = _created(make_episode(), 5)
    store.append(first)
    _expect(store.append(first) is False, "append() of the very same gives False")
    _expect(store.append(_created(first, 77)) is False, "created_at alone does not make another episode")
    _expect(store.query() == [first], "what came first stays as it is")


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
        with _expect_store_error(f"append() of another episode with the same id, by {change}", naming=first.id):
            store.append(Episode.model_validate({**dict(first), **change}))
    _expect(store.query() == [first], "a conflict leaves the store as it was")


def _check_append_many(store: EpisodeStore) -> None:
    old, new, other = [_created(make_episode(), n) for n in range(3)]
    store.append(old)
    _expect(store.append_many([new, old, new, _created(new, 9)]) == [True, False, False, False], "append_many() says which were new")
    with _expect_store_error("append_many() with a conflict", naming=old.id):
        store.append_many([other, old.model_copy(update={"task_id": "another"})])
    with _expect_store_error("append_many() with a conflict within the batch", naming=other.id):
        store.append_many([other, other.model_copy(update={"task_id": "another"})])
    _expect(store.query() == [old, new], "append_many() adds all or none")
    _expect(store.append(other) is True, "after a refused batch the store goes on")


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
        _expect(store.query(wanted) == [episode], f"query({fields}) gives the one that matches")
        _expect(store.list_meta(wanted) == [episode.to_dto()], f"list_meta({fields}) gives the one that matches")
        _expect(store.count(wanted) == 1, f"count({fields}) counts the one that matches")
    _expect(store.count(EpisodeFilter(task_id="EGG")) == 0, "filters tell capitals apart")
    _expect(store.count(EpisodeFilter(task_id="egg", group_id="other")) == 0, "all fields of a filter must match")
    _expect(store.count(EpisodeFilter()) == len(by_filter) + 1, "an empty filter lets all through")


def _check_times(store: EpisodeStore) -> None:
    store.append_many([_created(make_episode(), ms) for ms in (10, 20, 30)])

    def times(**fields: int) -> list[int]:
        return [episode.metadata.created_at for episode in store.iter_episodes(EpisodeFilter.model_validate(fields))]

    _expect(times(since=20) == [20, 30], "since is inclusive")
    _expect(times(until=20) == [10], "until is exclusive")
    _expect(times(since=11, until=30) == [20], "since and until together are a span")
    _expect(times(since=31) == [], "a span without episodes is empty")


def _check_limit_and_offset(store: EpisodeStore) -> None:
    episodes = [_created(make_episode(task_id=f"task-{n % 2}"), n) for n in range(6)]
    store.append_many(episodes)
    for limit, offset in ((0, 0), (2, 0), (2, 3), (9, 4), (None, 2), (3, 6), (None, 99)):
        wanted = EpisodeFilter(limit=limit, offset=offset)
        expected = episodes[offset : None if limit is None else offset + limit]
        _expect(store.query(wanted) == expected, f"query() with limit {limit}, offset {offset}")
        _expect(store.list_meta(wanted) == [episode.to_dto() for episode in expected], f"list_meta(), limit {limit}, offset {offset}")
        _expect(store.count(wanted) == len(episodes), "count() does not look at limit and offset")
    odd = EpisodeFilter(task_id="task-1", limit=1, offset=1)
    _expect(store.query(odd) == [episodes[3]], "limit and offset count matching episodes only")


def _check_long_iteration(store: EpisodeStore) -> None:
    """More than any page, many with one time."""
    episodes = [_created(make_episode(), n // 300) for n in range(700)]
    store.append_many(episodes[::-1])
    ids = [episode.id for episode in sorted(episodes, key=lambda episode: (episode.metadata.created_at, episode.id))]
    _expect([episode.id for episode in store.iter_episodes()] == ids, "a long iteration misses and repeats nothing")
    some = EpisodeFilter(limit=450, offset=130)
    _expect([meta.id for meta in store.list_meta(some)] == ids[130:580], "limit and offset hold over pages")


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
        _expect(n < 2 * len(there), "an iteration ends even when each step appends")
    old = {episode.id for episode in there}
    _expect([i for i in seen if i in old] == [episode.id for episode in there], "each episode that was there comes once, in order")
    _expect(len(seen) == len(set(seen)), "no episode comes twice")
    _expect(store.count() == len(there) + 2 * len(seen), "what was appended meanwhile is kept")
    _expect({episode.id for episode in half_used} >= {episode.id for episode in there[1:]}, "a paused iteration goes on to its end")


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
    _expect(contents == ["", None, "", "7"], "make_episode keeps content None and '' apart")


def _check_strange_text(store: EpisodeStore) -> None:
    text = "naïve 日本語 \U0001f95a e\u0301 \u2028 \x00 \x7f \ufeff \\ \" ' % :x"
    episode = make_episode(task_id=text, group_id=text, metadata=EpisodeMetadata(scenario=text, tags={text: text}), tools=[{text: text}])
    episode = episode.model_copy(update={"messages": tuple(m.model_copy(update={"content": text}) for m in episode.messages)})
    store.append(episode)
    _expect_same(store.get(episode.id), episode)
    wanted = EpisodeFilter(task_id=text, group_id=text, scenario=text)
    _expect(store.count(wanted) == 1, "any text can be filtered by")
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
    _expect(store.append(make_episode()) is True, "after a refusal the store goes on")


def _check_not_shared(store: EpisodeStore) -> None:
    episode = make_episode(metadata=EpisodeMetadata(tags={"split": "test"}))
    store.append(episode)
    episode.metadata.tags["split"] = "train"
    store.get(episode.id).metadata.tags["split"] = "train"
    next(iter(store.iter_episodes())).metadata.tags["split"] = "train"
    store.list_meta()[0].metadata.tags["split"] = "train"
    _expect(store.get(episode.id).metadata.tags == {"split": "test"}, "changing an episode outside does not change what is kept")
    _expect(store.list_meta()[0].metadata.tags == {"split": "test"}, "changing what list_meta() gave does not change what is kept")


def _check_kept_or_refused(store: EpisodeStore, episode: Episode, what: str) -> None:
    try:
        store.append(episode)
    except StoreError as error:
        _expect(bool(str(error)), f"{what}: the error says something")
        _expect(store.find(episode.id) is None, f"{what}: what was refused is not there")
    else:
        _expect_same(store.get(episode.id), episode)


def _created(episode: Episode, created_at: int) -> Episode:
    return episode.model_copy(update={"metadata": episode.metadata.model_copy(update={"created_at": created_at})})


def _expect_same(given: Episode, expected: Episode) -> None:
    """Equal to the letter: the order of keys too, and 1 is not 1.0."""
    _expect(json.dumps(given.model_dump()) == json.dumps(expected.model_dump()), f"kept as it was: {expected!r}, not {given!r}")


def _expect(is_so: bool, what: str) -> None:
    """As `assert`, which `python -O` would leave out."""
    if not is_so:
        raise AssertionError(what)


@contextmanager
def _expect_store_error(what: str, naming: str) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        _expect(naming in str(error), f"{what}: the StoreError names {naming}, not only: {error}")
    else:
        raise AssertionError(f"{what} raises StoreError")
