"""What went through the router, as episodes: joined, to the letter, with how they ended; whatever happens meanwhile."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from upstream import CALL, VERSION, OneRoute, Upstream, serving, wait_for

from loraloop.episode import Failure, LlmCallRecord, Success, Timeout, Unknown
from loraloop.learn.conversation import ConversationLearn
from loraloop.serve.capture import CaptureSettings, Recorder
from loraloop.serve.relay import RouterSettings
from loraloop.serve.router import create_app
from loraloop.store.sql import SqlEpisodeStore
from loraloop.training_data import TrainingData

TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
    }
]
OPENING = [{"role": "system", "content": "You know the weather."}, {"role": "user", "content": "Oslo?"}]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlEpisodeStore]:
    with SqlEpisodeStore(tmp_path / "episodes.db") as opened:
        yield opened


@pytest.fixture
def recorder(tmp_path: Path, store: SqlEpisodeStore) -> Iterator[Recorder]:
    with recording(tmp_path, store) as recorder:
        yield recorder


@pytest.fixture
def client(recorder: Recorder) -> Iterator[openai.OpenAI]:
    with routed(recorder) as client:
        yield client


@contextmanager
def recording(folder: Path, store: SqlEpisodeStore, *, on_outcome=None, **settings) -> Iterator[Recorder]:
    settings = CaptureSettings(**{"store_seconds": 0.05, **settings})
    recorder = Recorder(folder / "capture", store, on_outcome=on_outcome, settings=settings)
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.close()


@contextmanager
def routed(recorder: Recorder) -> Iterator[openai.OpenAI]:
    with (
        serving(Upstream().app) as url,
        serving(create_app(OneRoute(url), recorder, RouterSettings(token="t"))) as router,
        openai.OpenAI(base_url=f"{router}/v1", api_key="t", max_retries=0) as client,
    ):
        yield client


def converse(client: openai.OpenAI, *, streams: bool, **more) -> list:
    """Three turns with a tool call, as an agent's loop has them: what was sent and answered, in order."""
    messages = list(OPENING)
    ask(client, messages, streams=streams, **more)
    messages.append({"role": "tool", "tool_call_id": messages[-1]["tool_calls"][0]["id"], "content": "rain"})
    ask(client, messages, streams=streams, **more)
    messages.append({"role": "user", "content": "Thanks!"})
    ask(client, messages, streams=streams, tools=openai.NOT_GIVEN, **more)
    return messages


def ask(client: openai.OpenAI, messages: list, *, streams: bool, **more) -> None:
    more = {"model": "agent", "messages": messages, "tools": TOOLS, **more}
    if streams:
        with client.chat.completions.stream(**more) as stream:
            said = stream.get_final_completion().choices[0].message
    else:
        said = client.chat.completions.create(**more).choices[0].message
    answer = {"role": "assistant", "content": said.content}
    if said.tool_calls:
        calls = [(call.id, call.function) for call in said.tool_calls]
        answer["tool_calls"] = [
            {"id": each, "type": "function", "function": {"name": function.name, "arguments": function.arguments}}
            for each, function in calls
        ]
    messages.append(answer)


def tell(client: openai.OpenAI, episode: str, said: dict):
    return client._client.post(
        f"{str(client.base_url).removesuffix('/v1/')}/episodes/{episode}/outcome", json=said, headers={"authorization": "Bearer t"}
    )


def record_of(client: openai.OpenAI, record: str):
    return client._client.get(f"{str(client.base_url).removesuffix('/v1/')}/records/{record}", headers={"authorization": "Bearer t"})


def stored(store: SqlEpisodeStore, n_records: int) -> list:
    """The episodes, once so many calls are among them."""
    wait_for(lambda: sum(len(episode.records) for episode in store.query()) >= n_records)
    return store.query()


@pytest.mark.parametrize("streams", [False, True])
def test_a_conversation_of_a_real_client_is_one_episode_to_the_letter_and_trains(client, store, streams):
    messages = converse(client, streams=streams)
    assert messages[2]["tool_calls"] == [CALL]
    (episode,) = stored(store, 3)
    assert [message.to_openai() for message in episode.messages] == messages
    assert [record.tools for record in episode.records] == [tuple(TOOLS), tuple(TOOLS), ()]
    assert [record.served.finish_reason for record in episode.records] == ["tool_calls", "stop", "stop"]
    assert {record.model for record in episode.records} == {VERSION.name}
    assert episode.is_open
    assert tell(client, episode.id, {"kind": "success", "score": 0.75}).status_code == 200
    wait_for(lambda: not store.get(episode.id).is_open)
    closed = store.get(episode.id)
    assert closed.outcome == Success(0.75), "it is not over before its outcome is known"
    sample = ConversationLearn().convert(closed)
    assert isinstance(sample, TrainingData)
    assert [message.to_openai() for message in sample.messages] == messages


