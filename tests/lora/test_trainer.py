"""LoraTrainer with a stand-in script: what the script is given, and what is made of what it leaves."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
import time
from pathlib import Path

import pytest
from standin import WRITE_ADAPTER, MakeTrainer

from loraloop.episode import ActionRecord, Episode, EpisodeFilter, EpisodeId, EpisodeMetadata, Failure, Message, Success, Timeout, Unknown
from loraloop.errors import LoraTrainerError
from loraloop.learn.conversation import ConversationLearn
from loraloop.learn.worker_task import WorkerTaskLearn
from loraloop.lora.config import TrainOptions
from loraloop.lora.model import LoraModelId
from loraloop.lora.registry import LoraModelRegistry
from loraloop.lora.trainer import training_data_to_json
from loraloop.testing import make_episode
from loraloop.training_data import TrainingData
from loraloop.training_record import TrainingEvent

RECORD_CALL = WRITE_ADAPTER + '(output / "call.json").write_text(json.dumps([sys.executable, *sys.argv]))\n'
RECORD_WORLD = WRITE_ADAPTER + '(output / "world.json").write_text(json.dumps([dict(os.environ), os.getcwd(), sys.stdin.read()]))\n'


def episode_id(number: int) -> EpisodeId:
    return EpisodeId.from_content(f"{number:032x}")


class NamedLearn(ConversationLearn):
    """The learn model of conversations under another name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    @property
    def name(self) -> str:
        return self._name


# --- what the script is given -----------------------------------------------------------------------------------------------


