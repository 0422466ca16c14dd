"""The command line of the training process."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.train.arguments import TrainArguments, parse_arguments


@pytest.fixture
def needed(tmp_path: Path) -> list[str]:
    (tmp_path / "data.jsonl").write_text("")
    return ["--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "out"), "--model", "base"]


def test_defaults_are_those_of_the_trainer(needed: list[str]) -> None:
    arguments, config, options = parse_arguments(needed), LoraTrainerConfig(), TrainOptions()
    assert (arguments.rank, arguments.alpha, arguments.dropout) == (config.lora_rank, config.lora_alpha, config.lora_dropout)
    assert (arguments.epochs, arguments.batch_size, arguments.grad_accum) == (
        config.epochs,
        config.batch_size,
        config.gradient_accumulation,
    )
    assert (arguments.lr, arguments.max_seq_length) == (config.learning_rate, config.max_seq_length)
    assert (arguments.seed, arguments.dtype, arguments.max_steps) == (options.seed, options.dtype, options.max_steps)
    assert arguments.held_out is None


@pytest.mark.parametrize(
    ("flag", "values", "expected"),
    [
        ("--rank", ["0", "-1"], "at least 1"),
        ("--alpha", ["0", "-2", "nan", "inf"], "a finite number above 0"),
        ("--dropout", ["-0.1", "1", "nan", "inf"], "0 <= dropout < 1"),
        ("--epochs", ["0"], "at least 1"),
        ("--batch-size", ["0"], "at least 1"),
        ("--grad-accum", ["0"], "at least 1"),
        ("--lr", ["0", "1", "-0.001", "nan", "inf"], "0 < lr < 1"),
        ("--max-seq-length", ["15"], "at least 16"),
        ("--max-steps", ["0"], "at least 1"),
        ("--warmup-ratio", ["-0.1", "1", "nan"], "0 <= ratio < 1"),
        ("--max-grad-norm", ["0", "nan"], "more than 0"),
        ("--held-out-tokens", ["0"], "at least 1"),
        ("--seed", ["-1", str(2**63)], "0 <= seed < 2^63"),
        ("--held-out", ["/no/such.jsonl"], "no such file"),
        ("--data", ["/no/such.jsonl"], "no such file"),
    ],
)
def test_value_out_of_its_range_ends_with_2_and_says_which_is_expected(
    needed: list[str], capsys: pytest.CaptureFixture[str], flag: str, values: list[str], expected: str
) -> None:
    for value in values:
        with pytest.raises(SystemExit) as ended:
            parse_arguments([*needed, f"{flag}={value}"])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert re.search(rf"error: {flag} \S+: .*{re.escape(expected)}", said), said


@pytest.mark.parametrize(
    "extra", [["--rank", "1.5"], ["--lr", "fast"], ["--dtype", "float16"], ["--unknown", "1"], ["--epoch", "1"], ["stray"]]
)
def test_argument_that_is_not_understood_ends_with_2(needed: list[str], extra: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments([*needed, *extra])
    assert ended.value.code == 2


def test_every_setting_can_be_given(needed: list[str], tmp_path: Path) -> None:
    given = [
        "--rank=8",
        "--alpha=1.5",
        "--dropout=0",
        "--epochs=1",
        "--batch-size=2",
        "--grad-accum=1",
        "--lr=0.00001",
        "--max-seq-length=16",
    ]
    own = [
        f"--held-out={tmp_path}/data.jsonl",
        "--held-out-tokens=1",
        "--seed=5",
        "--dtype=bfloat16",
        "--max-steps=1",
        "--warmup-ratio=0",
        "--max-grad-norm=0.5",
        "--engine=dense",
        "--max-memory=1",
        "--verify",
        "--long=elide",
        "--method=kto",
        "--beta=0.2",
        "--loss=ipo",
        "--desirable-weight=2",
        "--undesirable-weight=3",
        f"--adapter={tmp_path}",
        f"--checkpoints={tmp_path}/checkpoints",
        "--checkpoint-every=4",
        "--resume",
        "--force",
        "--time-limit=9.5",
        "--eval-every=2",
        "--early-stop=3",
        "--wait",
        "--check",
    ]
    arguments = parse_arguments([*needed, *given, *own])
    default = parse_arguments(needed)
    same = [field.name for field in fields(TrainArguments) if getattr(arguments, field.name) == getattr(default, field.name)]
    assert same == ["data", "output", "model"]


def test_wrong_arguments_are_told_without_loading_torch(needed: list[str]) -> None:
    code = "import sys\nfrom loraloop.train.__main__ import main\ntry:\n    main(sys.argv[1:])\nfinally:\n    print('torch' in sys.modules, 'transformers' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code, *needed, "--rank", "0"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stdout == "False False\n"
    assert "--rank 0: expected at least 1" in ended.stderr