def test_the_episode_that_a_client_names_holds_whatever_it_says(client, store):
    for number in range(2):
        client.chat.completions.create(
            model="agent", messages=[{"role": "user", "content": f"{number}"}], extra_headers={"X-Loraloop-Episode": "mine-1"}
        )
    other = client.with_options(base_url=str(client.base_url).replace("/v1/", "/e/mine-2/v1/"))
    raw = other.chat.completions.with_raw_response.create(model="agent", messages=OPENING)
    assert raw.headers["x-loraloop-episode"] == "mine-2"
    assert {episode.id: len(episode.records) for episode in stored(store, 3)} == {"mine-1": 2, "mine-2": 1}


def test_two_attempts_that_say_the_same_side_by_side_stay_two(client, store):
    one, other = list(OPENING), list(OPENING)
    for messages in (one, other):
        ask(client, messages, streams=False)
    for messages in (one, other):
        messages.append({"role": "tool", "tool_call_id": "call_1", "content": "rain"})
        ask(client, messages, streams=False)
    assert [len(episode.records) for episode in stored(store, 4)] == [2, 2]


def test_a_call_that_is_made_again_stays_with_its_episode(client, store):
    messages = list(OPENING)
    ask(client, messages, streams=False)
    messages.append({"role": "tool", "tool_call_id": "call_1", "content": "rain"})
    for _ in range(2):
        ask(client, list(messages), streams=False)
    assert [len(episode.records) for episode in stored(store, 3)] == [3]


def test_a_record_can_be_asked_for_with_what_the_server_told_of_its_tokens(client):
    raw = client.chat.completions.with_raw_response.create(model="agent", messages=OPENING, logprobs=True, temperature=0.5)
    record = raw.headers["x-loraloop-record"]
    wait_for(lambda: record_of(client, record).status_code == 200)
    (found,) = record_of(client, record).json()["records"]
    assert found["served"] == {
        "id": record,
        "choice": 0,
        "alias": "agent",
        "api": "chat/completions",
        "finish_reason": "stop",
        "token_ids": [5, 6],
        "log_probs": [-0.25, -1.5],
        "parameters": {"logprobs": True, "temperature": 0.5},
    }
    assert record_of(client, "rec-0000000000000-00000000").status_code == 404


def test_outcomes_come_at_any_time_and_keep_their_history(client, store):
    ask(client, list(OPENING), streams=False, extra_headers={"X-Loraloop-Episode": "mine"})
    for said in (
        {"kind": "timeout", "partial_score": 0.5},
        {"kind": "failure", "reason": "wrong city", "comment": "Bergen"},
        {"comment": "hm"},
    ):
        assert tell(client, "mine", said).json() == {"episode": "mine", "state": "recorded"}
    stored(store, 1)
    wait_for(lambda: len(store.get_labels("mine")) == 4)
    labels = store.get_labels("mine")
    assert [label.outcome for label in labels] == [Unknown(), Timeout(0.5), Failure("wrong city"), Failure("wrong city")]
    assert [label.comment for label in labels] == ["", "", "Bergen", "hm"]
    assert store.get("mine").outcome == Failure("wrong city")


def test_an_outcome_of_nothing_or_without_meaning_is_refused(client):
    assert tell(client, "never-heard-of", {"kind": "success"}).status_code == 404
    for said in (
        {},
        {"kind": "won"},
        {"kind": "success", "score": "high"},
        {"kind": "unknown"},
        {"kind": "success", "score": 1, "more": 1},
    ):
        response = tell(client, "never-heard-of", said)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "bad_outcome")


def test_who_answered_is_told_with_the_outcome(tmp_path, store):
    told = []
    with (
        recording(tmp_path, store, on_outcome=lambda versions, outcome: told.append((versions, outcome))) as recorder,
        routed(recorder) as client,
    ):
        ask(client, list(OPENING), streams=False, extra_headers={"X-Loraloop-Episode": "mine"})
        tell(client, "mine", {"comment": "no outcome yet"})
        tell(client, "mine", {"kind": "failure", "reason": "no"})
    assert told == [(frozenset({VERSION.name}), Failure("no"))]


def test_what_comes_after_the_end_is_another_part(client, store):
    named = {"extra_headers": {"X-Loraloop-Episode": "mine"}}
    ask(client, list(OPENING), streams=False, **named)
    tell(client, "mine", {"kind": "success"})
    ask(client, list(OPENING), streams=False, **named)
    stored(store, 2)
    wait_for(lambda: not store.get("mine").is_open)
    assert [(episode.id, episode.is_open, episode.outcome) for episode in store.query()] == [
        ("mine", False, Success()),
        ("mine.2", True, Unknown()),
    ]


def test_an_episode_that_another_process_has_closed_goes_on_as_another_part(client, store):
    named = {"extra_headers": {"X-Loraloop-Episode": "mine"}}
    ask(client, list(OPENING), streams=False, **named)
    (episode,) = stored(store, 1)
    store.append(episode.model_copy(update={"is_open": False}))
    ask(client, list(OPENING), streams=False, **named)
    assert [(each.id, len(each.records)) for each in stored(store, 2)] == [("mine", 1), ("mine.2", 1)]


