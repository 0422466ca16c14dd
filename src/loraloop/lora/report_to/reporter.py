"""The side of the training: hand every event to a process of its own that reports it.

A process, because none of the services may touch a training: they print to standard output, wait for servers, read their settings when
they are imported, and start threads. Here nothing is imported and nothing is waited for until the end. When the process ends before
its time, that is one warning, and the training goes on unreported.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import importlib.util
import logging
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from loraloop.episode import now_ms
from loraloop.errors import SettingsError
from loraloop.lora.report_to.messages import REPORTERS, Message, Opening
from loraloop.training_record import TrainingEvent

log = logging.getLogger("loraloop.lora")

SECONDS_TO_CLOSE = 30.0
"""How long the end of a training waits for a service to have everything."""
MAX_BEHIND = 8 << 20
"""Bytes of events that wait for a reporting process that takes none; some 35,000 steps."""


def open_reporter(
    name: str,
    *,
    run_id: str,
    settings: Mapping[str, object],
    folder: Path,
    lineage: Mapping[str, object] | None = None,
    say: Callable[[str], None] = log.warning,
) -> Reporter:
    """A reporter of the run `run_id` to the service `name`; a run that the service has already is continued.

    `settings` become hyperparameters, `lineage` (what the run was made from) tags where the service has such. The service keeps what
    it keeps under `folder/<name>`, the same for all runs that are to be compared, unless its own environment variables lead
    elsewhere. `say` hears at most one warning. Raises SettingsError for an unknown name, a package that is missing and a run id that
    is no file name; trouble of the service itself never raises.
    """
    check_service(name)
    if not re.fullmatch(r"[\w-][\w.-]*", run_id, re.ASCII):
        raise SettingsError(f"run_id={run_id!r}: expected letters, digits, dots, dashes and underscores, as it names a folder")
    home = Path(folder).absolute() / name
    opening = Opening(
        run_id=run_id,
        folder=home,
        settings={key: _plain(value) for key, value in settings.items()},
        lineage={key: _text(value) for key, value in (lineage or {}).items() if value is not None},
    )
    return Reporter(name, opening, say)


class Reporter:
    """Reports one run to one service. Not for use by several threads at once."""

    def __init__(self, name: str, opening: Opening, say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._log_path = opening.folder / "logs" / f"{opening.run_id}.log"
        self._waiting = bytearray()
        self._process: subprocess.Popen[bytes] | None = None
        self._n_said_before = 0  # bytes: the log of a run that is resumed goes on
        try:
            self._n_said_before = self._log_path.stat().st_size if self._log_path.exists() else 0
            self._process = _start(name, opening.folder, self._log_path)
        except OSError as error:
            self._switch_off(str(error))
            return
        self._send(opening.model_dump_json())

    def hear(self, event: TrainingEvent) -> None:
        """Hand on an event that has figures; returns at once, whatever the service does."""
        if event.event in ("step", "held_out"):
            told = event.message if event.message in ("before", "after") else None  # a script's own words may be no Unicode
            self._send(Message(at_ms=now_ms(), event=event.model_copy(update={"message": told})).model_dump_json(exclude_none=True))

    def close(self, state: str, max_seconds: float = SECONDS_TO_CLOSE) -> None:
        """Hand on how the run ended (`finished`, `failed`, or any other word) and wait until the service has everything, or no longer."""
        until = time.monotonic() + max_seconds
        self._send(Message(at_ms=now_ms(), state=_text(state)).model_dump_json(exclude_none=True))
        while self._waiting and time.monotonic() < until:
            time.sleep(0.02)
            self._push()
        process = self._process
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            code = process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._switch_off(f"it had not taken everything {max_seconds:g} s after the end, so its last figures may be missing")
            return
        self._process = None
        if code:
            self._tell(self._last_words())

    def _send(self, line: str) -> None:
        if self._process is None:
            return
        self._waiting += line.encode() + b"\n"
        self._push()
        if len(self._waiting) > MAX_BEHIND:
            self._switch_off(f"it takes no events: {len(self._waiting) >> 20} MB wait for it")

    def _push(self) -> None:
        """Write as much as the pipe takes."""
        if self._process is None or self._process.stdin is None:
            return
        try:
            while self._waiting:
                n_written = os.write(self._process.stdin.fileno(), self._waiting)
                del self._waiting[:n_written]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._process.wait()
            self._switch_off(self._last_words())

    def _switch_off(self, reason: str) -> None:
        process, self._process = self._process, None
        self._waiting.clear()
        if process is not None:
            process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        self._tell(reason)

    def _tell(self, reason: str) -> None:
        self._say(f"{self._name} has not got all of this run: {reason}; what it said is in {self._log_path}")

    def _last_words(self) -> str:
        """The last line that the process wrote, which is what a Python error ends with."""
        try:
            said = self._log_path.read_bytes()[self._n_said_before :].decode(errors="replace")
        except OSError as error:
            return str(error)
        return next((line.strip() for line in reversed(said.split("\n")) if line.strip()), "it ended without a word")[:1000]


def check_service(name: str) -> None:
    """Raises SettingsError for an unknown service, and for one whose package is missing."""
    if name not in REPORTERS:
        near = difflib.get_close_matches(name, REPORTERS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise SettingsError(f"nothing named {name!r} to report to; known: {', '.join(REPORTERS)}.{hint}")
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # a folder of that name in the working directory has no origin
        raise SettingsError(f"the package {name} is not installed; say pip install 'loraloop[{name}]', or report to something else")


def _start(name: str, folder: Path, log_path: Path) -> subprocess.Popen[bytes]:
    """The reporting process, in a session of its own: Ctrl-C in a terminal is for the training, which then says how it ended.

    Its log is locked from its first moment to its last, so that one process at a time reports a run.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    unless_told = _environment(name, folder)
    told = {variable: value for variable, value in os.environ.items() if value or variable not in unless_told}
    with log_path.open("ab") as output:
        with contextlib.suppress(BlockingIOError):  # the process waits for it otherwise
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "loraloop.lora.report_to", name],  # unbuffered: the last line of the log is the last word
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={**unless_told, **told},
            start_new_session=True,
            bufsize=0,
        )
    assert process.stdin is not None  # noqa: S101  it was asked for above
    os.set_blocking(process.stdin.fileno(), False)
    return process


def _environment(name: str, folder: Path) -> dict[str, str]:
    """What a service is told where the user's environment says nothing: to keep everything here, and to send nothing anywhere."""
    if name == "mlflow":
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        return {"MLFLOW_TRACKING_URI": uri, "MLFLOW_EXPERIMENT_NAME": "loraloop", "MLFLOW_DISABLE_TELEMETRY": "true"}
    if name == "trackio":
        remote = any(os.environ.get(variable) for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
        here = {} if remote else {"HF_HUB_OFFLINE": "1"}  # it would ask the hub for the name of whoever is logged in there
        return {"TRACKIO_DIR": str(folder), "TRACKIO_PROJECT": "loraloop", **here}
    return {}


def _plain(value: object) -> str | int | float | bool:
    """A setting as every service takes it."""
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _text(value)


def _text(value: object) -> str:
    """Its text, what UTF-8 cannot hold (a file's name may have it) as an escape."""
    return str(value).encode("utf-8", "backslashreplace").decode()