def test_script_is_given_exactly_the_arguments_of_the_contract(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model = make_trainer(RECORD_CALL, base_model="some/base model").train_sync(ConversationLearn())
    assert json.loads((model.adapter_path / "call.json").read_text()) == [
        sys.executable,
        str(tmp_path / "train.py"),
        *("--data", str(tmp_path / "data" / model.id / "train.jsonl")),
        *("--output", str(tmp_path / "adapters" / model.id)),
        *("--model", "some/base model"),
        *("--rank", "16"),
        *("--alpha", "32"),
        *("--dropout", "0.05"),
        *("--epochs", "3"),
        *("--batch-size", "4"),
        *("--grad-accum", "4"),
        *("--lr", "0.0002"),
        *("--max-seq-length", "2048"),
    ]


@pytest.mark.parametrize(
    ("settings", "flag", "text"),
    [
        ({"learning_rate": 1e-5}, "--lr", "0.00001"),
        ({"learning_rate": 3e-7}, "--lr", "0.0000003"),
        ({"learning_rate": 1.25e-4}, "--lr", "0.000125"),
        ({"learning_rate": 0.1}, "--lr", "0.1"),
        ({"lora_alpha": 100}, "--alpha", "100"),
        ({"lora_alpha": 100.0}, "--alpha", "100"),
        ({"lora_alpha": 0.5}, "--alpha", "0.5"),
        ({"lora_alpha": 1e21}, "--alpha", "1" + "0" * 21),
        ({"lora_dropout": 0}, "--dropout", "0"),
        ({"lora_dropout": 0.1}, "--dropout", "0.1"),
    ],
)
def test_numbers_are_written_without_exponent_or_needless_digits(
    make_trainer: MakeTrainer, settings: dict[str, float], flag: str, text: str
) -> None:
    model = make_trainer(RECORD_CALL, **settings).train_sync(ConversationLearn())
    call = json.loads((model.adapter_path / "call.json").read_text())
    assert call[call.index(flag) + 1] == text


def test_environment_and_working_directory_reach_the_script_unchanged_and_its_input_is_empty(make_trainer: MakeTrainer) -> None:
    model = make_trainer(RECORD_WORLD).train_sync(ConversationLearn())
    environment, directory, standard_input = json.loads((model.adapter_path / "world.json").read_text())
    of_libraries = {"LC_CTYPE", "COLUMNS", "LINES"}  # set by Python and readline in their own process, behind os.environ
    assert {key: environment[key] for key in environment.keys() - of_libraries} == {
        key: os.environ[key] for key in os.environ.keys() - of_libraries
    }
    assert directory == os.getcwd()
    assert standard_input == ""


def test_own_process_is_given_the_contract_then_the_options(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(
        f"#!{sys.executable}\nimport json, sys\nfrom pathlib import Path\n"
        "output = Path(sys.argv[sys.argv.index('--output') + 1])\noutput.mkdir(parents=True)\n"
        "for name in ('adapter_config.json', 'adapter_model.safetensors'):\n"
        "    (output / name).write_text(json.dumps(sys.argv[1:]))\n"
    )
    interpreter.chmod(0o755)
    episodes = [make_episode(id=episode_id(n), task_id=f"task {n}") for n in range(10)]
    options = TrainOptions(seed=3, dtype="float32", max_steps=7)
    model = make_trainer(None, episodes, options, python_path=interpreter).train_sync(ConversationLearn())
    call = json.loads((model.adapter_path / "adapter_config.json").read_text())
    held_out = tmp_path / "data" / model.id / "held_out.jsonl"
    assert call[:4] == ["-m", "loraloop.train", "--data", str(held_out.with_name("train.jsonl"))]
    own = "--seed 3 --dtype float32 --engine tree --long window --method sft --max-steps 7 --held-out"
    assert call[24:] == [*own.split(), str(held_out), "--checkpoints", str(held_out.with_name("checkpoints"))]
    kept = [json.loads(line)["episode_id"] for line in held_out.read_text().splitlines()]
    assert kept
    assert sorted([*kept, *model.episode_ids]) == [episode_id(n) for n in range(10)]


def test_training_file_is_known_byte_for_byte(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "find", "description": "é", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{ "b":1, "a": 2 }'}}
    episodes = [
        Episode(
            id=episode_id(1),
            messages=(
                Message(role="system", content="You find things."),
                Message(role="user", content="shown", is_demo=True),
                Message(role="assistant", content="an example", is_demo=True),
                Message(role="user", content="Find “x”\nand y.", author="simulated_user"),
                Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call, call]}),
                Message(role="tool", content="", tool_call_id="c1", name="find"),
                Message(role="assistant", content="wait", weight=0),
                Message(role="assistant", content="Found \u2028 it."),
                Message(role="user", content="Thanks, never trained on."),
            ),
            tools=(tool,),
            outcome=Success(1.0),
            metadata=EpisodeMetadata(created_at=1, tags={"weight": "0.5"}),
        ),
        make_episode(id=episode_id(2), metadata=EpisodeMetadata(created_at=2)),
    ]
    model = make_trainer(WRITE_ADAPTER, episodes).train_sync(ConversationLearn())
    written = '{"id":"c1","type":"function","function":{"name":"find","arguments":"{ \\"b\\":1, \\"a\\": 2 }"}}'
    assert (tmp_path / "data" / model.id / "train.jsonl").read_bytes().decode() == (
        '{"conversations":['
        '{"role":"system","content":"You find things."},'
        '{"role":"user","content":"shown","is_demo":true},'
        '{"role":"assistant","content":"an example","is_demo":true},'
        '{"role":"user","content":"Find “x”\\nand y.","author":"simulated_user"},'
        f'{{"role":"assistant","content":null,"tool_calls":[{written},{written}]}},'
        '{"role":"tool","content":"","name":"find","tool_call_id":"c1"},'
        '{"role":"assistant","content":"wait","weight":0.0},'
        '{"role":"assistant","content":"Found \u2028 it."}'
        '],"kind":"sft",'
        '"tools":[{"type":"function","function":{"name":"find","description":"é","parameters":{"type":"object","properties":{}}}}],'
        '"weight":0.5,"episode_id":"ep-0000000000000-00000000000000000000000000000001"}\n'
        '{"conversations":['
        '{"role":"system","content":"You are a careful cook."},'
        '{"role":"user","content":"How long does an egg boil?"},'
        '{"role":"assistant","content":"Seven minutes."}'
        '],"kind":"sft","episode_id":"ep-0000000000000-00000000000000000000000000000002"}\n'
    )


def test_line_of_a_sample_reads_back_as_the_sample() -> None:
    sample = TrainingData.sft("Be brief.", "Say “hé”", "hé").with_episode_id(episode_id(1))
    line = training_data_to_json(sample)
    assert "\n" not in line
    assert TrainingData.from_line(json.loads(line)) == sample