def test_an_episode_that_nothing_comes_for_is_over(tmp_path, store):
    with recording(tmp_path, store, idle_seconds=0.3) as recorder, routed(recorder) as client:
        ask(client, list(OPENING), streams=False)
        (episode,) = stored(store, 1)
        wait_for(lambda: not store.get(episode.id).is_open)
    assert store.get(episode.id).outcome == Unknown()


def test_a_conversation_goes_on_after_a_restart(tmp_path, store):
    messages = list(OPENING)
    with recording(tmp_path, store) as recorder, routed(recorder) as client:
        ask(client, messages, streams=False)
    messages.append({"role": "tool", "tool_call_id": "call_1", "content": "rain"})
    with recording(tmp_path, store) as recorder, routed(recorder) as client:
        ask(client, messages, streams=False)
    (episode,) = store.query()
    assert [message.to_openai() for message in episode.messages] == messages


def test_failed_calls_are_kept_and_not_learned(client, store):
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(model="agent", messages=[{"role": "user", "content": "status 422"}])
    client.completions.create(model="agent", prompt="Once")
    failed, text = stored(store, 2)
    assert failed.records[0].error == "refused with status 422: as you wish"
    assert (text.records[0].served.api, text.records[0].response.content) == ("completions", "and so on")
    assert failed.messages == text.messages == ()


def test_content_that_no_message_has_a_place_for_is_kept_and_not_learned(client, store):
    picture = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    client.chat.completions.create(
        model="agent", messages=[*OPENING, {"role": "user", "content": picture}, {"role": "user", "content": "Well?"}]
    )
    (episode,) = stored(store, 1)
    (record,) = episode.records
    assert isinstance(record, LlmCallRecord)
    assert record.error.startswith("unsupported_content")
    assert "data:image/png" in record.messages[2].content
    assert episode.messages == ()


def test_a_full_queue_drops_records_and_no_calls(tmp_path, store):
    with recording(tmp_path, store, max_queued=0) as recorder, routed(recorder) as client:
        raw = client.chat.completions.with_raw_response.create(model="agent", messages=OPENING)
        assert raw.parse().choices[0].message.content
        assert raw.headers["x-loraloop-record"] == "none; the queue is full"
        assert recorder.status()["dropped"] == 1
    assert store.query() == []


def test_what_json_cannot_hold_is_dropped_alone(recorder, client, store):
    raw = client.chat.completions.with_raw_response.create(model="agent", messages=[{"role": "user", "content": "odd number"}])
    assert raw.status_code == 200
    wait_for(lambda: record_of(client, raw.headers["x-loraloop-record"]).status_code == 404)
    ask(client, list(OPENING), streams=False)
    assert len(stored(store, 1)) == 1
    assert recorder.status()["dropped"] == 1
    assert "cannot be written as JSON" in str(recorder.status()["last_error"])


def test_a_full_disk_drops_records_and_no_calls_and_recording_goes_on_when_there_is_room(tmp_path, store):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with recording(tmp_path, store) as recorder, routed(recorder) as client:
        before = client.chat.completions.with_raw_response.create(model="agent", messages=OPENING).headers["x-loraloop-record"]
        wait_for(lambda: record_of(client, before).status_code == 200)
        stored(store, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        try:
            raw = client.chat.completions.with_raw_response.create(model="agent", messages=OPENING)
            assert raw.parse().choices[0].message.content
            dropped = raw.headers["x-loraloop-record"]
            wait_for(lambda: record_of(client, dropped).status_code == 404)
            assert "dropped" in record_of(client, dropped).json()["error"]["message"]
            raw = client.chat.completions.with_raw_response.create(model="agent", messages=OPENING)
            assert raw.headers["x-loraloop-record"] == "none; the journal cannot be written"
            assert tell(client, raw.headers["x-loraloop-episode"], {"kind": "success"}).status_code in {404, 503}
            assert recorder.status()["dropped"] == 2
            assert "File too large" in recorder.status()["last_error"]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        def is_recorded_again() -> bool:
            return (
                client.chat.completions.with_raw_response.create(model="agent", messages=OPENING)
                .headers["x-loraloop-record"]
                .startswith("rec-")
            )

        wait_for(is_recorded_again)
    assert len(store.query()) == 2


def test_a_locked_store_delays_nobody_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("loraloop.store.database.BUSY_SECONDS", 0.2)
    with SqlEpisodeStore(tmp_path / "episodes.db") as store, recording(tmp_path, store) as recorder, routed(recorder) as client:
        other = sqlite3.connect(tmp_path / "episodes.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        record = client.chat.completions.with_raw_response.create(model="agent", messages=OPENING).headers["x-loraloop-record"]
        wait_for(lambda: record_of(client, record).status_code == 200)
        wait_for(lambda: recorder.status()["last_error"] is not None)
        assert record_of(client, record).json()["records"][0]["served"]["id"] == record
        assert recorder.status()["journal_bytes"] > 0
        other.execute("COMMIT")
        other.close()
        stored(store, 1)
        wait_for(lambda: recorder.status()["journal_bytes"] == 0)
