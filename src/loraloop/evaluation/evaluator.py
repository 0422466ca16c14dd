"""Evaluating a model, put together: which two sides, measured on what, kept where.

    sides       MODEL, `live` (the promoted model, else the base model), `base`, or NAME@URL for one that is served
    what        plays in an environment; held-out samples of a dataset; a command of the user's
    kept        evaluations/<id>/: plan.json first, what is measured as it comes, evaluation.json last

The id is a hash of the plan, so that the same question has one answer: asked again it is read, and one that was cut off goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from loraloop.episode import Message
from loraloop.errors import EvaluationError, SettingsError
from loraloop.evaluate.environment import Task, TaskSuite, find_object, hash_tasks
from loraloop.evaluate.likelihood import HeldOutSample, hash_samples
from loraloop.evaluate.probes import ProbeResult
from loraloop.evaluate.result import Evaluation, EvaluationPlan, judge
from loraloop.evaluate.suite import Schedule
from loraloop.evaluation.held_out import list_held_out
from loraloop.evaluation.measured import Work, measure_both
from loraloop.evaluation.options import EvaluationOptions
from loraloop.evaluation.probing import ProbeOptions, probe
from loraloop.evaluation.reuse import PLAN_FILE
from loraloop.evaluation.sides import Sides, Sources
from loraloop.files import content_hash, write_json
from loraloop.lease import Lease
from loraloop.plugins import find
from loraloop.training_data import TrainingData

EVALUATION_FILE = "evaluation.json"


class Evaluator:
    """Evaluates the models of one project; `directory` is where evaluations are kept."""

    def __init__(self, directory: Path, sources: Sources) -> None:
        self.directory = directory
        self.sources = sources
        self.sides = Sides(sources)

    def run(self, model: str, against: str, options: EvaluationOptions) -> Evaluation:
        """Measure both sides and give the evaluation, which is then kept; one that was made already is read.

        Raises SettingsError, LoraTrainerError for a model that there is not, BaseModelError, DatasetError, EvaluationError; LeaseHeld
        while another process makes the same.
        """
        options.check()
        work = self._prepare(model, against, options)
        plan = self._plan(work, options)
        folder = self.directory / plan.id
        made = _find_made(folder)
        if made is not None:
            return made
        lease = Lease(folder / "lease")
        lease.acquire(f"the evaluation of {plan.candidate.name} against {plan.opponent.name}")
        with lease.kept():
            write_json(folder / PLAN_FILE, plan.model_dump(mode="json"))
            comparisons, notes, early = measure_both(folder, work, options)
            if not comparisons:
                raise EvaluationError(f"nothing could be compared: {'; '.join(notes) or 'there are no tasks and no samples'}")
            evaluation = Evaluation(
                id=plan.id,
                plan=plan,
                comparisons=tuple(comparisons),
                notes=(*work.notes, *notes),
                verdict=early.verdict if early else judge(comparisons[0], options.policy),
                stopped_early=early is not None and early.stopped,
            )
            write_json(folder / EVALUATION_FILE, evaluation.model_dump(mode="json"))
        return evaluation

    def _prepare(self, model: str, against: str, options: EvaluationOptions) -> Work:
        pair, notes = self.sides.find_pair(model, against, options)
        schedule = _schedule(options) if options.environment is not None else None
        dataset, samples = None, list[HeldOutSample]()
        if options.wants_held_out:
            served = [contender.side.name for contender in pair.values() if contender.base is None]
            if served:
                raise SettingsError(f"{' and '.join(served)} is served: held-out samples need weights in this process; name an environment")
            trained = pair["candidate"].model
            dataset = self.sources.get_dataset(options.dataset or (trained.dataset if trained else None))
            samples = [one for one in list_held_out(dataset, self.sources.store, options.n_samples) if one.key not in options.left_out]
        left_out = (f"{len(options.left_out)} tasks are left out, as the candidate has nearly trained on them",) if options.left_out else ()
        return Work(pair, schedule, dataset, samples, (*notes, *(schedule.suite.notes if schedule else ()), *left_out))

    def list_requests(self, model: str, options: EvaluationOptions) -> dict[str, tuple[Message, ...]]:
        """How each task that `options` may measure by begins, up to the user's first turn; none where only a command knows its tasks.

        Those beyond the limit are there, too. Raises what `run` does before anything is loaded.
        """
        options.check()
        if options.environment is not None:
            schedule = _schedule(replace(options, limit=None))
            system = [Message(role="system", content=schedule.suite.system)] if schedule.suite.system is not None else []
            opened = schedule.suite.open()
            return {task.id: (*system, Message(role="user", content=opened.reset(task))) for task in schedule.tasks}
        if not options.wants_held_out:
            return {}
        trained = self.sources.registry.get(model)
        dataset = self.sources.get_dataset(options.dataset or trained.dataset)
        held_out = list_held_out(dataset, self.sources.store, options.n_samples)
        return {one.key: begin_of(one.sample.messages) for one in held_out}

    def probe(
        self,
        model: str,
        samples: Sequence[TrainingData],
        requests: Mapping[str, Sequence[Message]],
        probes: ProbeOptions,
        options: EvaluationOptions,
    ) -> tuple[ProbeResult, ...]:
        """What the probes find in a model that was trained on `samples`; see `probing.probe`."""
        player = self.sides.find_one(model, options).load(options.dtype)
        return probe(player, samples, requests, probes, level=options.policy.level)

    def list_evaluations(self) -> list[Evaluation]:
        """Those that are finished, the newest last. Raises EvaluationError for one that cannot be read."""
        files = sorted(self.directory.glob(f"eval-*/{EVALUATION_FILE}"), key=lambda file: (file.stat().st_mtime_ns, file.parent.name))
        return [_read(file) for file in files]

    def get(self, evaluation_id: str) -> Evaluation:
        """The finished evaluation whose id is or begins with `evaluation_id`, or the `latest`. Raises EvaluationError."""
        known = self.list_evaluations()
        found = known[-1:] if evaluation_id == "latest" else [one for one in known if one.id.startswith(evaluation_id)]
        if len(found) != 1:
            names = ", ".join(one.id for one in known[-5:]) or "none; make one with `loraloop evaluate MODEL`"
            raise EvaluationError(f"{len(found)} finished evaluations begin with {evaluation_id!r}; known: {names}")
        return found[0]

    def _plan(self, work: Work, options: EvaluationOptions) -> EvaluationPlan:
        schedule, dataset = work.schedule, work.dataset
        plan = EvaluationPlan(
            candidate=work.pair["candidate"].side,
            opponent=work.pair["opponent"].side,
            environment=options.environment,
            options=dict(options.options) if schedule else {},
            n_tasks=len(schedule.tasks) if schedule else 0,
            tasks_hash=hash_tasks(schedule.tasks) if schedule else None,
            seeds=options.seeds,
            temperature=options.chosen_temperature,
            dataset=dataset.id if dataset else None,
            n_samples=len(work.samples),
            samples_hash=hash_samples(work.samples) if dataset else None,
            command=options.command,
            early=options.policy if options.early else None,
        )
        while options.again and _find_made(self.directory / plan.id) is not None:
            plan = plan.model_copy(update={"again": plan.again + 1})
        return plan


def begin_of(messages: Sequence[Message]) -> tuple[Message, ...]:
    """A conversation up to the user's first turn that is no demonstration; empty without one."""
    first = next((place for place, one in enumerate(messages) if one.role == "user" and one.content and not one.is_demo), -1)
    return tuple(messages[: first + 1])


