"""`python -m loraloop.train` as a real process on real tiny models: what it leaves, and that it can be done again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from loraloop.base_model import load_model, load_tokenizer, resolve_base
from loraloop.files import file_sha256
from loraloop.train.__main__ import main
from loraloop.training_record import TrainingRecord

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"what": "egg"}'}}
TOOL = {"type": "function", "function": {"name": "find", "description": "Find it.", "parameters": {"type": "object", "properties": {}}}}
ONLY_CONVERSATIONS = {"conversations": [{"role": "user", "content": "Say hello"}, {"role": "assistant", "content": "Hello there, cook."}]}
WITH_EVERYTHING = {
    "kind": "sft",
    "episode_id": "ep-0000000000000-00000000000000000000000000000001",
    "weight": 0.5,
    "tools": [TOOL],
    "conversations": [
        {"role": "system", "content": "You find things."},
        {"role": "assistant", "content": "What do you need?"},
        {"role": "user", "content": "An egg.", "author": "simulated_user"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "two", "tool_call_id": "c1", "name": "find"},
        {"role": "tool", "content": "", "tool_call_id": "c1", "name": "find"},
        {"role": "assistant", "content": "There are two."},
    ],
}
UNUSABLE = {"episode_id": "ep-0000000000000-00000000000000000000000000000002", "conversations": [{"role": "user", "content": "hello?"}]}
CONTRACT = [
    "--rank",
    "4",
    "--alpha",
    "8",
    "--dropout",
    "0.05",
    "--batch-size",
    "2",
    "--grad-accum",
    "1",
    "--lr",
    "0.01",
    "--max-seq-length",
    "512",
]


@dataclass(frozen=True)
class Trained:
    """One finished training process."""

    output: Path
    base: Path
    events: list[dict[str, Any]]
    record: TrainingRecord
    connections: int
    """How often it tried to reach the hub."""


@dataclass(frozen=True)
class Started:
    """One training process that runs."""

    process: subprocess.Popen[bytes]
    folder: Path
    base: Path
    connections: list[object]

    @property
    def said(self) -> str:
        return (self.folder / "stdout").read_text()

    def finish(self) -> Trained:
        assert self.process.wait(timeout=240) == 0, (self.folder / "stderr").read_text()
        assert "FutureWarning" not in (self.folder / "stderr").read_text(), "what others should change is no news to the user"
        output = self.folder / "work" / "out"
        record = TrainingRecord.model_validate_json((output / "training_record.json").read_bytes())
        return Trained(output, self.base, [json.loads(line) for line in self.said.splitlines()], record, len(self.connections))


@contextlib.contextmanager
def counting_hub() -> Iterator[tuple[dict[str, str], list[object]]]:
    """An environment in which the hub is a local port that answers nothing, and the connections that came."""
    came: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, peer = server.accept()
                    came.append(peer)
                    connection.close()

        threading.Thread(target=listen, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"), address)
        yield {**proxies, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "NO_PROXY": "", "no_proxy": ""}, came
        server.shutdown(socket.SHUT_RDWR)


def write_data(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--output", str(output), "--model", str(base), *CONTRACT, *more]


@contextlib.contextmanager
def training(base: Path, folder: Path, *lines: dict[str, Any], more: tuple[str, ...]) -> Iterator[Started]:
    """A training process in `folder / "work"`, which a hub would know of and which is ended with the block."""
    (folder / "work").mkdir()
    command = [
        sys.executable,
        "-m",
        "loraloop.train",
        *arguments(base, write_data(folder / "work", *lines), folder / "work" / "out", *more),
    ]
    with counting_hub() as (hub, came), (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        apart = {"PYTHONHASHSEED": "1", "LORALOOP_LEASES": str(folder / "leases")}  # they run side by side, as users' must not
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **hub, **apart}, cwd=folder / "work")
        try:
            yield Started(process, folder, base, came)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def started(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Started]]:
    """All trainings of this module, begun together, as each takes seconds to load torch."""
    both = (ONLY_CONVERSATIONS, WITH_EVERYTHING)
    runs: dict[str, tuple[tuple[dict[str, Any], ...], tuple[str, ...]]] = {
        "llama": ((ONLY_CONVERSATIONS,), ("--epochs", "20", "--seed", "7")),
        "qwen3": ((*both, UNUSABLE), ("--epochs", "10")),
        "lfm2": (both, ("--epochs", "10")),
        "llama, endless": ((ONLY_CONVERSATIONS,), ("--epochs", "1000000")),
    }
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(training(tiny_model(name.split(",")[0]), tmp_path_factory.mktemp("run"), *lines, more=more))
            for name, (lines, more) in runs.items()
        }


@pytest.fixture(scope="module")
def on_one_sentence(started: dict[str, Started]) -> Trained:
    return started["llama"].finish()


@pytest.fixture(scope="module")
def on_two_samples(started: dict[str, Started]) -> Trained:
    return started["qwen3"].finish()


@pytest.fixture(scope="module")
def of_convolutions(started: dict[str, Started]) -> Trained:
    return started["lfm2"].finish()


@pytest.fixture(params=["on_one_sentence", "on_two_samples", "of_convolutions"], ids=["llama", "qwen3", "lfm2"])
def trained(request: pytest.FixtureRequest) -> Trained:
    """One training for each architecture."""
    return request.getfixturevalue(request.param)


# --- a training that is killed ----------------------------------------------------------------------------------------------


def test_a_killed_training_leaves_no_folder(started: dict[str, Started]) -> None:
    endless = started["llama, endless"]
    end = time.monotonic() + 240
    while '"event":"step"' not in endless.said:
        assert endless.process.poll() is None, (endless.folder / "stderr").read_text()
        assert time.monotonic() < end
        time.sleep(0.05)
    endless.process.send_signal(signal.SIGKILL)
    assert endless.process.wait(timeout=60) == -signal.SIGKILL
    assert [entry.name for entry in (endless.folder / "work").iterdir()] == ["data.jsonl"]


# --- what every training leaves ---------------------------------------------------------------------------------------------


def test_loss_falls_step_by_step(trained: Trained) -> None:
    steps = [event for event in trained.events if event["event"] == "step"]
    losses = [event["loss"] for event in steps]
    assert [event["step"] for event in steps] == list(range(1, len(steps) + 1)) == list(range(1, steps[0]["steps"] + 1))
    assert losses[-1] < losses[0] - 0.2
    assert trained.record.loss_history == list(enumerate(losses, 1))
    assert trained.record.final_loss == pytest.approx(sum(losses[-(len(losses) // 10) :]) / (len(losses) // 10))


def test_peft_loads_the_adapter_and_it_changes_what_the_base_says(trained: Trained) -> None:
    import peft
    import torch

    base = resolve_base(str(trained.base))
    model = load_model(base, "float32")
    ids = torch.tensor([load_tokenizer(base)("<|im_start|>assistant\nHel", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(model, str(trained.output)).eval()
        after = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            assert torch.equal(adapted(input_ids=ids).logits, before)
    assert float((after - before).abs().max()) > 0.1


def test_adapter_has_weights_for_every_layer_and_none_of_the_bases_own(trained: Trained) -> None:
    from safetensors import safe_open

    with safe_open(trained.output / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        assert all(".lora_A." in name or ".lora_B." in name for name in names)
        assert {name.split(".layers.")[1].split(".")[0] for name in names} == {"0", "1"}
        assert all(float(file.get_tensor(name).abs().sum()) > 0 for name in names)


def test_folder_holds_four_files_that_everybody_may_read(trained: Trained) -> None:
    files = sorted(trained.output.iterdir())
    assert [file.name for file in files] == ["README.md", "adapter_config.json", "adapter_model.safetensors", "training_record.json"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o644}
    assert stat.S_IMODE(trained.output.stat().st_mode) == 0o755
    assert sorted(entry.name for entry in trained.output.parent.iterdir()) == ["data.jsonl", "out"]


def test_configuration_names_the_base_and_no_path_of_this_machine(trained: Trained) -> None:
    text = (trained.output / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == trained.base.name
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["peft_type"]) == (4, 8.0, 0.05, "LORA")
    assert str(trained.base.parent) not in text
    assert not re.search(r'"/', text)


def test_nothing_is_looked_up_on_the_hub(trained: Trained) -> None:
    assert trained.connections == 0


def test_model_card_tells_what_it_was_trained_from(trained: Trained) -> None:
    card = (trained.output / "README.md").read_text()
    record = trained.record
    assert card.startswith("---\nlibrary_name: peft\ntags: [lora, loraloop]\n---\n")
    for part in (f"LoRA adapter for {record.base_model}", record.base_sha256, record.data_sha256, "| 4, 8, 0.05 |", "not measured"):
        assert part in card
    assert str(trained.base.parent) not in card


def test_record_tells_how_it_was_trained(trained: Trained) -> None:
    record = trained.record
    assert record.base_model == trained.base.name
    assert record.base_sha256 == resolve_base(str(trained.base)).sha256
    assert record.base_source == "folder"
    assert record.data_sha256 == file_sha256(trained.output.parent / "data.jsonl")
    assert record.held_out_sha256 is None
    given = {"rank": 4, "alpha": 8.0, "dropout": 0.05, "batch_size": 2, "grad_accum": 1, "lr": 0.01, "max_seq_length": 512}
    assert {key: record.settings[key] for key in given} == given
    assert record.versions["torch"] == version("torch")
    assert record.versions["loraloop"] == version("loraloop")
    assert (record.held_out_loss_before, record.held_out_loss_after, record.held_out_rows, record.gpu_memory_mb) == (None, None, 0, None)
    assert record.peak_memory_mb > 50
    assert 0 < record.training_time_secs < 120
    assert record.device == "cpu"


def test_events_come_in_order_and_the_data_is_told_before_the_first_step(trained: Trained) -> None:
    kinds = [event["event"] for event in trained.events if event["event"] not in ("note", "warning")]
    assert kinds == ["data", *["step"] * trained.record.steps, "saved"]
    data = next(event["data"] for event in trained.events if event["event"] == "data")
    assert data == trained.record.data.model_dump(mode="json")


# --- what it was trained on -------------------------------------------------------------------------------------------------


def test_a_line_with_only_conversations_trains(on_one_sentence: Trained) -> None:
    data = on_one_sentence.record.data
    assert (data.samples, data.samples_used, data.rows, data.turns, data.stops_trained) == (1, 1, 1, 1, 1)
    assert data.n_supervised_tokens == len("Hello there, cook.") + 1
    assert on_one_sentence.record.used_episode_ids == []
    assert on_one_sentence.record.refused == []
    assert on_one_sentence.record.seed == 7


def test_only_usable_episodes_are_recorded_as_used_and_each_refusal_is_kept(on_two_samples: Trained) -> None:
    record = on_two_samples.record
    assert record.used_episode_ids == [WITH_EVERYTHING["episode_id"]]
    assert [(refused.episode_id, refused.reason) for refused in record.refused] == [(UNUSABLE["episode_id"], "no_agent_turn")]
    data = record.data
    assert (data.samples, data.samples_used, data.turns, data.stops_trained) == (3, 2, 4, 4)
    assert (data.calls_recorded, data.calls_rendered, data.tools_rendered_by) == (2, 2, "fallback")
    assert data.refused == {"no_agent_turn": 1}
    assert data.trained_by_role == {"system": 0, "user": 0, "tool": 0, "assistant": data.n_supervised_tokens}


# --- doing it again ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_in_another_process_and_another_seed_does_not(on_one_sentence: Trained, tmp_path: Path) -> None:
    data = write_data(tmp_path, ONLY_CONVERSATIONS)
    for seed in ("7", "8"):
        assert main(arguments(on_one_sentence.base, data, tmp_path / seed, "--epochs", "20", "--seed", seed)) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert file_sha256(tmp_path / "7" / name) == file_sha256(on_one_sentence.output / name)
    assert file_sha256(tmp_path / "8" / "adapter_model.safetensors") != file_sha256(tmp_path / "7" / "adapter_model.safetensors")
    record = TrainingRecord.model_validate_json((tmp_path / "7" / "training_record.json").read_bytes())
    assert record.loss_history == on_one_sentence.record.loss_history
