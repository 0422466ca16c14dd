"""The router against a real server on the other side: what is passed on, what is passed back, what is told when that fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
import pytest
from upstream import VERSION, OneRoute, Upstream, serving, wait_for

from loraloop.serve.capture import CaptureSettings, Recorder
from loraloop.serve.relay import RouterSettings
from loraloop.serve.router import create_app
from loraloop.store.sql import SqlEpisodeStore

TOKEN = "secret-token"
SETTINGS = RouterSettings(token=TOKEN, max_seconds=1.0, max_request_bytes=20_000, max_in_flight=2)


@dataclass
class Served:
    client: httpx2.Client
    upstream: Upstream
    routes: OneRoute
    recorder: Recorder
    store: SqlEpisodeStore

    def ask(self, said: str, **more) -> httpx2.Response:
        return self.client.post("/v1/chat/completions", json=request_for(said, **more))

    def stream(self, said: str, **more):
        return self.client.stream("POST", "/v1/chat/completions", json=request_for(said, stream=True), **more)


def request_for(said: str, **more) -> dict:
    return {"model": "agent", "messages": [{"role": "user", "content": said}], **more}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    upstream = Upstream()
    with SqlEpisodeStore(tmp_path / "episodes.db") as store, serving(upstream.app) as url:
        routes = OneRoute(url)
        recorder = Recorder(tmp_path / "capture", store, settings=CaptureSettings(store_seconds=0.1))
        recorder.start()
        try:
            with (
                serving(create_app(routes, recorder, SETTINGS)) as router,
                httpx2.Client(base_url=router, headers={"authorization": f"Bearer {TOKEN}"}, timeout=20) as client,
            ):
                yield Served(client, upstream, routes, recorder, store)
        finally:
            recorder.close()
        assert all(len(released) == 1 for released in routes.released), "each ticket is released exactly once"


def error_of(response: httpx2.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "code", "param"}
    assert error["code"] == code
    return error["message"]


def test_the_answer_is_the_servers_under_the_versions_name(served):
    response = served.ask("hi", temperature=0.5)
    assert response.status_code == 200
    said = response.json()
    assert said["model"] == response.headers["x-loraloop-version"] == VERSION.name
    assert said["choices"] == [{"index": 0, "message": {"role": "assistant", "content": "You said: hi ☃"}, "finish_reason": "stop"}]
    asked = served.upstream.asked[0]
    assert asked["model"] == "raw"
    assert asked["lora"] == [{"id": 0, "scale": 1.0}]
    assert asked["temperature"] == 0.5
    assert served.upstream.headers[0]["authorization"] == "Bearer inner"


def test_a_stream_is_passed_on_chunk_by_chunk_with_the_versions_name_in_each(served):
    with served.stream("hi") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert ": still here" in lines
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert {chunk["model"] for chunk in chunks} == {VERSION.name}
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == "You said: hi ☃"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_tools_that_the_model_never_sees_are_told_and_a_demanded_call_is_refused(served):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    assert "x-loraloop-ignored" not in served.ask("hi", tools=tools).headers
    served.routes.endpoint = replace(served.routes.endpoint, ignores_tools=True)
    assert served.ask("hi", tools=tools).headers["x-loraloop-ignored"] == "tools"
    assert "x-loraloop-ignored" not in served.ask("hi").headers
    n_asked = len(served.upstream.asked)
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        assert "no place for tools" in error_of(served.ask("hi", tools=tools, tool_choice=choice), 400, "no_tools")
    assert len(served.upstream.asked) == n_asked
    wait_for(lambda: served.recorder.status()["queued"] == 0)


def test_text_completions_and_the_list_of_models(served):
    said = served.client.post("/v1/completions", json={"model": "agent", "prompt": "Once"}).json()
    assert (said["model"], said["choices"][0]["text"]) == (VERSION.name, "and so on")
    listed = served.client.get("/v1/models").json()["data"]
    assert [(each["id"], each["version"]) for each in listed] == [("agent", VERSION.name), (VERSION.name, VERSION.name)]
    assert served.client.get("/e/one/v1/models").json()["data"] == listed


def test_who_has_no_token_or_comes_from_elsewhere_is_kept_out(served):
    ask = {"json": {"model": "agent", "messages": [{"role": "user", "content": "hi"}]}}
    for authorization in ("", "Bearer wrong", "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN):
        error_of(served.client.post("/v1/chat/completions", headers={"authorization": authorization}, **ask), 401, "invalid_api_key")
    error_of(served.client.post("/v1/chat/completions", headers={"host": "evil.example"}, **ask), 403, "foreign_host")
    error_of(served.client.post("/v1/chat/completions", headers={"origin": "http://evil.example"}, **ask), 403, "foreign_origin")
    preflight = served.client.options("/v1/chat/completions", headers={"origin": "null", "access-control-request-method": "POST"})
    error_of(preflight, 403, "foreign_origin")
    assert not [name for name in preflight.headers if name.startswith("access-control")]
    assert served.upstream.asked == []
    assert served.client.get("/v1/models", headers={"authorization": f"bearer {TOKEN}"}).status_code == 200
    assert served.client.get("/healthz", headers={"authorization": ""}).json() == {"status": "ok"}


def test_what_cannot_be_asked_is_refused_before_any_server_sees_it(served):
    error_of(
        served.client.post("/v1/chat/completions", json={"model": "other", "messages": [{"role": "user", "content": "hi"}]}),
        404,
        "model_not_found",
    )
    error_of(served.client.post("/v1/chat/completions", json={"messages": []}), 400, "missing_model")
    error_of(served.client.post("/v1/chat/completions", json={"model": "agent", "messages": []}), 400, "bad_messages")
    error_of(served.client.post("/v1/chat/completions", content=b'{"model": "agent", "temperature": NaN}'), 400, "bad_json")
    error_of(served.client.post("/v1/chat/completions", content=b"[]"), 400, "bad_json")
    assert "20,000" in error_of(served.ask("x" * 30_000), 413, "too_large")
    assert "lora" in error_of(served.ask("hi", lora=[]), 400, "unsupported_parameter")
    remote = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]
    body = {"model": "agent", "messages": [{"role": "user", "content": remote}]}
    error_of(served.client.post("/v1/chat/completions", json=body), 400, "remote_content")
    error_of(served.client.post("/v1/chat/completions", json=body, headers={"x-loraloop-episode": "../x"}), 400, "remote_content")
    response = served.client.post(
        "/v1/chat/completions",
        json={"model": "agent", "messages": [{"role": "user", "content": "hi"}]},
        headers={"x-loraloop-episode": "../x"},
    )
    error_of(response, 400, "bad_episode_id")
    error_of(served.client.post("/v1/embeddings", json={}), 404, "no_such_route")
    error_of(served.client.get("/v1/chat/completions"), 405, "no_such_route")
    assert served.upstream.asked == []


def test_a_chunked_request_is_measured_while_it_comes(served):
    pieces = (b" " * 5_000 for _ in range(10))
    error_of(served.client.post("/v1/chat/completions", content=pieces), 413, "too_large")


def test_what_is_about_the_servers_memory_is_dropped(served):
    assert served.ask("hi", cache_prompt=True, id_slot=3).status_code == 200
    assert not {"cache_prompt", "id_slot"} & served.upstream.asked[0].keys()


def test_what_the_server_has_against_a_request_is_passed_back_verbatim(served):
    response = served.ask("status 422")
    assert response.status_code == 422
    assert response.json() == {"error": {"message": "as you wish", "type": "t", "code": "c", "param": "p"}}
    wait_for(lambda: served.routes.released == [[False]])


@pytest.mark.parametrize("said", ["status 500", "status 503", "status 401", "no json", "no choices"])
def test_a_server_that_fails_is_a_502_that_says_why(served, said):
    message = error_of(served.ask(said), 502, "upstream_failed")
    assert VERSION.name in message
    wait_for(lambda: served.routes.released == [[True]])


def test_a_server_that_is_gone_is_a_502(served, unused_port):
    served.routes.endpoint = type(served.routes.endpoint)(VERSION, f"http://127.0.0.1:{unused_port}", "raw")
    assert "Connect" in error_of(served.ask("hi"), 502, "upstream_failed")


def test_an_answer_that_takes_too_long_is_a_504(served):
    error_of(served.ask("slow"), 504, "timeout")
    assert served.upstream.cancelled.wait(5)


def test_nothing_to_answer_is_a_503_that_says_when_to_come_back(served):
    served.routes.serves = False
    served.routes.list_names = lambda: {"agent": VERSION.name}
    response = served.ask("hi")
    error_of(response, 503, "nothing_serves")
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("said", ["breaks off", "dies"])
def test_a_stream_that_breaks_off_is_never_taken_for_whole(served, said):
    pieces = []
    with served.stream(said) as response, pytest.raises(httpx2.RemoteProtocolError):
        pieces.extend(response.iter_raw())
    record, got = response.headers["x-loraloop-record"], b"".join(pieces)
    assert b"[DONE]" not in got
    assert json.loads(got.strip().split(b"\n\n")[-1][6:])["error"]["message"]
    wait_for(lambda: served.routes.released == [[True]])
    wait_for(lambda: served.client.get(f"/records/{record}").status_code == 200)
    assert served.client.get(f"/records/{record}").json()["records"][0]["error"].startswith("truncated")


def test_an_error_of_the_server_within_a_stream_counts_as_its_failure(served):
    with served.stream("error within") as response:
        assert "out of memory" in response.read().decode()
    wait_for(lambda: served.routes.released == [[True]])


def test_a_client_that_leaves_frees_its_place_and_the_server(served):
    with served.stream("never ends") as response:
        next(response.iter_raw())
    assert served.upstream.cancelled.wait(5)
    served.upstream.cancelled.clear()
    with pytest.raises(httpx2.ReadTimeout):
        served.client.post("/v1/chat/completions", json=request_for("slow"), timeout=0.2)
    assert served.upstream.cancelled.wait(5)
    wait_for(lambda: served.routes.released == [[False], [False]])


def test_too_many_at_one_time_are_told_to_come_back(served):
    with served.stream("never ends"), served.stream("never ends"):
        response = served.ask("hi")
        error_of(response, 429, "too_many_in_flight")
        assert int(response.headers["retry-after"]) > 0
    wait_for(lambda: served.ask("hi").status_code == 200)


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
