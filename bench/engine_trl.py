"""TRL's trainers on the same rows: as they come, and tuned for a CPU. TRL does the training; only its data and its clock are ours.

`trl-default` leaves every setting that costs time as TRL has it: base in float32, bf16 autocast, gradient checkpointing, batches of
8 (as far as the check has so many rows or pairs), rows in their given order, for pairs the reference computed anew in every step.
`trl-tuned`: base in the precision that is fastest on the processor, no checkpointing, rows in order of length, batch size and autocast
as measured best (`python -m bench.train --sweep`), the reference of pairs computed beforehand and not timed. All get what keeps the
work equal: token ids ready-made, no truncation, no dropout, constant learning rate, no clipping, no logging to services, the whole
step as one accumulation window.

Single samples go to the SFTTrainer with our labels. Pairs go to the DPOTrainer, whose collator gives weight to every token behind the
prompt, other authors' too; it is TRL's own here, but the mask in what it collates is ours, so that loss and gradient can be compared.
The time is the same with either mask: on a CPU TRL puts every position through the head. Its reference is a copy of the adapter it is
given; it is given ours before B is set, which is the base model.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any

from bench.steps import BETA, Job, StepClock, StepPlan, adapter_parameters, reset_adapter
from bench.workload import BenchRow

IGNORED = -100
"""The label of a token without loss."""
MANY_EPOCHS = 100_000
"""An epoch is one step over the same rows; the clock ends the training."""
DEFAULT_BATCH = 8
"""TrainingArguments.per_device_train_batch_size, which TRL does not change."""


def run(engine: str, model: Any, tokenizer: Any, job: Job) -> StepClock:
    """Warm up, go back to the initial adapter, then time steps over the check's rows, all in one trainer."""
    _silence()
    parameters = adapter_parameters(model)
    clock = StepClock(job.plan, parameters)
    workload = job.workload
    rows, warm_up = workload.check_rows, workload.warm_up_rows
    if engine != "trl-default":
        rows = sort_by_length(rows, pairs=workload.is_preference)
    make = open_pairs_trainer if workload.is_preference else open_trainer
    trainer = make(engine, model, tokenizer, rows, job.plan)
    timed = trainer.train_dataset
    reset_adapter(parameters, job.initial)
    trainer.train_dataset = trainer.prepare(warm_up)
    trainer.args.num_train_epochs = 1
    trainer.train()
    reset_adapter(parameters, job.initial)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.clock = clock
    clock.reference_seconds = trainer.reference_seconds
    trainer.train_dataset = timed
    trainer.args.num_train_epochs = MANY_EPOCHS
    trainer.train()
    return clock


def open_trainer(engine: str, model: Any, tokenizer: Any, rows: list[BenchRow], plan: StepPlan) -> Any:
    """An SFTTrainer whose optimizer step is all of `rows`; `trainer.clock` hears of each step."""
    import trl

    class Trainer(Clocked, trl.SFTTrainer):  # type: ignore[misc]  # TRL has no types
        """TRL's own, with the sum of its micro-batch losses kept."""

        def prepare(self, rows: list[BenchRow]) -> Any:
            return to_dataset(rows)

    own = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    args = trl.SFTConfig(**list_arguments(engine, plan, len(rows)), **own)
    return listen(Trainer(model=model, args=args, train_dataset=to_dataset(rows), processing_class=tokenizer))


def open_pairs_trainer(
    engine: str, model: Any, tokenizer: Any, rows: list[BenchRow], plan: StepPlan, *, loss: str = "sigmoid", beta: float = BETA
) -> Any:
    """A DPOTrainer whose optimizer step is all pairs of `rows`, its reference the adapter that `model` has now.

    Raises ValueError when micro-batches would be unequal: TRL takes the mean over each, then over all of them.
    """
    import trl
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    n_pairs = len(rows) // 2
    arguments = list_arguments(engine, plan, n_pairs)
    size = min(n_pairs, arguments["per_device_train_batch_size"])
    if n_pairs % size:
        raise ValueError(f"{n_pairs} pairs are not a whole number of batches of {size}")

    class Trainer(Clocked, trl.DPOTrainer):  # type: ignore[misc]  # TRL has no types
        """TRL's own, whose data is tokenised already."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args, **kwargs)
            self.reference_seconds = time.perf_counter() - started
            return dataset

        def prepare(self, rows: list[BenchRow]) -> Any:
            seconds = self.reference_seconds
            dataset = to_pairs_dataset(rows)
            if self.precompute_ref_logps:
                dataset = self._precompute_ref_logps(dataset, "warm-up", 1)
            self.reference_seconds = seconds
            return dataset

    class Collator(DataCollatorForPreference):  # type: ignore[misc]
        """TRL's own, with our mask behind the prompt."""

        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = super().torch_call(examples)
            masks = chain((one["chosen_mask"] for one in examples), (one["rejected_mask"] for one in examples))
            for mask, ours in zip(batch["completion_mask"], masks, strict=True):
                mask.zero_()
                mask[: len(ours)] = mask.new_tensor(ours)
            return batch

    own = {"precompute_ref_log_probs": engine != "trl-default", "precompute_ref_batch_size": plan.batch_size}
    args = trl.DPOConfig(**arguments, **own, beta=beta, loss_type=[loss], remove_unused_columns=False)
    collator = Collator(pad_token_id=tokenizer.pad_token_id or 0)
    dataset = to_pairs_dataset(rows)
    return listen(Trainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, data_collator=collator))


