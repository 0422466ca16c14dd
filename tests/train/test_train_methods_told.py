"""`python -m loraloop.train --method …` on tiny models, from a file to the record: what is told, kept, measured and traced."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from loraloop.episode import EpisodeId
from loraloop.train.__main__ import main
from loraloop.training_record import TrainingRecord

Train = Callable[..., tuple[TrainingRecord, list[dict[str, Any]]]]
N = 4


def number_of(*numbers: int) -> list[str]:
    return [str(EpisodeId.parse(f"episode-{number}")) for number in numbers]


def line(kind: str, number: int, **own: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"task {number}"}, {"role": "assistant", "content": f"do {number}"}]
    if kind == "dpo":
        own = {"rejected": [{"role": "assistant", "content": f"drop {number}"}], "rejected_episode_id": f"episode-{100 + number}", **own}
    if kind == "kto":
        own = {"desirable": number % 2 == 0, **own}
    return {"kind": kind, "conversations": turns, "episode_id": f"episode-{number}", **own}


@pytest.fixture
def train(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Train:
    """Trains on lines, measures on others, and gives the record and what was told; the cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(method: str, lines: Sequence[Any], held_out: Sequence[Any], *more: str) -> tuple[TrainingRecord, list[dict[str, Any]]]:
        for name, part in (("data", lines), ("held", held_out)):
            (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in part))
        output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        told = ["--data", str(tmp_path / "data"), "--held-out", str(tmp_path / "held"), "--output", str(output), "--method", method]
        fixed = ["--model", str(tiny_model("llama")), "--dtype", "float32", "--batch-size", "2", "--grad-accum", "1", "--epochs", "1"]
        assert main([*told, *fixed, *more]) == 0, capfd.readouterr().err
        events = [json.loads(text) for text in capfd.readouterr().out.splitlines()]
        return TrainingRecord.model_validate_json((output / "training_record.json").read_bytes()), events

    return run


@pytest.mark.parametrize("engine", ["tree", "dense"])
@pytest.mark.parametrize("method", ["weighted", "dpo", "kto"])
def test_a_method_trains_by_either_engine_and_records_what_it_did(train: Train, method: str, engine: str) -> None:
    record, events = train(
        method, [line(method, n) for n in range(N)], [line(method, n) for n in (8, 9)], "--engine", engine, "--verify", "--lr", "0.05"
    )
    assert (record.method, record.engine, record.samples_trained, record.steps, record.held_out_rows) == (
        method,
        engine,
        N,
        2,
        4 if method == "dpo" else 2,
    )
    ids = [number_of(n, 100 + n) if method == "dpo" else number_of(n) for n in range(N)]
    assert record.used_episode_ids == [one for pair in ids for one in pair]
    assert record.held_out_loss_after != record.held_out_loss_before
    before, after = (event for event in events if event["event"] == "held_out")
    if method == "weighted":
        assert "accuracy" not in before
        assert record.held_out_accuracy_before is None
    else:
        assert record.held_out_accuracy_before == before["accuracy"] == 0.5
        assert record.held_out_accuracy_after == after["accuracy"]
        assert [event["step"] for event in events if event["event"] == "reference"][-1] == {"dpo": 2 * (N + 2), "kto": 2 * (N + 2)}[method]


@pytest.mark.parametrize(("method", "n_rows"), [("dpo", 4), ("kto", 4)])
def test_of_a_training_that_ends_early_the_base_model_measures_only_what_it_comes_to(train: Train, method: str, n_rows: int) -> None:
    record, events = train(method, [line(method, n) for n in range(20)], [], "--max-steps", "1")
    assert record.samples_trained == 2
    assert {event["steps"] for event in events if event["event"] == "reference"} == {n_rows}


def test_what_is_held_out_and_not_measured_is_told(train: Train) -> None:
    same = line("dpo", 9, rejected=[{"role": "assistant", "content": "do 9"}])
    held_out = [same, line("kto", 8), line("dpo", 5), line("dpo", 6)]
    _, events = train("dpo", [line("dpo", 1)], held_out, "--held-out-tokens", "1")
    told = [event["message"] for event in events if event["event"] in ("warning", "note")]
    assert "left out of what is held out: kind_kto 1, pair_identical 1" in told
    assert "measured on 1 of 2 held-out pairs: no more fit into --held-out-tokens 1" in told


def test_an_empty_file_of_held_out_samples_is_told(train: Train) -> None:
    record, events = train("sft", [line("sft", 1)], [])
    assert record.held_out_loss_before is None
    (warning,) = (event["message"] for event in events if event["event"] == "warning")
    assert warning.startswith("nothing is measured on held-out tasks: ")


def test_kto_says_when_it_has_no_other_prompts(train: Train) -> None:
    _, events = train("kto", [line("kto", 2)], [line("kto", 3)])
    told = [event["message"] for event in events if event["event"] == "warning"]
    assert told == [
        "all samples are desirable: the model is not told what to avoid",
        "all samples begin alike: kto has no answers to other prompts to compare with, and takes their gain (z) as 0",
    ]
