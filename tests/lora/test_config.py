"""The trainer's configuration: its defaults, and the range of every value."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest

from loraloop.errors import SettingsError
from loraloop.lora.config import LoraTrainerConfig, TrainOptions

WHOLE_NUMBERS = {"lora_rank": 1, "epochs": 1, "batch_size": 1, "gradient_accumulation": 1, "max_seq_length": 16}
NUMBERS = {"lora_alpha": "> 0", "lora_dropout": ">= 0 and < 1", "learning_rate": "> 0 and < 1"}
OUT_OF_RANGE = {"lora_alpha": (0, -1.0), "lora_dropout": (-0.01, 1, 1.0, 2.5), "learning_rate": (0, 0.0, -1e-4, 1, 1.0, 50)}
NO_NUMBERS = (True, False, math.nan, math.inf, -math.inf, 10**400, "5", None, [1], 1j)


def test_defaults_are_those_of_the_system_that_it_implements() -> None:
    assert dataclasses.asdict(LoraTrainerConfig()) == {
        "base_model": "LiquidAI/LFM2.5-1.2B-Instruct",
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.05,
        "epochs": 3,
        "batch_size": 4,
        "gradient_accumulation": 4,
        "learning_rate": 2e-4,
        "max_seq_length": 2048,
        "train_script": None,
        "output_dir": "lora/adapters",
        "data_dir": "lora/data",
        "python_path": None,
    }


def test_config_takes_keyword_arguments_only() -> None:
    with pytest.raises(TypeError):
        LoraTrainerConfig("some/model")  # type: ignore[misc]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LoraTrainerConfig)])
def test_no_field_can_be_changed(name: str) -> None:
    config = LoraTrainerConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))


@pytest.mark.parametrize(("name", "low"), WHOLE_NUMBERS.items())
def test_whole_number_below_its_least_or_of_another_type_is_refused(name: str, low: int) -> None:
    for value in (low - 1, -1, 2.5, float(low), *NO_NUMBERS[:5], "5", None, [1]):
        with pytest.raises(SettingsError) as failure:
            LoraTrainerConfig(**{name: value})
        assert str(failure.value) == f"{name}={value!r}: expected a whole number >= {low}"
    assert getattr(LoraTrainerConfig(**{name: low}), name) == low


@pytest.mark.parametrize(("name", "range_"), NUMBERS.items())
def test_number_out_of_its_range_or_of_another_type_is_refused(name: str, range_: str) -> None:
    for value in (*OUT_OF_RANGE[name], *NO_NUMBERS):
        with pytest.raises(SettingsError) as failure:
            LoraTrainerConfig(**{name: value})
        assert str(failure.value) == f"{name}={value!r}: expected a finite number {range_}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_alpha", 1e-9),
        ("lora_alpha", 8),
        ("lora_dropout", 0),
        ("lora_dropout", 0.999),
        ("learning_rate", 1e-12),
        ("learning_rate", 0.99),
    ],
)
def test_number_at_the_edge_of_its_range_is_taken(name: str, value: float) -> None:
    assert getattr(LoraTrainerConfig(**{name: value}), name) == value


@pytest.mark.parametrize("name", ["base_model", "output_dir", "data_dir", "train_script", "python_path"])
def test_text_that_is_empty_or_no_text_is_refused(name: str) -> None:
    bad: list[Any] = ["", "  ", "a\0b", 5, True, math.nan, b"bytes", ["a"]]
    if name not in ("train_script", "python_path"):
        bad.append(None)
    for value in bad:
        with pytest.raises(SettingsError, match=f"^{name}=.*: expected a text that is not empty$") as failure:
            LoraTrainerConfig(**{name: value})
        assert repr(value) in str(failure.value)


@pytest.mark.parametrize("name", ["output_dir", "data_dir", "train_script", "python_path"])
def test_paths_may_be_path_objects(name: str) -> None:
    assert getattr(LoraTrainerConfig(**{name: Path("some/where")}), name) == Path("some/where")


def test_settings_errors_are_value_errors_too() -> None:
    with pytest.raises(ValueError, match="lora_rank=0"):
        LoraTrainerConfig(lora_rank=0)


def test_replace_gives_a_changed_copy_and_checks_it() -> None:
    config = LoraTrainerConfig()
    changed = config.replace(lora_rank=8, learning_rate=1e-3)
    assert (changed.lora_rank, changed.learning_rate) == (8, 1e-3)
    assert config == LoraTrainerConfig()
    assert changed.replace(lora_rank=16, learning_rate=2e-4) == config
    with pytest.raises(SettingsError, match="lora_dropout=1: expected a finite number >= 0 and < 1"):
        config.replace(lora_dropout=1)


def test_replace_of_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"no setting named 'lora_rnak'; known: base_model, .* Did you mean lora_rank\?"):
        LoraTrainerConfig().replace(lora_rnak=8)


def test_config_is_hashable_and_survives_pickling() -> None:
    config = LoraTrainerConfig(lora_rank=8)
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(config.replace())


# --- options of our own process ---------------------------------------------------------------------------------------------


def test_options_become_arguments_of_our_own_process() -> None:
    assert TrainOptions().to_argv() == ["--seed", "0", "--dtype", "auto", "--engine", "tree", "--long", "window", "--method", "sft"]
    options = TrainOptions(seed=7, dtype="bfloat16", max_steps=20, engine="dense", max_memory=10, verify=True)
    own = "--seed 7 --dtype bfloat16 --engine dense --long window --method sft --max-steps 20 --max-memory 10 --verify"
    assert options.to_argv() == own.split()


def test_a_method_is_told_what_it_asks_for() -> None:
    options = TrainOptions(long="elide", beta=0.25, loss="ipo", desirable_weight=2.0, undesirable_weight=3.0)
    begin = "--seed 0 --dtype auto --engine tree --long elide --method"
    assert options.to_argv("weighted") == f"{begin} weighted".split()
    assert options.to_argv("dpo") == f"{begin} dpo --beta 0.25 --loss ipo".split()
    assert options.to_argv("kto") == f"{begin} kto --beta 0.25 --desirable-weight 2.0 --undesirable-weight 3.0".split()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed", -1, "a whole number >= 0"),
        ("seed", 2**63, "a whole number < 2^63"),
        ("seed", True, "a whole number >= 0"),
        ("seed", 1.0, "a whole number >= 0"),
        ("dtype", "float16", "auto, float32 or bfloat16"),
        ("dtype", None, "auto, float32 or bfloat16"),
        ("max_steps", 0, "a whole number >= 1"),
        ("max_steps", math.inf, "a whole number >= 1"),
        ("max_memory", 0, "a whole number >= 1"),
        ("engine", "sparse", "tree or dense"),
        ("long", "cut", "window, elide or refuse"),
        ("loss", "hinge", "sigmoid or ipo"),
        ("beta", 0, "a finite number > 0"),
        ("beta", math.inf, "a finite number > 0"),
        ("desirable_weight", -1, "a finite number > 0"),
        ("undesirable_weight", 0, "a finite number > 0"),
        ("held_out_fraction", 1, "a finite number >= 0 and < 1"),
        ("held_out_fraction", -0.1, "a finite number >= 0 and < 1"),
        ("held_out_fraction", math.nan, "a finite number >= 0 and < 1"),
        ("held_out_min_tasks", 0, "a whole number >= 1"),
    ],
)
def test_option_out_of_its_range_is_refused(name: str, value: Any, expected: str) -> None:
    with pytest.raises(SettingsError) as failure:
        TrainOptions(**{name: value})
    assert str(failure.value) == f"{name}={value!r}: expected {expected}"
