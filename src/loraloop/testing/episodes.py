"""Episodes and records for tests, plain ones and odd ones."""

from __future__ import annotations

from typing import Any

from loraloop.episode import (
    ActionRecord,
    AnyOutcome,
    AnyRecord,
    DependencyGraphRecord,
    Episode,
    EpisodeMetadata,
    Failure,
    LlmCallRecord,
    Message,
    Success,
    Timeout,
    Unknown,
)


def make_episode(**changes: Any) -> Episode:
    """A small valid episode, solved, of a system, a user and an assistant message; `changes` are fields to set otherwise."""
    messages = [
        {"role": "system", "content": "You are a careful cook."},
        {"role": "user", "content": "How long does an egg boil?"},
        {"role": "assistant", "content": "Seven minutes."},
    ]
    return Episode.model_validate({"task_id": "egg", "messages": messages, "outcome": Success(1.0), **changes})


def make_records() -> list[AnyRecord]:
    """Records of every kind in the order of their times: tasks and workers interleaved, one task run twice, the last one left open."""
    question = Message(role="user", content="How long does an egg boil?")
    answer = Message(role="assistant", content="Seven minutes.")
    more = Message(role="user", content="And hard?")
    actions = [
        {"action": "look", "target": "box", "output": "a ball", "task_id": "a", "worker_id": "w1"},
        {"action": "heartbeat", "worker_id": "w1"},
        {"action": "look", "target": "shelf", "output": "a cup", "task_id": "b", "worker_id": "w2"},
        {"action": "take", "success": False, "error": "too heavy", "task_id": "a", "worker_id": "w1"},
        {"action": "push", "target": "box", "task_id": "a", "worker_id": "w1"},
        {"action": "done", "task_id": "a", "worker_id": "w1", "group_id": "g"},
        {"action": "take", "target": "cup", "task_id": "b", "worker_id": "w2"},
        {"action": "look", "target": "bag", "task_id": "a", "worker_id": "w2"},
        {"action": "done", "success": False, "error": "wrong cup", "task_id": "b", "worker_id": "w1"},
        {"action": "done", "task_id": "a", "worker_id": "w2"},
        {"action": "look", "target": "roof", "task_id": "c", "worker_id": "w1"},
    ]
    calls = [
        {"messages": [question], "response": answer, "task_id": "egg"},
        {"messages": [question], "response": answer},
        {"messages": [question], "response": answer, "task_id": "egg", "error": "503"},
        {"messages": [question, answer, more], "response": Message(role="assistant", content="Ten."), "task_id": "egg"},
    ]
    graph = {"prompt": "Order: find, cut", "response": "find, cut", "available_actions": ["cut", "find"], "discover_order": ["find", "cut"]}
    records: list[AnyRecord] = [ActionRecord.model_validate(fields) for fields in actions]
    records[3:3] = [LlmCallRecord.model_validate(fields) for fields in calls[:2]]
    records[8:8] = [LlmCallRecord.model_validate(fields) for fields in calls[2:]]
    records.insert(6, DependencyGraphRecord.model_validate(graph))
    records += [ActionRecord(action="done", task_id="egg")]
    return [record.model_copy(update={"timestamp_ms": 1_000 + 10 * number}) for number, record in enumerate(records)]


def make_odd_episodes() -> list[Episode]:
    """Episodes that a learn model must take without raising: each outcome, with and without messages and records, and odd turns."""
    ask, answer = Message(role="user", content="Go on."), Message(role="assistant", content="Done.")
    call = {"function": {"name": "look", "arguments": "no json"}}
    talks: list[tuple[Message | dict[str, Any], ...]] = [
        (),
        (answer,),
        (ask,),
        (ask, answer),
        (ask, answer, ask),
        (ask, answer.model_copy(update={"is_demo": True})),
        (ask, answer.model_copy(update={"author": "simulated_user"})),
        (ask, answer.model_copy(update={"weight": 0.0})),
        (ask, {"role": "assistant", "content": None}),
        (ask, {"role": "assistant", "tool_calls": [call, call]}, {"role": "tool", "content": "7", "tool_call_id": "odd"}, answer),
        (ask, {"role": "assistant", "tool_calls": [call, call]}),
        (ask.model_copy(update={"content": "cut \ud83e"}), answer),
    ]
    records = make_records()
    rewritten = LlmCallRecord(messages=(ask.model_copy(update={"content": "In short: an egg."}),), response=answer, task_id="egg")
    contents: list[dict[str, Any]] = [{"messages": talk} for talk in talks]
    contents += [{"messages": (), "records": records[:n]} for n in (1, 4, len(records))]
    contents += [{"messages": (), "records": [record]} for record in records[::3]]
    contents += [{"records": [record for record in records if isinstance(record, LlmCallRecord)] + [rewritten]}]
    contents += [{"tools": [{"z": float("inf"), "a": None}]}, {"metadata": EpisodeMetadata(tags={"weight": "0"})}]
    contents += [{"task_id": None, "group_id": group} for group in (None, "g")]
    ends: list[AnyOutcome] = [Success(), Success(0.5), Success(0.0), Success(7.0), Failure("burnt"), Timeout(0.25), Timeout(), Unknown()]
    made = [{"outcome": outcome, "is_open": False, **content} for content in contents for outcome in ends]
    made += [{"is_open": True, "outcome": outcome} for outcome in ends]
    return [make_episode(id=f"ep-{number:013d}-00000000", **fields) for number, fields in enumerate(made)]


def expect(is_so: bool, what: str) -> None:
    """As `assert`, which `python -O` would leave out."""
    if not is_so:
        raise AssertionError(what)
