"""A service as a user starts it, and models for it to serve."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from random_adapters import make_adapter

from loraloop.base_model import resolve_base
from loraloop.episode import EpisodeId
from loraloop.lora.model import LoraModelId, TrainedModel
from loraloop.project import Project

ENDS_BY = 128 + signal.SIGTERM


def save(project: Project, base: Path, seed: int, *, state: str = "promoted", strength: float = 0.2, **changes: Any) -> TrainedModel:
    """A trained model with a real adapter of `base`, a folder or a GGUF file."""
    found, model_id = resolve_base(str(base)), LoraModelId.new()
    shape = json.loads((found.path / "config.json").read_text())
    folder = make_adapter(project.directory / "models" / model_id, shape, seed, strength=strength)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    model = TrainedModel(
        id=model_id,
        base_model=found.name,
        adapter_path=folder,
        learn_model_name="conversation",
        episode_ids=(EpisodeId.new(),),
        sample_count=1,
        created_at=1,
        base_sha256=found.sha256,
    )
    project.registry.save(model)
    return project.move_model(model_id, state, "better")


def run(*arguments: str, project: Path) -> subprocess.CompletedProcess[str]:
    """`loraloop` as a user types it."""
    argv = [sys.executable, "-m", "loraloop", *arguments, "--project", str(project)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


@contextmanager
def serving(project: Path, base: Path, *more: str) -> Iterator[tuple[dict[str, Any], subprocess.Popen[str]]]:
    """`loraloop serve`: what it says when it is ready, and its process. At the end it must go in good order, unless it was killed."""
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
