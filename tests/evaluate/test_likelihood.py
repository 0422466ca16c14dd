"""Figures on held-out samples are what a plain computation gives, on what never was trained on, and paired by sample."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
from sides import make_project

from loraloop.base_model import load_tokenizer, resolve_base
from loraloop.chat.rows import build_units
from loraloop.chat.template import ChatTemplate
from loraloop.dataset import DatasetSettings
from loraloop.episode import Episode, Failure, Message, Success
from loraloop.errors import SettingsError
from loraloop.evaluate.likelihood import HeldOutSample, MeasuredSamples, measure_samples
from loraloop.evaluate.rollout import Player, load_player
from loraloop.evaluation import EvaluationOptions
from loraloop.evaluation.held_out import list_held_out
from loraloop.train import loop
from loraloop.train.dense import DenseEngine
from loraloop.train.objectives import Likelihood
from loraloop.training_data import TrainingData

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def talk(*turns: str) -> tuple[Message, ...]:
    return tuple(Message(role="user" if number % 2 == 0 else "assistant", content=text) for number, text in enumerate(turns))


def sample(*turns: str) -> TrainingData:
    return TrainingData(messages=talk(*turns))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Player:
    """A tiny model that has learned one conversation by heart."""
    base = resolve_base(str(tiny.make_model("llama", tmp_path_factory.mktemp("taught") / "base")))
    player = load_player(base, dtype="float32")
    units = build_units([sample("make a box", "so:\nget 2 log", "Got 2 log", "craft box")], ChatTemplate(load_tokenizer(base)), 512).units
    for parameter in player.model.parameters():
        parameter.requires_grad_(requires_grad=True)
    settings = loop.LoopSettings(
        epochs=120, batch_size=1, gradient_accumulation=1, learning_rate=1e-2, warmup_ratio=0.1, max_grad_norm=1.0, max_steps=None, seed=0
    )
    loop.train(loop.Run(player.model, DenseEngine(player.model, batch_size=1), Likelihood()), units, settings, lambda event: None)
    player.model.eval()
    return player


def measured(player: Player, tmp_path: Path, *samples: HeldOutSample) -> dict[str, dict[str, float]]:
    kept = MeasuredSamples(tmp_path)
    engine = DenseEngine(player.model, 4)
    measure_samples(("candidate", lambda: (player, lambda rows: engine.measure(rows).tolist())), samples, kept)
    assert MeasuredSamples(tmp_path).known == kept.known, "all is on the disk"
    return {one.key: one.figures for one in kept.known.values()}


def test_what_was_learned_is_exact_and_what_differs_is_told_apart(taught: Player, tmp_path: Path) -> None:
    found = measured(
        taught,
        tmp_path,
        HeldOutSample("same", "success", sample("make a box", "so:\nget 2 log", "Got 2 log", "craft box")),
        HeldOutSample("other arguments", "success", sample("make a box", "so:\nget 3 log")),
        HeldOutSample("other thought", "success", sample("make a box", "hm\nget 2 log")),
        HeldOutSample("other tool", "success", sample("make a box", "take 2 log")),
        HeldOutSample("half", "failure", sample("make a box", "so:\nget 2 log", "Got 2 log", "stop")),
    )
    shares = {key: (figures["action_named"], figures["action_exact"]) for key, figures in found.items()}
    assert shares == {
        "same": (1, 1),
        "other arguments": (1, 0),
        "other thought": (1, 1),
        "other tool": (0, 0),
        "half": (0.5, 0.5),
    }
    assert found["same"]["loss"] < 0.05 < found["half"]["loss"]


def test_the_loss_is_that_of_a_plain_forward_pass(taught: Player, tmp_path: Path) -> None:
    import torch

    one = sample("make a box", "take 2 log")
    found = measured(taught, tmp_path, HeldOutSample("one", "success", one))
    text = "<|im_start|>user\nmake a box<|im_end|>\n<|im_start|>assistant\n"
    prompt, said = (taught.template.encode(part)[0] for part in (text, "take 2 log<|im_end|>"))
    with torch.no_grad():
        logits = taught.model(input_ids=torch.tensor([prompt + said])).logits[0].double().log_softmax(-1)
    nll = -sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(said)) / len(said)
    assert math.isclose(found["one"]["loss"], nll, rel_tol=1e-5)


def test_of_a_pair_the_likelier_side_per_token_is_preferred(taught: Player, tmp_path: Path) -> None:
    learned, other = "so:\nget 2 log", "no"
    found = measured(
        taught,
        tmp_path,
        HeldOutSample("right", "pair", TrainingData.dpo("make a box", learned, other)),
        HeldOutSample("wrong", "pair", TrainingData.dpo("make a box", other, learned)),
    )
    assert {key: figures["preferred"] for key, figures in found.items()} == {"right": 1, "wrong": 0}


def fill(project, n_tasks: int = 24) -> None:
    for number in range(n_tasks):
        question = f"task {number}: count {'abcdefghijklmnopqrstuvwxyz'[number]} in {number * 7919}"
        for attempt, outcome in enumerate((Success(), Failure("wrong"))):
            messages = talk(question, f"look {number} {attempt}", f"seen {number}", f"say {number * 3} {attempt}")
            project.store.append(Episode(task_id=f"t{number}", messages=messages, outcome=outcome))


def test_held_out_successes_and_failures_of_the_same_tasks_are_measured(tmp_path: Path) -> None:
    project, _, [model] = make_project(tmp_path)
    with project:
        fill(project)
        dataset = project.build(settings=DatasetSettings(held_out_fraction=0.25, unknown_license="allow"))
        held = list_held_out(dataset, project.store)
        tasks = {
            ending: {project.store.get(one.sample.episode_id).task_id for one in held if one.ending == ending}
            for ending in ("success", "failure")
        }
        assert tasks["success"] == tasks["failure"] != set()
        trained = {project.store.get(one.episode_id).task_id for one in dataset.load_training()}
        assert trained.isdisjoint(tasks["failure"])
        assert list_held_out(dataset, project.store) == held
        assert len(list_held_out(dataset, project.store, 2)) == 4

        found = project.evaluate(model.id, "base", EvaluationOptions(dataset=dataset.id))
        names = [comparison.name for comparison in found.comparisons]
        assert names == [
            f"{figure} ({ending})"
            for ending in ("successes", "failures")
            for figure in ("next action exact", "next action named", "loss per token")
        ]
        assert found.get_comparison("loss per token (successes)").n == len(tasks["success"])
        assert not found.get_comparison("loss per token (successes)").higher_is_better
        assert found.get_comparison("loss per token (failures)").difference != 0
        assert (found.plan.dataset, found.plan.n_samples) == (dataset.id, len(held))

        kept = tmp_path / "project" / "evaluations" / found.id / "samples.jsonl"
        lines = kept.read_bytes().splitlines(keepends=True)
        (kept.parent / "evaluation.json").unlink()
        kept.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # as a kill leaves it
        assert project.evaluate(model.id, "base", EvaluationOptions(dataset=dataset.id)) == found
        assert kept.read_bytes().splitlines(keepends=True) == lines
        with pytest.raises(SettingsError, match="agent is served: held-out samples need weights"):
            project.evaluate("agent@http://127.0.0.1:9", model.id, EvaluationOptions(dataset=dataset.id))
