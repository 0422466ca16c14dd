"""A served model plays as the same model in this process; a server in trouble is borne or named."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from counting import CountingSuite, OnlyCandidate
from sides import make_project

from loraloop.base_model import resolve_base
from loraloop.errors import EvaluationError
from loraloop.evaluate.endpoint import open_endpoint
from loraloop.evaluate.environment import Task
from loraloop.evaluate.rollout import Played, Sampling, load_player
from loraloop.evaluate.speaker import InProcessSpeaker, ServedSpeaker, Speaker
from loraloop.evaluation import EvaluationOptions

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
pytest.importorskip("httpx2", reason="the extra serve is not installed; `make test` installs it")


def played_by(speaker: Speaker, suite: Any, tasks: list[Task], temperature: float = 0.0) -> list[list[str | None]]:
    ended: dict[int, Played[Task]] = {}
    speaker.play(suite, tasks, Sampling(temperature, range(len(tasks))), ended.setdefault)
    return [[message.content for message in ended[place].messages] for place in range(len(tasks))]


@contextmanager
def serve(answers: list[tuple[int, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that gives these answers, (status, JSON), the last one over and over; and the requests that it got."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, value = answers[min(len(asked), len(answers)) - 1]
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def said(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": {"completion_tokens": 3}}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_served_and_in_this_process_a_model_says_the_same(tmp_path: Path, temperature: float) -> None:
    _, base, [model] = make_project(tmp_path)
    player = load_player(resolve_base(str(base)), str(model.adapter_path), "float32")
    player.model.double()  # so that rounding does not choose between two tokens
    suite, tasks = OnlyCandidate(options={"n": "-"}), CountingSuite(options={"n": "5"}).list_tasks()
    here = played_by(InProcessSpeaker(player), suite, tasks, temperature)
    with open_endpoint(player, "agent") as access:
        there = played_by(ServedSpeaker(access.url, "agent", access.token), suite, tasks, temperature)
    assert there == here
    if temperature:
        assert len({str(one) for one in here}) > 1, "each seed draws for itself"


def test_a_request_is_made_again_where_trouble_may_pass() -> None:
    suite, [task] = CountingSuite(), CountingSuite(options={"n": "1"}).list_tasks()
    with serve([(503, {}), (200, said("ab")), (429, {}), (200, said("c"))]) as (url, asked):
        [messages] = played_by(ServedSpeaker(url, "agent", n_parallel=1), suite, [task])
    assert messages == ["count", "task-0 by 2", "ab", "sum 195", "c", "sum 294"]
    assert len(asked) == 4
    assert asked[-1]["messages"][-2:] == [{"role": "assistant", "content": "ab"}, {"role": "user", "content": "sum 195"}]
    assert {key: asked[-1][key] for key in ("model", "max_tokens", "temperature", "seed")} == {
        "model": "agent",
        "max_tokens": 6,
        "temperature": 0.0,
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"error": "no such model"}), r"refuses the model 'agent' .status 404.*no such model"),
        ((200, {"x": 1}), "answered without choices"),
    ],
)
def test_an_answer_that_is_none_is_named(answer: tuple[int, Any], message: str) -> None:
    suite, tasks = CountingSuite(), CountingSuite(options={"n": "3"}).list_tasks()
    with serve([answer]) as (url, asked), pytest.raises(EvaluationError, match=message):
        played_by(ServedSpeaker(url, "agent", n_parallel=1), suite, tasks)
    assert len(asked) <= 3


def test_nobody_at_the_url_is_named() -> None:
    suite, tasks = CountingSuite(), CountingSuite(options={"n": "1"}).list_tasks()
    with pytest.raises(EvaluationError, match=r"does not answer for the model 'agent' after 2 tries .ConnectError"):
        played_by(ServedSpeaker("http://127.0.0.1:9", "agent", n_tries=2), suite, tasks)


def test_two_served_models_are_evaluated_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, _, _ = make_project(tmp_path, 0)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("COLUMNS", "200")
    with serve([(200, said("b"))]) as (good, _), serve([(200, said("a"))]) as (bad, _), project:
        options = EvaluationOptions(environment="counting:OnlyCandidate", options={"n": b"b".hex()})
        found = project.evaluate(f"agent@{good}", f"agent@{bad}", options)
        assert (found.primary.wins, found.primary.n, found.plan.candidate.url) == (10, 10, good)
        argv = [sys.executable, "-m", "loraloop", "evaluate", f"agent@{good}", "--against", f"agent@{bad}"]
        argv += ["--environment", "counting:OnlyCandidate", "--option", f"n={b'b'.hex()}", "--project", str(tmp_path / "project")]
        shown = subprocess.run([*argv, "--report", str(tmp_path / "page.html")], capture_output=True, text=True, check=False)
        assert shown.returncode == 0, shown.stderr
        assert "counting: success" in shown.stdout
        assert "10 / 0 / 0" in shown.stdout
        assert "by these scores alone: hold; 10 tasks are too few" in shown.stdout
        assert f"served at {good}" in (tmp_path / "page.html").read_text()
        wrong = subprocess.run([*argv, "--option", "n"], capture_output=True, text=True, check=False)
        assert (wrong.returncode, wrong.stdout) == (1, "")
        assert "--option n: expected NAME=VALUE" in wrong.stderr
