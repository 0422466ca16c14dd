"""LoraTrainer with loraloop's own training process: episodes in, a real adapter and what was measured out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from standin import MakeTrainer

from loraloop.episode import EpisodeId, Failure, Message
from loraloop.errors import EmptyData, ProcessFailed
from loraloop.learn.conversation import ConversationLearn
from loraloop.lora.config import TrainOptions
from loraloop.lora.registry import LoraModelRegistry
from loraloop.testing import make_episode
from loraloop.training_data import is_held_out
from loraloop.training_record import TrainingEvent

TINY = {
    "lora_rank": 4,
    "lora_alpha": 8,
    "lora_dropout": 0,
    "learning_rate": 0.01,
    "batch_size": 2,
    "gradient_accumulation": 1,
    "max_seq_length": 200,
}


def test_episodes_become_an_adapter_with_metrics_and_lineage(
    make_trainer: MakeTrainer, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    usable = [make_episode(id=EpisodeId.from_content(f"{n:032x}"), task_id=f"task {n}") for n in range(12)]
    long = make_episode(id=EpisodeId.from_content("a" * 32), task_id="task 0", messages=(Message(role="assistant", content="x" * 500),))
    refused = [make_episode(outcome=Failure("wrong"), task_id=f"failed {n}") for n in range(3)]
    base = tiny_model("llama")
    heard: list[TrainingEvent] = []
    trainer = make_trainer(None, [*refused, long, *usable], TrainOptions(seed=1, held_out_fraction=0.4), base_model=str(base), **TINY)
    model = trainer.train_sync(ConversationLearn(), on_event=heard.append)

    held_out = [episode.id for episode in usable if is_held_out(f"/{episode.task_id}", 0.4)]
    assert 0 < len(held_out) < 12
    assert not is_held_out("/task 0", 0.4), "the episode that is too long must be among those to train on"
    trained = [episode.id for episode in usable if episode.id not in held_out]
    assert sorted(model.episode_ids) == sorted(trained), "neither held out nor too long"
    assert model.sample_count == len(trained)
    assert model.refused == {"outcome_failure": 3, "turn_too_long": 1}
    metrics = model.metrics
    assert metrics is not None
    assert metrics.final_loss is not None
    assert metrics.held_out_loss_before is not None
    assert metrics.held_out_loss_after is not None
    assert metrics.held_out_loss_after < metrics.held_out_loss_before - 0.2
    assert metrics.gpu_memory_mb is None
    assert (metrics.peak_memory_mb or 0) > 50
    assert metrics.n_supervised_tokens == len(trained) * (len("Seven minutes.") + 1)
    assert (metrics.n_tokens or 0) > metrics.n_supervised_tokens
    assert model.base_sha256 is not None
    assert (model.adapter_path / "adapter_model.safetensors").stat().st_size > 1000
    assert LoraModelRegistry(trainer.config.output_dir).get("latest") == model
    steps = [event for event in heard if event.event == "step"]
    assert [event.step for event in steps] == list(range(1, (len(trained) + 1) // 2 * 3 + 1))
    assert {event.event for event in heard} == {"note", "data", "held_out", "step", "checkpoint", "saved"}


def test_nothing_that_fits_is_empty_data_with_the_reasons(
    make_trainer: MakeTrainer, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    heard: list[TrainingEvent] = []
    trainer = make_trainer(None, base_model=str(tiny_model("llama")), max_seq_length=16)
    with pytest.raises(
        EmptyData, match=r"none of 1 samples gave .* raise max_seq_length \(now 16\) \(refused: turn_too_long 1\)"
    ) as failure:
        trainer.train_sync(ConversationLearn(), on_event=heard.append)
    assert failure.value.refused == {"turn_too_long": 1}
    assert isinstance(failure.value.__cause__, ProcessFailed)
    assert "empty" not in {event.event for event in heard}
    assert list((tmp_path / "adapters").iterdir()) == []


def test_what_stops_our_own_process_is_in_the_error(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(None, base_model=str(tmp_path / "missing"))
    with pytest.raises(ProcessFailed, match=r"BaseModelError: base model '.*missing': no such file or folder") as failure:
        trainer.train_sync(ConversationLearn())
    assert failure.value.exit_code == 1
    assert "Traceback" not in str(failure.value)
    assert list((tmp_path / "adapters").iterdir()) == []
