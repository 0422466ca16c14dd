"""The training process by every method, as a real process on a tiny model; and whole trainings by both engines."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_config
from train.test_exactness_methods import kto_units, objective, pairs, weighted_units
from train.tree_cases import VOCABULARY

from loraloop.files import file_sha256
from loraloop.train import loop
from loraloop.train.__main__ import main
from loraloop.train.architecture import read_architecture
from loraloop.train.arithmetic import TorchArithmetic
from loraloop.train.dense import DenseEngine
from loraloop.train.engine import Plan, TreeEngine
from loraloop.train.objectives import Engine
from loraloop.training_record import TrainingRecord

GOOD, BAD = "yes, it is so", "no"


def turns(*words: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": word} for role, word in zip(["user", "assistant"] * len(words), words, strict=False)]


def lines_of(method: str) -> list[dict[str, Any]]:
    """Samples that all say the same: GOOD is better than BAD."""
    lines: list[dict[str, Any]] = []
    for number in range(6):
        question, ids = f"question {number}", {"episode_id": f"good-{number}"}
        good, bad = turns(question, GOOD), turns(question, BAD)
        if method in ("sft", "weighted"):
            lines.append({"kind": method, "conversations": good, "weight": 1.0 + number % 2, **ids})
        elif method == "dpo":
            lines.append(
                {"kind": "dpo", "conversations": good, "n_prompt": 1, "rejected": bad[1:], "rejected_episode_id": f"bad-{number}", **ids}
            )
        else:
            lines.append({"kind": "kto", "desirable": True, "conversations": good, **ids})
            lines.append({"kind": "kto", "desirable": False, "conversations": bad, "episode_id": f"bad-{number}"})
    return lines


def train(
    folder: Path, method: str, base: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[TrainingRecord, list[dict[str, Any]]]:
    """The record and the events of one training."""
    folder.mkdir()
    data, output = folder / "train.jsonl", folder / "adapter"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines_of(method)))
    settings = ["--rank", "4", "--epochs", "6", "--batch-size", "4", "--grad-accum", "1", "--lr", "0.02", "--max-seq-length", "256"]
    told = ["--data", str(data), "--held-out", str(data), "--output", str(output), "--model", str(base), "--method", method]
    code = main([*told, *settings, *options])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    events = [json.loads(line) for line in captured.out.splitlines() if line.startswith("{")]
    return TrainingRecord.model_validate_json((output / "training_record.json").read_bytes()), events


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the reference's numbers are kept; not the user's."""
    monkeypatch.setenv("LORALOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("engine", ["tree", "dense"])
@pytest.mark.parametrize("method", ["sft", "weighted", "dpo", "kto"])
def test_every_method_trains_lowers_its_held_out_loss_and_tells_what_it_used(
    method: str, engine: str, tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, events = train(tmp_path / "run", method, tiny_model("llama"), capsys, "--engine", engine)
    assert (record.method, record.engine, record.samples_trained) == (method, engine, len(lines_of(method)))
    assert record.held_out_loss_after < record.held_out_loss_before - 0.05
    by_preference = method in ("dpo", "kto")
    both = {f"{side}-{number}" for side in ("good", "bad") for number in range(6)}
    assert set(record.used_episode_ids) == (both if by_preference else {one for one in both if one.startswith("good")})
    steps = [event for event in events if event["event"] == "step"]
    assert all((event.get("accuracy") is not None) == by_preference for event in steps)
    if by_preference:
        assert (record.held_out_accuracy_before, record.held_out_accuracy_after) == pytest.approx((0.5, 1.0))
        assert record.settings["dropout"] == 0.0
        assert any("trains without dropout" in str(event.get("message")) for event in events)
        assert [event["event"] for event in events].count("reference") >= 1


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_second_run_knows_the_reference_and_gives_the_same_adapter(
    method: str, tiny_model: Callable[[str], Path], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = train(tmp_path / "first", method, tiny_model("qwen2"), capsys)
    (kept,) = (cache / "reference").iterdir()
    second, events = train(tmp_path / "second", method, tiny_model("qwen2"), capsys)
    assert any("known from an earlier run" in str(event.get("message")) for event in events)
    assert not [event for event in events if event["event"] == "reference"]
    weights = [file_sha256(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("first", "second")]
    assert weights[0] == weights[1]
    kept.write_text("[1.0, 2")
    third, events = train(tmp_path / "third", method, tiny_model("qwen2"), capsys)
    assert [event for event in events if event["event"] == "reference"], "a damaged file is not believed"
    assert first.loss_history == second.loss_history == third.loss_history


def test_kto_of_one_kind_and_out_of_balance_warns(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = lines_of("kto")
    for name, lines, words in (
        ("bad", [line for line in every if not line["desirable"]], "all samples are undesirable: the model is not told what to do instead"),
        ("good", [line for line in every if line["desirable"]], "all samples are desirable: the model is not told what to avoid"),
        (
            "askew",
            [*every, *(line for line in every * 3 if line["desirable"])],
            "count 4 times as much as undesirable ones; --undesirable-weight 4",
        ),
    ):
        monkeypatch.setitem(globals(), "lines_of", lambda _, lines=lines: lines)
        _, events = train(tmp_path / name, "kto", tiny_model("llama"), capsys, "--max-steps", "1")
        assert any(event["event"] == "warning" and words in event["message"] for event in events), name


@pytest.mark.parametrize("method", ["sft", "weighted", "dpo", "kto"])
def test_verify_takes_every_method(
    method: str, tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, events = train(tmp_path / "run", method, tiny_model("lfm2"), capsys, "--verify", "--max-steps", "1")
    assert any(str(event.get("message")).startswith("verified on the 4 samples of the first step") for event in events)


# --- whole trainings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["weighted", "dpo, sigmoid", "dpo, ipo", "kto"])
@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_thirty_steps_give_the_adapter_of_the_dense_engine_within_float32_rounding(name: str, case: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(make_config(name, vocab_size=VOCABULARY))
    units = {"weighted": weighted_units, "kto": kto_units}.get(case, pairs)()
    adapters: dict[str, torch.Tensor] = {}
    losses: dict[str, list[float]] = {}
    for kind, steps in (("dense", 30), ("tree", 30), ("start", 1)):
        model = loop.new_adapter(copy.deepcopy(base), 4, 8.0, 0.0, 3)
        engine: Engine = TreeEngine(read_architecture(model), Plan(12), TorchArithmetic()) if kind == "tree" else DenseEngine(model, 2)
        goal = objective(case, engine, units, tmp_path / kind)
        settings = loop.LoopSettings(steps, len(units), 1, 1e-3, 0.1, 1.0, steps, 3)
        history = loop.train(loop.Run(model, engine, goal), units, settings, lambda _: None)
        losses[kind] = [loss for _, loss in history.losses]
        adapters[kind] = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    assert losses["dense"][-1] < losses["dense"][0]
    went = (adapters["dense"] - adapters["start"]).norm()
    assert float((adapters["tree"] - adapters["dense"]).norm() / went) <= 1e-4
    assert losses["tree"] == pytest.approx(losses["dense"], rel=1e-5)