def _schedule(options: EvaluationOptions) -> Schedule:
    """The suite and its tasks. Raises SettingsError for one that there is not, EvaluationError when its package is not installed."""
    assert options.environment is not None  # noqa: S101  checked before
    try:
        kind = find_object(options.environment) if ":" in options.environment else find("environments", options.environment)
    except ImportError as error:
        raise EvaluationError(f"the environment {options.environment} needs the package {error.name}; install it") from error
    suite: TaskSuite = kind(options.tasks, options.options)
    tasks = _choose([task for task in suite.list_tasks() if task.id not in options.left_out], options.limit)
    if not tasks:
        raise EvaluationError(f"{options.environment} has no tasks with these options")
    return Schedule(suite, tasks, options.seeds, options.chosen_temperature)


def _choose(tasks: Sequence[Task], limit: int | None) -> list[Task]:
    """At most `limit` tasks, chosen and ordered by a hash of their ids, so that a smaller limit takes some of a greater one's."""
    return sorted(tasks, key=lambda task: content_hash(task.id))[:limit]


def _find_made(folder: Path) -> Evaluation | None:
    return _read(folder / EVALUATION_FILE) if (folder / EVALUATION_FILE).exists() else None


def _read(file: Path) -> Evaluation:
    try:
        return Evaluation.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise EvaluationError(f"{file} cannot be read as an evaluation: {error}; remove {file.parent} and evaluate again") from error
