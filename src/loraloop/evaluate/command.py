"""A command of the user's that measures a model: it is told where the model answers, and prints a score for each task.

It is run for each side with the same environment but for LORALOOP_MODEL_URL, LORALOOP_MODEL and LORALOOP_TOKEN; OPENAI_BASE_URL and
OPENAI_API_KEY say the same to OpenAI's clients. Read are JSON lines {"task": …, "score": …}, lines `name: 0.5`, and pytest's lines
`PASSED name` and `FAILED name` (`pytest -rA`); all else is log. `module:function` names a Python function instead, called with the URL
and the model's name, that gives a mapping of tasks to scores.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from loraloop.errors import TAIL_LINES, EvaluationError
from loraloop.evaluate.endpoint import Access
from loraloop.evaluate.environment import find_object
from loraloop.files import json_line

MAX_TASKS = 100_000
MAX_LINE = 64 << 10
"""Bytes of a line; what is longer is cut, and is no score."""
MAX_LOG = 10 << 20
"""Bytes of output that are kept in the log; scores behind them are read all the same."""
TIMEOUT_S = 3600.0
_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_LINE = re.compile(r"(?P<task>[^:{}\s][^{}]*?):\s*(?P<score>[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|pass|fail)\s*", re.IGNORECASE)
_PYTEST = re.compile(r"(?P<verdict>PASSED|XPASS|FAILED|ERROR) (?P<task>\S.*?)(?: - .*)?")
_WORDS = {"true": 1.0, "pass": 1.0, "false": 0.0, "fail": 0.0}


@dataclass
class Scores:
    """What a command printed."""

    by_task: dict[str, float] = field(default_factory=dict)
    from_pytest: bool = False
    twice: str | None = None
    """A task that was scored more than once."""

    def read(self, line: str) -> None:
        """Take a line's score, if it has one. Raises EvaluationError for a score that is no finite number, and too many tasks."""
        found = _read_line(line)
        if found is None:
            return
        task, score = found
        if not math.isfinite(score):
            raise EvaluationError(f"the command's score of task {task!r} is {score}; expected a finite number")
        self.from_pytest = self.from_pytest or _PYTEST.fullmatch(line.strip()) is not None
        self.twice = task if task in self.by_task else self.twice
        self.by_task[task] = score
        if len(self.by_task) > MAX_TASKS:
            raise EvaluationError(f"the command prints more than {MAX_TASKS:,} scores; print one a task")


def run_command(command: str, access: Access, log: Path, timeout_s: float = TIMEOUT_S) -> dict[str, float]:
    """The scores by task that the command prints for the model behind `access`; its output goes into `log`.

    Raises EvaluationError, with the last lines of the output, when it cannot be started, ends badly (pytest's exit code 1 only says that
    tests failed), takes longer than `timeout_s`, scores nothing, or one task twice.
    """
    is_function = _CALLABLE.fullmatch(command) is not None
    argv = [sys.executable, "-m", "loraloop.evaluate.command", command] if is_function else shlex.split(command)
    if not argv:
        raise EvaluationError("the command is empty")
    told = {
        "LORALOOP_MODEL_URL": access.url,
        "LORALOOP_MODEL": access.model,
        "LORALOOP_TOKEN": access.token,
        "OPENAI_BASE_URL": access.url,
        "OPENAI_API_KEY": access.token,
    }
    try:
        process = subprocess.Popen(
            argv,
            env={**os.environ, **told},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise EvaluationError(f"the command {argv[0]!r} cannot be started ({error.strerror}); is it installed?") from error
    late = threading.Event()

    def end() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(timeout_s, end)
    timer.start()
    scores, tail = Scores(), deque[str](maxlen=TAIL_LINES)
    try:
        _listen(process, scores, tail, log)
        code = process.wait()
    finally:
        timer.cancel()
        _kill(process)
        process.wait()
    _check(command, scores, (code, timeout_s if late.is_set() else None), tail)
    return scores.by_task


def _listen(process: subprocess.Popen[bytes], scores: Scores, tail: deque[str], log: Path) -> None:
    """Read all that it prints, keeping the scores, the last lines, and the beginning in the log."""
    assert process.stdout is not None  # noqa: S101  a pipe was asked for
    n_kept = 0
    with process.stdout as out, log.open("wb") as kept:
        is_whole = True  # whether what comes next begins a line
        while piece := out.readline(MAX_LINE):
            if n_kept < MAX_LOG:
                n_kept += kept.write(piece)
            if is_whole:
                line = piece.decode("utf-8", "replace").rstrip("\r\n")
                tail.append(line[:1000])
                if len(piece) < MAX_LINE:
                    scores.read(line)
            is_whole = piece.endswith(b"\n")


def _check(command: str, scores: Scores, ended: tuple[int, float | None], tail: deque[str]) -> None:
    code, timeout_s = ended
    only_failed_tests = code == 1 and scores.from_pytest
    trouble = ""
    if timeout_s is not None:
        trouble = f"took longer than {timeout_s:g} s"
    elif code and not only_failed_tests:
        trouble = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
    elif not scores.by_task:
        trouble = 'printed no score; expected a line {"task": "name", "score": 1} or `name: 1` for each task'
    elif scores.twice is not None:
        trouble = f"scored the task {scores.twice!r} more than once; print the mean, or give each a name"
    if trouble:
        said = "\n".join(tail) or "(it printed nothing)"
        raise EvaluationError(f"the command {command!r} {trouble}. It said last:\n{said}")


def _read_line(line: str) -> tuple[str, float] | None:
    line = line.strip()
    if line.startswith("{"):
        try:
            value = json.loads(line)
            return (str(value["task"]), float(value["score"])) if {"task", "score"} <= value.keys() else None
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None
    if pytest := _PYTEST.fullmatch(line):
        return pytest["task"], float(pytest["verdict"] in ("PASSED", "XPASS"))
    if plain := _LINE.fullmatch(line):
        word = plain["score"].lower()
        return plain["task"].strip(), _WORDS[word] if word in _WORDS else float(word)
    return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End it, with all that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    """Call the function that is named, and print its scores."""
    scores = find_object(sys.argv[1])(os.environ["LORALOOP_MODEL_URL"], os.environ["LORALOOP_MODEL"])
    if not isinstance(scores, Mapping):
        sys.exit(f"{sys.argv[1]} gave {type(scores).__name__}; expected a mapping of tasks to scores")
    for task, score in scores.items():
        sys.stdout.write(json_line({"task": str(task), "score": float(score)}) + "\n")


if __name__ == "__main__":
    main()
