"""What a training is told: the trainer's configuration, and options that only loraloop's own training process knows."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from loraloop.chat.length import LONG_POLICIES, LongPolicy
from loraloop.errors import SettingsError
from loraloop.lora.report_to.reporter import check_service
from loraloop.training_data import Method


@dataclass(frozen=True, kw_only=True)
class LoraTrainerConfig:
    """Frozen; every value is checked when it is made. Raises SettingsError naming the value and its range."""

    base_model: str = "LiquidAI/LFM2.5-1.2B-Instruct"
    """A hub id, a folder, or a GGUF file."""
    lora_rank: int = 16
    """At least 1."""
    lora_alpha: float = 32.0
    """More than 0; the adapter is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.05
    """0 <= lora_dropout < 1; samples of a step that share a beginning share its draws (docs/concepts.md)."""
    epochs: int = 3
    """Passes over the data, at least 1."""
    batch_size: int = 4
    """Samples of a micro-batch, at least 1."""
    gradient_accumulation: int = 4
    """Micro-batches of an optimizer step, at least 1."""
    learning_rate: float = 2e-4
    """Peak rate, 0 < learning_rate < 1."""
    max_seq_length: int = 2048
    """Tokens of a row, at least 16."""
    train_script: str | Path | None = None
    """A script that keeps the command-line contract; None is loraloop's own training process."""
    output_dir: str | Path = "lora/adapters"
    """Adapters go into a new folder in here, named by the model's id."""
    data_dir: str | Path = "lora/data"
    """Training files and logs go into a new folder in here, named by the model's id."""
    python_path: str | Path | None = None
    """The interpreter of the training process; None is the running one."""

    def __post_init__(self) -> None:
        _check_text("base_model", self.base_model)
        for name in ("lora_rank", "epochs", "batch_size", "gradient_accumulation"):
            _check_int(name, getattr(self, name), 1)
        _check_int("max_seq_length", self.max_seq_length, 16)
        _check_float("lora_alpha", self.lora_alpha, "> 0", lambda value: value > 0)
        _check_float("lora_dropout", self.lora_dropout, ">= 0 and < 1", lambda value: 0 <= value < 1)
        _check_float("learning_rate", self.learning_rate, "> 0 and < 1", lambda value: 0 < value < 1)
        for name in ("output_dir", "data_dir"):
            _check_path(name, getattr(self, name))
        for name in ("train_script", "python_path"):
            if getattr(self, name) is not None:
                _check_path(name, getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        """Every setting, as JSON can hold it; the path of a base model on this machine is made absolute."""
        values = {name: str(value) if isinstance(value, os.PathLike) else value for name, value in dataclasses.asdict(self).items()}
        path = Path(os.path.expanduser(self.base_model))  # noqa: PTH111  that of pathlib raises for a user that there is not
        return {**values, "base_model": str(path.resolve())} if path.exists() else values

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`, checked again. Raises SettingsError for a name that is not a setting."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise SettingsError(f"no setting named {name!r}; known: {', '.join(known)}.{hint}")
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of loraloop's own training process; a `train_script` never sees them. Raises SettingsError like the configuration."""

    seed: int = 0
    """Of the adapter's first weights, the order of samples, and dropout; 0 <= seed < 2^63."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the base weights; auto is bfloat16 where the hardware computes in it."""
    max_steps: int | None = None
    """End after this many optimizer steps, at least 1."""
    engine: Literal["tree", "dense"] = "tree"
    """tree computes tokens that samples share once; dense computes every sample by itself, and is what tree is measured against."""
    max_memory: int | None = None
    """Bytes that the training process may take, at least 1; None is 80 % of what is free."""
    verify: bool = False
    """Compute the first step with both engines, and stop when they differ."""
    long: LongPolicy = "window"
    """What happens to samples above max_seq_length: several rows, long tool outputs cut in the middle, or refused."""
    beta: float = 0.1
    """dpo and kto: how closely the model stays to its reference, more than 0."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """dpo: the loss of a pair, that of Rafailov et al. 2023 or of Azar et al. 2023."""
    desirable_weight: float = 1.0
    """kto: of a desirable sample's loss, more than 0."""
    undesirable_weight: float = 1.0
    """kto: of an undesirable sample's loss, more than 0."""
    held_out_fraction: float = 0.2
    """Share of the tasks kept from training to measure on, 0 <= held_out_fraction < 1."""
    held_out_min_tasks: int = 5
    """With fewer distinct tasks than this nothing is held out."""
    continue_from: str | None = None
    """The id of a model, or `latest`: its adapter is trained on, with its rank and alpha; None begins with a fresh one."""
    time_limit: float | None = None
    """Seconds after which no further step is begun, more than 0; the adapter is saved as it is then."""
    eval_every: int | None = None
    """Steps between measurements on what is held out, at least 1."""
    early_stop: int | None = None
    """End with the best adapter after so many measurements without a lower held-out loss, at least 1."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, at least 1; None is as often as takes 1 % of the time."""
    wait: bool = False
    """Wait while another training uses the device, instead of an error."""
    report_to: tuple[str, ...] = ()
    """Services that the training's figures also go to: trackio, mlflow, tensorboard. Each is an extra of loraloop."""

    def __post_init__(self) -> None:
        _check_int("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise SettingsError(f"seed={self.seed}: expected a whole number < 2^63")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise SettingsError(f"{name}={getattr(self, name)!r}: expected {_list(choices)}")
        for name in ("max_steps", "max_memory", "eval_every", "early_stop", "checkpoint_every"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            _check_float(name, getattr(self, name), "> 0", lambda value: value > 0)
        object.__setattr__(self, "report_to", tuple(self.report_to))  # JSON has lists
        for name in self.report_to:
            check_service(name)
        if self.time_limit is not None:
            _check_float("time_limit", self.time_limit, "> 0", lambda value: value > 0)
        if self.continue_from is not None:
            _check_text("continue_from", self.continue_from)
        _check_float("held_out_fraction", self.held_out_fraction, ">= 0 and < 1", lambda value: 0 <= value < 1)
        _check_int("held_out_min_tasks", self.held_out_min_tasks, 1)

    def to_dict(self) -> dict[str, Any]:
        """Every option, as JSON can hold it."""
        return dataclasses.asdict(self)

    def to_argv(self, method: Method = "sft") -> list[str]:
        """The arguments that follow the contract's on the command line, for a training by `method`."""
        argv = ["--seed", str(self.seed), "--dtype", self.dtype, "--engine", self.engine, "--long", self.long, "--method", method]
        if method in ("dpo", "kto"):
            argv += ["--beta", repr(self.beta)]
        if method == "dpo":
            argv += ["--loss", self.loss]
        if method == "kto":
            argv += ["--desirable-weight", repr(self.desirable_weight), "--undesirable-weight", repr(self.undesirable_weight)]
        for name in ("max_steps", "max_memory", "time_limit", "eval_every", "early_stop", "checkpoint_every"):
            value = getattr(self, name)
            argv += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
        return [*argv, *(f"--{name}" for name in ("verify", "wait") if getattr(self, name))]


_CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("auto", "float32", "bfloat16"),
    "engine": ("tree", "dense"),
    "long": LONG_POLICIES,
    "loss": ("sigmoid", "ipo"),
}


def _list(choices: tuple[str, ...]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


def _check_int(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise SettingsError(f"{name}={value!r}: expected a whole number >= {low}")


def _check_float(name: str, value: Any, expected: str, holds: Any) -> None:
    """NaN fails the comparison with the largest number, as infinity and a whole number beyond it do."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (abs(value) <= sys.float_info.max and holds(value)):
        raise SettingsError(f"{name}={value!r}: expected a finite number {expected}")


def _check_path(name: str, value: Any) -> None:
    _check_text(name, os.fspath(value) if isinstance(value, os.PathLike) else value)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise SettingsError(f"{name}={value!r}: expected a text that is not empty")
