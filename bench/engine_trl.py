"""TRL's SFTTrainer on the same rows: as it comes, and tuned for a CPU. TRL does the training; only its data and its clock are ours.

`trl-default` leaves every setting that costs time as TRL has it: base in float32, bf16 autocast, gradient checkpointing, batches of
8 (as far as the check has so many rows), rows in their given order. `trl-tuned`: base in bf16, no checkpointing, rows in order of
length, batch size and autocast as measured best (`python -m bench.train --sweep`). Both get what keeps the work equal: input ids and
labels ready-made, no truncation, constant learning rate, no clipping, no logging to services, the whole step as one accumulation
window.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from typing import Any

from bench.steps import Job, StepClock, StepPlan, adapter_parameters, reset_adapter
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
    rows = job.workload.check_rows
    if engine != "trl-default":
        rows.sort(key=lambda row: len(row.ids))
    trainer = open_trainer(engine, model, tokenizer, rows, job.plan)
    trainer.clock = None
    reset_adapter(parameters, job.initial)
    trainer.train_dataset = to_dataset(job.workload.warm_up_rows)
    trainer.args.num_train_epochs = 1
    trainer.train()
    reset_adapter(parameters, job.initial)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.clock = clock
    trainer.train_dataset = to_dataset(rows)
    trainer.args.num_train_epochs = MANY_EPOCHS
    trainer.train()
    return clock


def open_trainer(engine: str, model: Any, tokenizer: Any, rows: list[BenchRow], plan: StepPlan) -> Any:
    """An SFTTrainer whose optimizer step is all of `rows`; `trainer.clock` hears of each step."""
    import transformers
    import trl

    class Trainer(trl.SFTTrainer):
        """TRL's own, with the sum of its micro-batch losses kept."""

        clock: StepClock | None = None
        window_loss = 0.0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.window_loss += float(loss)
            return loss

    trainer = Trainer(model=model, args=_config(engine, plan, len(rows)), train_dataset=to_dataset(rows), processing_class=tokenizer)
    trainer.add_callback(_clock_callback(trainer))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)
    return trainer


def to_dataset(rows: list[BenchRow]) -> Any:
    """Rows as TRL takes ready-made ones. Raises ValueError at a weight that labels cannot express."""
    import datasets

    if any(weight not in (0.0, 1.0) for row in rows for weight in row.weights):
        raise ValueError("TRL's labels know no loss weights but 0 and 1")
    labels = [[token if weight else IGNORED for token, weight in zip(row.ids, row.weights, strict=True)] for row in rows]
    return datasets.Dataset.from_dict({"input_ids": [list(row.ids) for row in rows], "labels": labels})


def _config(engine: str, plan: StepPlan, n_rows: int) -> Any:
    import trl

    tuned = {"gradient_checkpointing": False, "bf16": plan.autocast, "per_device_train_batch_size": plan.batch_size}
    batch_size = DEFAULT_BATCH if engine == "trl-default" else plan.batch_size
    return trl.SFTConfig(
        output_dir=tempfile.gettempdir(),  # nothing is saved there
        gradient_accumulation_steps=-(-n_rows // batch_size),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        learning_rate=plan.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **({} if engine == "trl-default" else tuned),
    )


def _silence() -> None:
    """No warnings and notes of TRL and what it loads: they would drown the progress. For a process of its own only."""
    import transformers

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
