"""The whole service as a user starts it: real llama.cpp servers, real adapters, the real proof, the command line."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from random_adapters import make_adapter
from tiny import make_model

from loraloop.base_model import resolve_base
from loraloop.episode import EpisodeId
from loraloop.lora.model import LoraModelId, TrainedModel
from loraloop.project import Project

ENDS_BY = 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model") / "llama")


def save(project: Project, base: Path, seed: int, *, state: str = "promoted", **changes: Any) -> TrainedModel:
    """A trained model with a real adapter."""
    model_id = LoraModelId.new()
    folder = make_adapter(project.directory / "models" / model_id, json.loads((base / "config.json").read_text()), seed, strength=0.2)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    model = TrainedModel(
        id=model_id,
        base_model="llama",
        adapter_path=folder,
        learn_model_name="conversation",
        episode_ids=(EpisodeId.new(),),
        sample_count=1,
        created_at=1,
        base_sha256=resolve_base(str(base)).sha256,
    )
    project.registry.save(model)
    return project.move_model(model_id, state, "better")


def run(*arguments: str, project: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "loraloop", *arguments, "--project", str(project)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


@contextmanager
def serving(project: Path, base: Path, *more: str) -> Iterator[tuple[dict[str, Any], subprocess.Popen[str]]]:
    argv = [sys.executable, "-m", "loraloop", "serve", "--base", str(base), "--project", str(project), *more]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    said: list[str] = []
    reader = threading.Thread(target=said.extend, args=(process.stderr,))
    reader.start()
    try:
        line = process.stdout.readline()
        assert line, f"exit {process.wait()}: {''.join(said)}"
        yield json.loads(line), process
    finally:
        process.terminate()
        assert process.wait(timeout=60) in {ENDS_BY, -signal.SIGKILL}, "".join(said)
        reader.join()
        process.stdout.close()
        process.stderr.close()


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


def test_a_taken_port_and_a_base_that_is_none_end_before_anything_is_begun(tmp_path: Path, base: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", "--base", str(base), "--port", str(taken.getsockname()[1]), project=tmp_path)
    assert done.returncode == 1
    assert "cannot be listened on" in done.stderr
    done = run("serve", "--base", str(tmp_path / "none.gguf"), project=tmp_path)
    assert done.returncode == 1
    assert "none.gguf" in done.stderr
    assert not list((tmp_path / "serving").glob("service.*")), "no lease is left"
