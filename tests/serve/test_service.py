"""The whole service as a user starts it: real llama.cpp servers, real adapters, the real proof, the command line."""

from __future__ import annotations

import http.client
import json
import statistics
import time
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from services import run, save, serving
from tiny import make_model

from loraloop.project import Project


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model") / "llama")


def chat(address: dict[str, Any], model: str = "agent", token: str | None = None) -> tuple[int, Any, str | None]:
    place = urllib.parse.urlsplit(address["url"])
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    try:
        headers = {"Authorization": f"Bearer {token or address['token']}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.getheader("X-Loraloop-Version")
    finally:
        connection.close()


def test_a_service_from_its_start_over_switches_to_its_end_and_its_next_start(tmp_path: Path, base: Path) -> None:
    with Project(tmp_path) as project:
        first, second, held = save(project, base, 1), save(project, base, 2), save(project, base, 3, state="held")
    assert run("apply", first.id, project=tmp_path).returncode == 0, "kept for the start"
    with serving(tmp_path, base) as (address, process):
        status, answer, version = chat(address)
        assert status == 200, answer
        assert answer["model"] == version == f"agent@{(first.adapter_sha256 or '')[:12]}"
        assert chat(address, token="wrong")[0] == 401
        assert chat(address, "unknown")[0] == 404
        again = run("serve", "--base", str(base), project=tmp_path)
        assert again.returncode == 1
        assert "serves this project already" in again.stderr
        done = run("apply", second.id, "--json", project=tmp_path)
        report = json.loads(done.stdout)
        assert report["proof"]["proven"], done.stderr
        assert report["proof"]["figures"]["correlation"] > 0.99
        assert 0.98 < report["proof"]["figures"]["slope"] < 1.02
        assert report["proof"]["figures"]["error"] < 5e-3
        assert chat(address)[2] == report["version"] != version
        refused = run("apply", held.id, project=tmp_path)
        assert refused.returncode == 1
        assert "is held, and only promoted models are served" in refused.stderr
        assert run("rollback", "--why", "worse", project=tmp_path).returncode == 0
        assert chat(address)[2] == version
        told = json.loads(run("serve", "status", "--json", project=tmp_path).stdout)
        assert told["fleet"]["aliases"]["agent"]["model_id"] == first.id
        assert told["recorder"]["dropped"] == 0
        process.kill()
        process.wait()
    with serving(tmp_path, base, "--token", "mine") as (address, _):
        assert address["token"] == "mine"
        assert chat(address)[2] == version, "what the disk says after a kill"
    assert not (tmp_path / "serving" / "service.json").exists()
    with Project(tmp_path) as project:
        assert len(project.store.query()) >= 1, "calls are episodes"


def test_an_adapter_that_the_server_would_apply_wrongly_is_not_proven_or_refused(tmp_path: Path, base: Path) -> None:
    with Project(tmp_path) as project:
        good, dora = save(project, base, 1), save(project, base, 2, use_dora=True)
    with serving(tmp_path, base) as (address, _):
        assert run("apply", good.id, project=tmp_path).returncode == 0
        refused = run("apply", dora.id, project=tmp_path)
        assert refused.returncode == 1
        assert "DoRA" in refused.stderr
        assert chat(address)[0] == 200


def test_a_connection_outlives_its_clients_and_no_answer_waits_for_a_packet(tmp_path: Path, base: Path) -> None:
    headers: dict[str, str] = {}
    body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "stream": True})

    def ask(connection: http.client.HTTPConnection) -> float:
        started = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, headers)
        assert b"[DONE]" in connection.getresponse().read()
        return time.perf_counter() - started

    with serving(tmp_path, base) as (address, _):
        headers |= {"Authorization": f"Bearer {address['token']}", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", int(address["url"].rpartition(":")[2]), timeout=60)
        took = [ask(connection) for _ in range(15)]
        assert statistics.median(took) < 0.035, "each answer waited for the client's delayed acknowledgement"
        connection.auto_open = 0  # a connection that the service has closed is an error
        time.sleep(5.5)  # uvicorn's default is 5 s, as is that of OpenAI's client
        ask(connection)
        connection.close()


def test_a_taken_port_an_odd_token_and_a_base_that_is_none_end_before_anything_is_begun(tmp_path: Path, base: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", "--base", str(base), "--port", str(taken.getsockname()[1]), project=tmp_path)
    assert done.returncode == 1
    assert "cannot listen at 127.0.0.1" in done.stderr
    done = run("serve", "--base", str(base), "--token", "clé", project=tmp_path)
    assert done.returncode == 1
    assert "the token holds 'é'" in done.stderr
    done = run("serve", "--base", str(tmp_path / "none.gguf"), project=tmp_path)
    assert done.returncode == 1
    assert "none.gguf" in done.stderr
    assert not list((tmp_path / "serving").glob("service.*")), "no lease is left"


def test_an_option_that_the_applier_lacks_or_that_cannot_be_is_named(base: Path, tmp_path: Path) -> None:
    done = run("serve", "--base", str(base), "--option", "n_parallel=none", "--option", "threads=2", project=tmp_path / "project")
    assert done.returncode == 1
    assert "n_parallel=none" in done.stderr
    assert "threads=2" in done.stderr
    assert "n_threads" in done.stderr