# --- which episodes are trained on ------------------------------------------------------------------------------------------


def mixed_episodes() -> list[Episode]:
    return [
        make_episode(id=episode_id(1), task_id="a"),
        make_episode(id=episode_id(2), task_id="b", outcome=Failure("wrong")),
        make_episode(id=episode_id(3), task_id="c", outcome=Failure("worse")),
        make_episode(id=episode_id(4), task_id="d", outcome=Timeout(0.9)),
        make_episode(id=episode_id(5), task_id="e", outcome=Unknown()),
        make_episode(id=episode_id(6), task_id="f", messages=(Message(role="user", content="hello?"),)),
        make_episode(id=episode_id(7), task_id="g", outcome=Success(0.2)),
    ]


def test_exactly_the_usable_episodes_are_trained_on_and_the_rest_is_counted(make_trainer: MakeTrainer) -> None:
    model = make_trainer(WRITE_ADAPTER, mixed_episodes()).train_sync(ConversationLearn())
    assert model.episode_ids == (episode_id(1), episode_id(7))
    assert model.sample_count == 2
    assert model.refused == {"no_agent_turn": 1, "outcome_failure": 2, "outcome_timeout": 1, "outcome_unknown": 1}


def test_filter_decides_which_episodes_are_looked_at(make_trainer: MakeTrainer) -> None:
    model = make_trainer(WRITE_ADAPTER, mixed_episodes()).train_sync(ConversationLearn(), EpisodeFilter(task_id="g"))
    assert model.episode_ids == (episode_id(7),)
    assert model.refused == {}


