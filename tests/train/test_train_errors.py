"""The training process when it cannot train, and what it measures on held-out samples; in this process, on tiny models."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraloop.train.__main__ import main
from loraloop.training_record import TrainingRecord

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

SETTINGS = ["--rank=4", "--alpha=8", "--dropout=0", "--epochs=1", "--batch-size=2", "--grad-accum=1", "--lr=0.01", "--max-seq-length=200"]


def line(question: str = "Say hello", answer: str = "hello", number: int = 1) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns, "episode_id": f"ep-{0:013d}-{number:032x}"}


UNUSABLE = {"conversations": [{"role": "user", "content": "hello?"}]}


@pytest.fixture
def base(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def run(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[dict[str, Any]], str]]:
    """Train on `lines`: (exit code, events, what was said on stderr)."""

    def train(*lines: object, more: tuple[str, ...] = (), model: str | Path = base, held_out: tuple[object, ...] = ()) -> Any:
        arguments = ["--data", str(write(tmp_path / "data.jsonl", lines)), "--output", str(tmp_path / "out"), "--model", str(model)]
        if held_out:
            arguments += ["--held-out", str(write(tmp_path / "held_out.jsonl", held_out))]
        code = main([*arguments, *SETTINGS, *more])
        said = capsys.readouterr()
        return code, [json.loads(event) for event in said.out.splitlines() if event.startswith("{")], said.err

    return train


def write(path: Path, lines: tuple[object, ...]) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def copy_model(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    return folder


def assert_refused(ended: tuple[int, list[dict[str, Any]], str], output: Path, *parts: str) -> None:
    """Exit 1, one message with all of `parts`, no step taken, no folder."""
    code, events, said = ended
    assert code == 1
    for part in parts:
        assert part in said
    assert "Traceback" not in said
    assert [event for event in events if event["event"] in ("step", "saved")] == []
    assert not output.exists()


# --- the data ---------------------------------------------------------------------------------------------------------------


def test_a_line_that_is_not_json_is_named(run: Any, tmp_path: Path) -> None:
    assert_refused(run(line(), line(), '{"conversations":'), tmp_path / "out", "ValueError", "data.jsonl, line 3: not JSON")


def test_a_line_that_is_no_sample_is_named(run: Any, tmp_path: Path) -> None:
    assert_refused(run(line(), {"text": "hello"}), tmp_path / "out", "data.jsonl, sample 2: expected an object with `conversations`")


def test_a_file_of_which_nothing_can_be_trained_is_empty_data(run: Any, tmp_path: Path) -> None:
    ended = run(UNUSABLE, UNUSABLE)
    assert_refused(ended, tmp_path / "out", "EmptyData: Empty data: none of 2 samples", "refused: no_agent_turn 2")
    (empty,) = (event for event in ended[1] if event["event"] == "empty")
    assert "the first refusal: no_agent_turn, no turn of the agent's own" in empty["message"]


def test_an_empty_file_is_empty_data(run: Any, tmp_path: Path) -> None:
    assert_refused(run(), tmp_path / "out", "EmptyData: Empty data: none of 0 samples gave anything to train on")


def test_text_that_no_tokenizer_takes_is_refused_and_the_rest_is_trained(run: Any, tmp_path: Path) -> None:
    code, _, said = run(line(), line(answer="cut \ud83d off", number=2))
    assert code == 0, said
    record = TrainingRecord.model_validate_json((tmp_path / "out" / "training_record.json").read_bytes())
    assert record.used_episode_ids == [line()["episode_id"]]
    assert record.data.refused == {"not_unicode": 1}
    assert [refused.episode_id for refused in record.refused] == [line(number=2)["episode_id"]]


def test_the_lightest_and_the_heaviest_weights_that_are_trained_give_numbers(run: Any, tmp_path: Path) -> None:
    lines = [{**line(number=number), "weight": weight} for number, weight in enumerate((1e6, 1e-6, 1e300, 0))]
    for engine in ("tree", "dense"):
        code, _, said = run(*lines, more=(f"--engine={engine}",))
        assert code == 0, said
        record = TrainingRecord.model_validate_json((tmp_path / "out" / "training_record.json").read_bytes())
        assert record.data.refused == {"weight_out_of_range": 1, "weight_zero": 1}
        assert all(math.isfinite(loss) for _, loss in record.loss_history)
        shutil.rmtree(tmp_path / "out")


def test_a_template_that_loses_tool_calls_is_refused_before_the_first_step(run: Any, base: Path, tmp_path: Path) -> None:
    from chat.test_rows import LOSES_CALLS

    model = copy_model(base, tmp_path / "losing")
    (model / "chat_template.jinja").write_text(LOSES_CALLS)
    call = {"type": "function", "function": {"name": "find", "arguments": "{}"}}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "I look.", "tool_calls": [call]}]
    ended = run(line(), {"conversations": turns}, model=model)
    assert_refused(ended, tmp_path / "out", "RenderError: the data check failed: tool_calls_lost in 1 rows", "Nothing was trained")


# --- the output -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["empty folder", "folder", "file"])
def test_an_output_that_is_there_already_is_refused_at_once_and_left_alone(run: Any, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("kept")
    else:
        output.mkdir()
    if kind == "folder":
        (output / "file").write_text("kept")
    before = [(path.name, path.is_file() and path.read_text()) for path in sorted(tmp_path.rglob("*"))]
    code, events, said = run(line())
    assert (code, events) == (1, [])
    assert f"FileExistsError: --output {output} exists already; give a folder that does not exist" in said
    (tmp_path / "data.jsonl").unlink()
    assert [(path.name, path.is_file() and path.read_text()) for path in sorted(tmp_path.rglob("*"))] == before


# --- the base model ---------------------------------------------------------------------------------------------------------


def test_an_unknown_base_gives_one_clear_error(run: Any, tmp_path: Path) -> None:
    ended = run(line(), model="nobody/no-such-model")
    assert_refused(
        ended, tmp_path / "out", "BaseModelError: base model 'nobody/no-such-model' is not on this machine and cannot be had from the hub"
    )
    assert len(ended[2].strip().splitlines()) == 1


def test_a_folder_with_pickled_weights_only_is_refused(run: Any, base: Path, tmp_path: Path) -> None:
    model = copy_model(base, tmp_path / "pickled")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert_refused(run(line(), model=model), tmp_path / "out", "BaseModelError", "(pickled weights, .bin and .pt, are not read)")


def test_a_base_without_a_chat_template_is_refused(run: Any, base: Path, tmp_path: Path) -> None:
    model = copy_model(base, tmp_path / "plain")
    (model / "chat_template.jinja").unlink()
    assert_refused(run(line(), model=model), tmp_path / "out", "RenderError", "has no chat template; use an instruct model")


def test_a_gguf_file_that_is_not_gguf_is_refused(run: Any, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 a zip file")
    assert_refused(run(line(), model=tmp_path / "model.gguf"), tmp_path / "out", "BaseModelError", "is a file but not GGUF")


def test_a_base_whose_weights_are_not_numbers_is_told_at_its_first_step(run: Any, base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = copy_model(base, tmp_path / "broken")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"].fill_(math.nan)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    ended = run(line(number=5), model=model)
    assert_refused(ended, tmp_path / "out", "LoraTrainerError: the loss of step 1 is nan", f"its samples came from ep-{0:013d}-{5:032x}")
    ended = run(line(), model=model, held_out=(line(),))
    assert_refused(ended, tmp_path / "out", "LoraTrainerError: the held-out loss before training is nan")


def test_an_adapter_that_overflows_is_told_with_its_step(run: Any, tmp_path: Path) -> None:
    code, _, said = run(line(), more=("--alpha=1e38", "--epochs=5"))
    assert code == 1
    assert "LoraTrainerError: the loss of step " in said
    assert not (tmp_path / "out").exists()


# --- held-out samples -------------------------------------------------------------------------------------------------------


def test_held_out_loss_is_measured_before_and_after_and_nothing_of_it_is_trained(run: Any, tmp_path: Path) -> None:
    held_out = (line("Say hello again", "hello", 8), UNUSABLE, line("Greet", "hello", 9))
    code, events, said = run(line(), line(number=2), held_out=held_out, more=("--epochs=20",))
    assert code == 0, said
    kinds = [event["event"] for event in events if event["event"] != "note"]
    assert kinds == ["data", "warning", "held_out", *["step"] * 20, "held_out", "saved"]
    (left_out,) = (event["message"] for event in events if event["event"] == "warning")
    assert left_out.startswith("left out of what is held out: ")
    before, after = (event for event in events if event["event"] == "held_out")
    assert (before["message"], after["message"]) == ("before", "after")
    assert after["loss"] < before["loss"] - 0.2
    record = TrainingRecord.model_validate_json((tmp_path / "out" / "training_record.json").read_bytes())
    assert (record.held_out_loss_before, record.held_out_loss_after, record.held_out_rows) == (before["loss"], after["loss"], 2)
    assert record.held_out_sha256 is not None
    assert record.used_episode_ids == [line(number=number)["episode_id"] for number in (1, 2)]
    assert record.data.samples == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{before['loss']:.4f} before, {after['loss']:.4f} after, over 2 rows" in card


def test_held_out_samples_beyond_the_token_limit_are_not_measured_but_one_always_is(run: Any, tmp_path: Path) -> None:
    held_out = tuple(line(number=number) for number in range(10, 20))
    n_tokens = 31 + 4  # of one such sample: bytes, and four special tokens
    for limit, rows in ((3 * n_tokens, 3), (1, 1)):
        code, _, said = run(line(), held_out=held_out, more=(f"--held-out-tokens={limit}",))
        assert code == 0, said
        record = TrainingRecord.model_validate_json((tmp_path / "out" / "training_record.json").read_bytes())
        assert record.held_out_rows == rows
        assert record.data.n_tokens == n_tokens
        shutil.rmtree(tmp_path / "out")


def test_held_out_samples_that_cannot_be_used_are_no_reason_not_to_train(run: Any, tmp_path: Path) -> None:
    code, events, said = run(line(), held_out=(UNUSABLE,))
    assert code == 0, said
    (warning,) = (event for event in events if event["event"] == "warning")
    assert "nothing is measured on held-out tasks" in warning["message"]
    record = TrainingRecord.model_validate_json((tmp_path / "out" / "training_record.json").read_bytes())
    assert (record.held_out_loss_before, record.held_out_loss_after, record.held_out_rows) == (None, None, 0)


def test_training_ends_after_the_steps_that_it_may_take(run: Any, tmp_path: Path) -> None:
    code, events, _ = run(*[line(number=number) for number in range(20)], more=("--max-steps=3",))
    assert code == 0
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3]
    assert TrainingRecord.model_validate_json((tmp_path / "out" / "training_record.json").read_bytes()).steps == 3


@pytest.mark.parametrize(("steps", "n_used"), [(1, 2), (2, 4), (9, 10)])
def test_episodes_recorded_as_used_are_those_that_were_in_a_step(run: Any, tmp_path: Path, steps: int, n_used: int) -> None:
    code, _, said = run(*[line(number=number) for number in range(10)], more=("--epochs=2", f"--max-steps={steps}"))
    assert code == 0, said
    record = TrainingRecord.model_validate_json((tmp_path / "out" / "training_record.json").read_bytes())
    order: list[int] = []
    for epoch in range(2):
        drawn = list(range(10))
        random.Random(f"0:{epoch}").shuffle(drawn)
        order += drawn
    assert record.used_episode_ids == [line(number=number)["episode_id"] for number in sorted(set(order[: 2 * steps]))]
    assert (record.samples_trained, len(record.used_episode_ids), record.data.samples_used) == (n_used, n_used, 10)
