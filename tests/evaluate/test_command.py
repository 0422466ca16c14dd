"""A command of the user's: its scores are read, its model answers, and its failure is named."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import scored
from sides import make_project

from loraloop.base_model import resolve_base
from loraloop.errors import EvaluationError
from loraloop.evaluate.command import run_command
from loraloop.evaluate.endpoint import Access, open_endpoint
from loraloop.evaluate.rollout import load_player
from loraloop.evaluation import EvaluationOptions

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
NOWHERE = Access("http://127.0.0.1:9/v1", "agent", "secret")


def script(tmp_path: Path, code: str) -> str:
    file = tmp_path / "measure.py"
    file.write_text(code)
    return f"{sys.executable} {file}"


def run(tmp_path: Path, code: str, **changes: float) -> dict[str, float]:
    return run_command(script(tmp_path, code), NOWHERE, tmp_path / "log", **changes)


def test_every_form_of_a_score_is_read_and_the_rest_is_log(tmp_path: Path) -> None:
    code = """
import os
print('{"task": "a", "score": 0.5}')
print('{"task": "no score"}')
print("b: 1")
print("some/test c: false")
print("PASSED tests/x.py::test_d[1: 2]")
print("FAILED tests/x.py::test_e - assert 1 == 2")
print("time: 12 s, model", os.environ["LORALOOP_MODEL"], os.environ["OPENAI_BASE_URL"])
"""
    assert run(tmp_path, code) == {"a": 0.5, "b": 1, "some/test c": 0, "tests/x.py::test_d[1: 2]": 1, "tests/x.py::test_e": 0}
    assert "model agent http://127.0.0.1:9/v1" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('a: 1'); raise SystemExit(3)", "exit code 3. It said last:\na: 1"),
        ("print('a: 1'); raise ValueError('no model')", "exit code 1.*ValueError: no model"),
        ("print('nothing')", "printed no score"),
        ("print('a: 1'); print('a: 0')", "scored the task 'a' more than once"),
        ("""print('{"task": "a", "score": NaN}')""", "score of task 'a' is nan"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9"),
    ],
)
def test_a_command_that_fails_is_named_with_what_it_said(tmp_path: Path, code: str, said: str) -> None:
    with pytest.raises(EvaluationError, match=f"(?s){said}"):
        run(tmp_path, code)


def test_pytest_with_failed_tests_is_a_measurement_and_a_broken_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "test_of_the_user.py"
    file.write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    command = f"{sys.executable} -m pytest -q -rA -p no:cacheprovider {file} --rootdir {tmp_path}"
    found = run_command(command, NOWHERE, tmp_path / "log")
    assert {name.rpartition("::")[2]: score for name, score in found.items()} == {"test_good": 1, "test_bad": 0}
    with pytest.raises(EvaluationError, match="exit code"):
        run_command(command + " --no-such-option", NOWHERE, tmp_path / "log")


def test_a_command_that_is_not_there_or_takes_too_long_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="'no-such-program' cannot be started"):
        run_command("no-such-program --now", NOWHERE, tmp_path / "log")
    started = time.monotonic()
    with pytest.raises(EvaluationError, match="took longer than 1 s"):
        run(tmp_path, "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])", timeout_s=1)
    assert time.monotonic() - started < 20


def test_output_without_end_costs_no_memory_and_no_disk(tmp_path: Path) -> None:
    code = "import sys\nfor _ in range(300): sys.stdout.write('x' * 100_000)\nprint()\nprint('a: 1')"
    assert run(tmp_path, code) == {"a": 1}
    assert (tmp_path / "log").stat().st_size <= 11 << 20


def test_a_function_measures_both_sides_through_the_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    project, base, [model] = make_project(tmp_path)
    with project:
        found = project.evaluate(model.id, "base", EvaluationOptions(command="scored:lengths"))
    assert [one.task for one in found.primary.scores] == ["one", "three", "two"]
    assert found.plan.command == "scored:lengths"
    players = {"candidate": load_player(resolve_base(str(base)), str(model.adapter_path)), "opponent": load_player(resolve_base(str(base)))}
    for side, player in players.items():
        with open_endpoint(player, side) as access:
            monkeypatch.setenv("LORALOOP_TOKEN", access.token)
            expected = scored.lengths(access.url, side)
            assert {one.task: getattr(one, side) for one in found.primary.scores} == expected


def test_the_endpoint_speaks_to_openais_client_and_to_nobody_without_its_token(tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    _, base, [model] = make_project(tmp_path)
    with open_endpoint(load_player(resolve_base(str(base)), str(model.adapter_path)), "agent") as access:
        ask = {"model": "agent", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
        with openai.OpenAI(base_url=access.url, api_key=access.token, max_retries=0) as client:
            whole = client.chat.completions.create(**ask)
            parts = list(client.chat.completions.create(**ask, stream=True))
            assert whole.choices[0].message.content == parts[0].choices[0].delta.content
            assert whole.usage.completion_tokens > 0
            assert [one.id for one in client.models.list()] == ["agent"]
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="agent", messages=[])
        with openai.OpenAI(base_url=access.url, api_key="guessed", max_retries=0) as client, pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(**ask)