def test_learn_model_itself_converts_and_its_name_is_kept(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    records = (ActionRecord(action="search", target="egg", output="found", task_id="a"), ActionRecord(action="done", task_id="a"))
    episodes = [make_episode(), make_episode(learn_model="worker_task", records=records, messages=())]
    model = make_trainer(WRITE_ADAPTER, episodes).train_sync(WorkerTaskLearn())
    assert model.learn_model_name == "worker_task"
    assert model.refused == {"too_few_actions": 1}
    (line,) = (tmp_path / "data" / model.id / "train.jsonl").read_text().splitlines()
    assert [turn["content"] for turn in json.loads(line)["conversations"]][2:] == ["search egg", "found", "done"]


def test_a_script_gets_every_sample_and_none_is_held_out(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    episodes = [make_episode(id=episode_id(n), task_id=f"task {n}") for n in range(30)]
    model = make_trainer(WRITE_ADAPTER, episodes).train_sync(ConversationLearn())
    assert model.sample_count == len(model.episode_ids) == 30
    kept = ["events.jsonl", "run.json", "state.json", "train.jsonl", "training.log"]
    assert sorted(file.name for file in (tmp_path / "data" / model.id).iterdir()) == kept


# --- what is made of it -----------------------------------------------------------------------------------------------------


def test_model_tells_what_it_was_made_of_and_is_in_the_registry(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    before = time.time_ns() // 1_000_000
    trainer = make_trainer(WRITE_ADAPTER + "time.sleep(0.2)", base_model="some/base")
    model = trainer.train_sync(ConversationLearn())
    assert LoraModelId.parse(model.id) == model.id
    assert model.adapter_path == tmp_path / "adapters" / model.id
    assert (model.adapter_path / "adapter.bin").read_text() == "weights"
    assert (model.base_model, model.learn_model_name, model.sample_count, model.dataset) == ("some/base", "conversation", 1, None)
    assert before <= model.id.timestamp_ms <= model.created_at <= time.time_ns() // 1_000_000
    assert model.metrics is not None
    assert 0.2 < (model.metrics.training_time_secs or 0) < 60
    assert model.metrics.final_loss is None
    assert model.metrics.gpu_memory_mb is None
    assert LoraModelRegistry(tmp_path / "adapters").list_models() == [model]
    assert trainer.config.base_model == "some/base"
    assert trainer.episode_store.count() == 1


def test_two_trainings_at_the_same_moment_do_not_meet(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer("time.sleep(0.3)" + WRITE_ADAPTER)

    async def both() -> list[str]:
        models = await asyncio.gather(*(trainer.train(ConversationLearn()) for _ in range(4)))
        return [str(model.adapter_path) for model in models]

    paths = asyncio.run(both())
    assert len(set(paths)) == 4
    assert len(list((tmp_path / "data").iterdir())) == 4
    assert len(LoraModelRegistry(tmp_path / "adapters").list_models()) == 4


@pytest.mark.parametrize("name", ["../../etc", "/etc", "..", "a/b", "con:\n*?", "x" * 500])
def test_name_of_a_learn_model_never_becomes_a_path(make_trainer: MakeTrainer, tmp_path: Path, name: str) -> None:
    model = make_trainer().train_sync(NamedLearn(name))
    assert model.learn_model_name == name
    assert LoraModelRegistry(tmp_path / "adapters").get(model.id).learn_model_name == name
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert sorted(folders) == sorted(tmp_path / part for part in ("adapters", "data", f"adapters/{model.id}", f"data/{model.id}"))
    assert not any(name in path.name for path in tmp_path.rglob("*") if name != "..")


@pytest.mark.parametrize("name", ["../up", "", ".", "..", "a/b", "/abs", "a/", "nul\0"])
def test_training_data_and_adapters_are_only_put_under_a_plain_name(make_trainer: MakeTrainer, tmp_path: Path, name: str) -> None:
    trainer = make_trainer()
    with pytest.raises(LoraTrainerError, match="is no name for a folder"):
        trainer.write_training_data([TrainingData.sft_simple("a", "b")], name)
    with pytest.raises(LoraTrainerError, match="is no name for a folder"):
        asyncio.run(trainer.run_lora_training(tmp_path / "train.jsonl", name))
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_training_data_never_goes_into_a_folder_that_is_there(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    first = trainer.write_training_data([TrainingData.sft_simple("a", "b")], "mine")
    content = first.read_bytes()
    with pytest.raises(LoraTrainerError, match="exists already; a run never writes over another's data"):
        trainer.write_training_data([TrainingData.sft_simple("c", "d")], "mine")
    assert first.read_bytes() == content


async def test_train_sync_works_within_a_running_event_loop(make_trainer: MakeTrainer) -> None:
    assert make_trainer().train_sync(ConversationLearn()).sample_count == 1
    assert (await make_trainer().train(ConversationLearn())).sample_count == 1


def test_every_stage_logs_its_counts_as_key_and_value(make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "loraloop"):
        model = make_trainer(WRITE_ADAPTER, mixed_episodes()).train_sync(ConversationLearn())
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "stage=convert learn_model=conversation episodes=7 samples=2 refused=5"
    assert lines[1] == f"stage=write model={model.id} samples=2 held_out=0 data={tmp_path}/data/{model.id}/train.jsonl"
    assert lines[2] == f"stage=train model={model.id} script={tmp_path}/train.py log={tmp_path}/data/{model.id}/training.log"
    assert re.fullmatch(rf"stage=done model={model.id} samples=2 seconds=\d+\.\d adapter={tmp_path}/adapters/{model.id}", lines[3])
    assert len(lines) == 4
    assert {record.name for record in caplog.records} == {"loraloop.lora"}


def test_events_that_the_script_prints_are_heard_in_order_and_all_else_is_log(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    script = """
print("plain text")
print(json.dumps({"event": "step", "step": 1, "loss": 2.5, "of_a_later_version": True}))
print("{not json")
print(json.dumps({"loss": 1.0}))
print(json.dumps({"event": "of its own", "step": 2}))
print(json.dumps({"event": "step", "step": "one"}))
print("[]", "null", "{}", "{" + "1" * 5000 + "}", '{"a":' + "[" * 3000, sep="\\n")
print(json.dumps({"event": "step", "step": 2, "loss": None}), end="")
"""
    heard: list[TrainingEvent] = []
    model = make_trainer(script + WRITE_ADAPTER).train_sync(ConversationLearn(), on_event=heard.append)
    assert heard == [TrainingEvent(event="step", step=1, loss=2.5), TrainingEvent(event="step", step=2)]
    log = (tmp_path / "data" / model.id / "training.log").read_text()
    assert log.startswith("plain text\n")
    assert "of_a_later_version" in log
