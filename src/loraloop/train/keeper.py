"""What watches over a training: checkpoints, the wish to stop, the time limit, and early stopping on the held-out loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from loraloop.train import checkpoint
from loraloop.train.arguments import TrainArguments
from loraloop.train.checkpoint import Checkpoints, Progress, Tensors
from loraloop.train.loop import History, Keeper
from loraloop.train.stop import Stop


@dataclass(frozen=True)
class Limits:
    """When a training ends before its last step."""

    time_limit: float | None = None
    """Seconds of all its processes after which no further step is begun; None is never."""
    eval_every: int | None = None
    """Steps between measurements on what is held out; None is none on the way."""
    early_stop: int | None = None
    """Measurements in a row without a lower loss after which it ends with the best adapter; None is never."""

    @classmethod
    def of(cls, arguments: TrainArguments, steps: int) -> Limits:
        """With a measurement every tenth of the steps where early stopping asks for them and nobody said how often."""
        every = arguments.eval_every or (max(1, steps // 10) if arguments.early_stop is not None else None)
        return cls(arguments.time_limit, every, arguments.early_stop)


class RunKeeper(Keeper):
    """Keeps a run in its checkpoints.

    `measure` gives the held-out loss of the model as it is, None where nothing is held out; `check` raises what forbids to save.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        stop: Stop,
        checkpoints: Checkpoints | None,
        *,
        limits: Limits,
        measure: Callable[[int], float] | None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._model, self._optimizer = model, optimizer
        self._stop = stop
        self._checkpoints = checkpoints
        self._limits = limits
        self._measure = measure
        self._check = check
        self._is_over = False
        self._best: Tensors | None = None
        self._generators = checkpoint.generators()
        self._before: dict[str, float | None] | None = None

    def restore(self) -> Progress | None:
        """Go back to the newest whole checkpoint; None when there is none, and nothing has changed."""
        loaded = self._checkpoints.load() if self._checkpoints else None
        if loaded is None:
            return None
        progress, tensors = loaded
        self._best = checkpoint.unpack(tensors, self._model, self._optimizer)
        self._generators = checkpoint.generators()
        self._before = progress.before
        told = progress.model_dump(include={"step", "n_logical", "n_computed", "seconds", "best_step", "ended_by"})
        self.history = History(**told, losses=list(progress.losses), used=set(progress.used), held_out=list(progress.held_out))
        return progress

    def begin(self, before: dict[str, float | None] | None) -> None:
        """Nothing is trained yet; `before` is what was measured."""
        self._before = before

    def begin_step(self) -> None:
        """A step that is thrown away must not have drawn anything."""
        self._stop.check()
        self._generators = checkpoint.generators()

    def protected(self) -> AbstractContextManager[None]:
        """A stop waits until the step is whole."""
        return self._stop.protected()

    def end_step(self) -> None:
        """Measure, decide, and save when it is time to."""
        history, limits = self.history, self._limits
        self._generators = checkpoint.generators()
        self.evaluate()
        if limits.time_limit is not None and history.seconds >= limits.time_limit:
            history.ended_by = history.ended_by or "time_limit"
        if self._checkpoints is not None and self._checkpoints.is_due(history.step):
            self.save()

    def evaluate(self, *, last: bool = False) -> None:
        """Measure what is held out when it is time to, which a training that was stopped makes up for; the `last` step always is."""
        history, limits = self.history, self._limits
        if self._measure is None or limits.eval_every is None or not history.step:
            return
        is_due = history.step % limits.eval_every == 0 or (last and limits.early_stop is not None)
        if is_due and (not history.held_out or history.held_out[-1][0] < history.step):
            self._judge(self._measure(history.step))

    def save(self) -> None:
        """Save the state behind the last whole step; nothing when it is saved, or when there is none."""
        if self._checkpoints is None or not self.history.step or self._is_over:
            return
        self._check()
        history = self.history
        progress = Progress(
            step=history.step,
            losses=history.losses,
            used=sorted(history.used),
            n_logical=history.n_logical,
            n_computed=history.n_computed,
            seconds=history.seconds,
            before=self._before,
            held_out=history.held_out,
            best_step=history.best_step,
            ended_by=history.ended_by,
        )
        with self._stop.protected():
            self._checkpoints.save(progress, checkpoint.pack(self._model, self._optimizer, self._generators, self._best))

    def finish(self) -> None:
        """After the last step: save, then put the best adapter into the model where the held-out loss decides which that is."""
        self.evaluate(last=True)
        self.save()
        self._is_over = True
        if self._best is not None:
            checkpoint.put_adapter(self._model, self._best)

    def _judge(self, loss: float) -> None:
        """Whether this is the best adapter so far, and whether to go on."""
        history, patience = self.history, self._limits.early_stop
        with self._stop.protected():
            is_best = all(loss < earlier for _, earlier in history.held_out)
            history.held_out.append((history.step, loss))
            if patience is None:
                return
            if is_best:
                history.best_step = history.step
                self._best = checkpoint.copy_adapter(self._model)
            if sum(1 for step, _ in history.held_out if step > (history.best_step or 0)) >= patience:
                history.ended_by = "early_stop"