class Clocked:
    """What is added to a trainer of TRL's: the sum of its micro-batch losses, and a clock that hears of each step."""

    clock: StepClock | None = None
    window_loss = 0.0
    reference_seconds: float | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch, its share of the window's loss added up."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]  # of the trainer behind it
        self.window_loss += float(loss)
        return loss


def sort_by_length(rows: Sequence[BenchRow], *, pairs: bool) -> list[BenchRow]:
    """Rows in order of length, pairs in order of their longer side."""
    size = 2 if pairs else 1
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [row for group in sorted(groups, key=lambda group: max(len(row.ids) for row in group)) for row in group]


def to_dataset(rows: list[BenchRow]) -> Any:
    """Rows as TRL takes ready-made ones. Raises ValueError at a weight that labels cannot express."""
    import datasets

    _check_weights(rows)
    labels = [[token if weight else IGNORED for token, weight in zip(row.ids, row.weights, strict=True)] for row in rows]
    return datasets.Dataset.from_dict({"input_ids": [list(row.ids) for row in rows], "labels": labels})


def to_pairs_dataset(rows: Sequence[BenchRow]) -> Any:
    """Pairs as TRL's DPOTrainer takes tokenised ones, with a mask for each whole side. Raises ValueError as `to_dataset` does."""
    import datasets

    _check_weights(rows)
    columns: dict[str, list[list[int]]] = {
        name: [] for name in ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask")
    }
    for better, worse in zip(rows[::2], rows[1::2], strict=True):
        trained = min(next(index for index, weight in enumerate(row.weights) if weight) for row in (better, worse))
        in_step = zip(better.ids[:trained], worse.ids, strict=False)
        n_prompt = next((number for number, (one, other) in enumerate(in_step) if one != other), trained)
        columns["prompt_ids"].append(list(better.ids[:n_prompt]))
        for name, row in (("chosen", better), ("rejected", worse)):
            columns[f"{name}_ids"].append(list(row.ids[n_prompt:]))
            columns[f"{name}_mask"].append([int(weight) for weight in row.weights])
    return datasets.Dataset.from_dict(columns)


def _check_weights(rows: Sequence[BenchRow]) -> None:
    if any(weight not in (0.0, 1.0) for row in rows for weight in row.weights):
        raise ValueError("TRL's labels know no loss weights but 0 and 1")


def list_arguments(engine: str, plan: StepPlan, n_samples: int) -> dict[str, Any]:
    """What both trainers are given, for steps of `n_samples` rows or pairs."""
    batch_size = DEFAULT_BATCH if engine == "trl-default" else plan.batch_size
    tuned = {"gradient_checkpointing": False, "bf16": plan.autocast}
    return {
        "output_dir": tempfile.gettempdir(),  # nothing is saved there
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": -(-n_samples // batch_size),
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        **({} if engine == "trl-default" else tuned),
    }


def listen(trainer: Any) -> Any:
    """The trainer with a clock to its steps and without its own words."""
    import transformers

    trainer.add_callback(_clock_callback(trainer))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)
    return trainer


def _silence() -> None:
    """No warnings and notes of TRL and what it loads: they would drown the progress. For a process of its own only."""
    import datasets
    import transformers

    os.environ["TQDM_DISABLE"] = "1"  # which TRL asks for before each pass over the reference
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()


def _clock_callback(trainer: Any) -> Any:
    """Passes the trainer's events on to its clock; a step lasts from the epoch's begin, before data are collated, to its update."""
    import transformers

    class Clock(transformers.TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            trainer.window_loss = 0.0
            if trainer.clock:
                trainer.clock.begin()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            if trainer.clock:
                trainer.clock.keep_gradient()

        def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
            if trainer.clock and trainer.clock.end(trainer.window_loss):
                control.should_training_stop = True

    return Clock()
