"""Evaluating a model, put together: which two sides, measured on what, kept where.

    sides       MODEL, `live` (the promoted model, else the base model), `base`, or NAME@URL for one that is served
    what        plays in an environment; held-out samples of a dataset; a command of the user's
    kept        evaluations/<id>/: plan.json first, what is measured as it comes, evaluation.json last

The id is a hash of the plan, so that the same question has one answer: asked again it is read, and one that was cut off goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from loraloop.base_model import BaseModel, Dtype, resolve_base
from loraloop.dataset import Dataset
from loraloop.errors import EvaluationError, SettingsError
from loraloop.evaluate.command import TIMEOUT_S, run_command
from loraloop.evaluate.endpoint import Access, open_endpoint
from loraloop.evaluate.environment import Task, TaskSuite, find_object, hash_tasks
from loraloop.evaluate.likelihood import HeldOutSample, Measure, MeasuredSamples, hash_samples, measure_samples, pair_figures
from loraloop.evaluate.result import SIDES, Comparison, Evaluation, EvaluationPlan, Side, SideName, TaskScore
from loraloop.evaluate.rollout import Player, load_player
from loraloop.evaluate.speaker import InProcessSpeaker, ServedSpeaker, Speaker
from loraloop.evaluate.suite import Clock, Plays, Progress, Schedule, Stop, play_both
from loraloop.files import content_hash, write_json
from loraloop.held_out import N_SAMPLES, list_held_out
from loraloop.lease import Lease
from loraloop.lora.model import TrainedModel
from loraloop.lora.registry import LoraModelRegistry
from loraloop.lora.states import ModelState
from loraloop.plugins import EpisodeStore, find

PLAN_FILE = "plan.json"
EVALUATION_FILE = "evaluation.json"
MEASURED_AT_ONCE = 4
"""Rows of held-out samples."""
DEFAULT_TEMPERATURE = 0.7
"""Where several plays of each task are asked for, and nothing is said."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What to measure, and how."""

    environment: str | None = None
    """The suite to play: a plug-in's name, or `module:Class`."""
    tasks: Path | None = None
    """A file of tasks; the suite's own without."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Of the suite."""
    limit: int | None = None
    """At most so many tasks, chosen by hash; all without."""
    seeds: int = 1
    """Plays of each task by each side."""
    temperature: float | None = None
    """0 takes the likeliest token. Without it 0 for one seed, DEFAULT_TEMPERATURE for more."""
    base: str | None = None
    """Where the base model is; without it where the model's training had it."""
    dtype: Dtype = "auto"
    token: str | None = field(default=None, repr=False)
    """Of the server, for a side that is served."""
    command: str | None = None
    """A command, or `module:function`, that prints a score for each task (evaluate/command.py)."""
    command_timeout_s: float = TIMEOUT_S
    """Of the command, for one side."""
    held_out: bool = False
    """Measure held-out samples; done as well where nothing else is asked for."""
    dataset: str | None = None
    """Whose; without it that of the candidate's training."""
    n_samples: int = N_SAMPLES
    """At most so many held-out samples of each ending."""
    again: bool = False
    """Measure afresh what is measured already."""
    on_progress: Callable[[Progress], None] = lambda progress: None
    stop: Stop | None = None
    """Ends the plays when the scores so far decide; it is asked behind each block of tasks that both sides have played."""

    def check(self) -> None:
        """Raises SettingsError for values out of their range."""
        if self.seeds < 1:
            raise SettingsError(f"seeds {self.seeds}: expected at least 1")
        if self.limit is not None and self.limit < 1:
            raise SettingsError(f"limit {self.limit}: expected at least 1")
        if self.temperature is not None and not 0 <= self.temperature <= 10:
            raise SettingsError(f"temperature {self.temperature:g}: expected 0 to 10")
        if self.seeds > 1 and self.temperature == 0:
            raise SettingsError(f"{self.seeds} seeds at temperature 0 would all play the same; give a temperature, or one seed")
        if self.tasks is not None and self.environment is None:
            raise SettingsError(f"tasks {self.tasks}: whose? Name the environment, too")
        if self.n_samples < 1:
            raise SettingsError(f"n_samples {self.n_samples}: expected at least 1")

    @property
    def wants_held_out(self) -> bool:
        """Whether held-out samples are measured."""
        return self.held_out or self.dataset is not None or (self.environment is None and self.command is None)

    @property
    def chosen_temperature(self) -> float:
        """The temperature to play at."""
        return self.temperature if self.temperature is not None else DEFAULT_TEMPERATURE if self.seeds > 1 else 0.0


@dataclass(frozen=True)
class Contender:
    """One side, and how to have it."""

    side: Side
    base: BaseModel | None = None
    adapter: Path | None = None
    model: TrainedModel | None = None

    def load(self, dtype: Dtype) -> Player:
        """Its weights in this process. Raises EvaluationError for one that is served."""
        if self.base is None:
            raise EvaluationError(f"{self.side.name} is served; what needs its weights cannot be measured")
        return load_player(self.base, str(self.adapter) if self.adapter else None, dtype)


@dataclass(frozen=True)
class Sources:
    """What an evaluation needs of a project."""

    registry: LoraModelRegistry
    store: EpisodeStore
    find_base: Callable[[TrainedModel], str]
    """Where the base model of a model was when it was trained."""
    get_dataset: Callable[[str | None], Dataset]


@dataclass(frozen=True)
class _Work:
    """What is measured of both sides, found before anything is loaded."""

    pair: Mapping[SideName, Contender]
    schedule: Schedule | None
    dataset: Dataset | None
    samples: Sequence[HeldOutSample]
    notes: tuple[str, ...]


class Evaluator:
    """Evaluates the models of one project; `directory` is where evaluations are kept."""

    def __init__(self, directory: Path, sources: Sources) -> None:
        self.directory = directory
        self.sources = sources
        self.registry = sources.registry

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
            comparisons, notes, stopped = _measure(folder, work, options)
            if not comparisons:
                raise EvaluationError(f"nothing could be compared: {'; '.join(notes) or 'there are no tasks and no samples'}")
            told = {"notes": (*work.notes, *notes), "stopped_early": stopped}
            evaluation = Evaluation(id=plan.id, plan=plan, comparisons=tuple(comparisons), **told)
            write_json(folder / EVALUATION_FILE, evaluation.model_dump(mode="json"))
        return evaluation

    def _prepare(self, model: str, against: str, options: EvaluationOptions) -> _Work:
        pair, notes = self._find_sides(model, against, options)
        schedule = _schedule(options) if options.environment is not None else None
        dataset, samples = None, list[HeldOutSample]()
        if options.wants_held_out:
            served = [contender.side.name for contender in pair.values() if contender.base is None]
            if served:
                raise SettingsError(f"{' and '.join(served)} is served: held-out samples need weights in this process; name an environment")
            trained = pair["candidate"].model
            dataset = self.sources.get_dataset(options.dataset or (trained.dataset if trained else None))
            samples = list_held_out(dataset, self.sources.store, options.n_samples)
        return _Work(pair, schedule, dataset, samples, (*notes, *(schedule.suite.notes if schedule else ())))

    def list_evaluations(self) -> list[Evaluation]:
        """Those that are finished, the newest last. Raises EvaluationError for one that cannot be read."""
        files = sorted(self.directory.glob(f"eval-*/{EVALUATION_FILE}"), key=lambda file: (file.stat().st_mtime_ns, file.parent.name))
        return [_read(file) for file in files]

    def _find_sides(self, model: str, against: str, options: EvaluationOptions) -> tuple[dict[SideName, Contender], tuple[str, ...]]:
        candidate = self._find(model, options, None)
        notes: tuple[str, ...] = ()
        if against == "live":
            live = self._find_live(candidate)
            against = live.id if live else "base"
            notes = () if live else ("no model is promoted, so the opponent is the base model",)
        opponent = self._find(against, options, candidate)
        if candidate.side == opponent.side:
            raise SettingsError(f"both sides are {candidate.side.name}; choose two that differ")
        return {"candidate": candidate, "opponent": opponent}, notes

    def _find_live(self, candidate: Contender) -> TrainedModel | None:
        """The model that was promoted last, of the candidate's learn model where that is known."""
        of = candidate.model.learn_model_name if candidate.model else None
        live = [found for found in self.registry.list_models() if found.state is ModelState.PROMOTED]
        live = [
            found for found in live if of in (None, found.learn_model_name) and not (candidate.model and found.id == candidate.model.id)
        ]
        return max(live, key=lambda found: self.registry.get_history(found.id)[-1].at, default=None)

    def _find(self, name: str, options: EvaluationOptions, other: Contender | None) -> Contender:
        if "@" in name:
            served, _, url = name.partition("@")
            if not url.startswith(("http://", "https://")):
                raise SettingsError(f"{name!r}: expected NAME@URL with a URL that begins with http:// or https://")
            return Contender(Side(name=served, url=url))
        if name == "base":
            base = other.base if other and other.base else None
            if base is None and options.base is None:
                raise SettingsError("the base model of a side that is served is not known; give --base, or NAME@URL for it, too")
            base = base or resolve_base(str(options.base))
            return Contender(Side(name="base", base_model=base.name, base_sha256=base.sha256), base)
        model = self.registry.get(name)
        model = self.registry.verify(model.id)
        base = resolve_base(options.base or self.sources.find_base(model))
        if model.base_sha256 not in (None, base.sha256):
            raise EvaluationError(
                f"{model.id} was trained on another base model than {base.path} (hash {base.sha256[:12]}, expected "
                f"{(model.base_sha256 or '')[:12]}); give the right one with --base"
            )
        side = Side(name=model.id, base_model=base.name, base_sha256=base.sha256, adapter_sha256=model.adapter_sha256)
        return Contender(side, base, model.adapter_path, model)

    def _plan(self, work: _Work, options: EvaluationOptions) -> EvaluationPlan:
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
        )
        while options.again and _find_made(self.directory / plan.id) is not None:
            plan = plan.model_copy(update={"again": plan.again + 1})
        return plan


Loaded = Callable[[SideName], Player]


def _measure(folder: Path, work: _Work, options: EvaluationOptions) -> tuple[list[Comparison], list[str], bool]:
    """(comparisons, the one to decide by first, notes, whether the plays were stopped early)."""
    comparisons, notes, stopped = list[Comparison](), list[str](), False

    @cache
    def loaded(name: SideName) -> Player:
        return work.pair[name].load(options.dtype)

    if work.schedule is not None:
        played, stopped = _play(folder, work, loaded, options)
        comparisons += played
    if options.command is not None:
        comparisons.append(_compare_command(folder, work, loaded, options))
    if work.dataset is not None:
        measured, refused = _compare_samples(folder, work, loaded, options)
        comparisons += measured
        notes += refused
    return comparisons, notes, stopped


def _schedule(options: EvaluationOptions) -> Schedule:
    """The suite and its tasks. Raises SettingsError for one that there is not, EvaluationError when its package is not installed."""
    assert options.environment is not None  # noqa: S101  checked before
    try:
        kind = find_object(options.environment) if ":" in options.environment else find("environments", options.environment)
    except ImportError as error:
        raise EvaluationError(f"the environment {options.environment} needs the package {error.name}; install it") from error
    suite: TaskSuite = kind(options.tasks, options.options)
    tasks = _choose(suite.list_tasks(), options.limit)
    if not tasks:
        raise EvaluationError(f"{options.environment} has no tasks with these options")
    return Schedule(suite, tasks, options.seeds, options.chosen_temperature)


def _choose(tasks: Sequence[Task], limit: int | None) -> list[Task]:
    """At most `limit` tasks, chosen and ordered by a hash of their ids, so that a smaller limit takes some of a greater one's."""
    return sorted(tasks, key=lambda task: content_hash(task.id))[:limit]


def _play(folder: Path, work: _Work, loaded: Loaded, options: EvaluationOptions) -> tuple[list[Comparison], bool]:
    def open_speaker(name: SideName) -> Callable[[], Speaker]:
        side = work.pair[name].side
        if side.url is not None:
            return lambda: ServedSpeaker(str(side.url), side.name, options.token)
        return lambda: InProcessSpeaker(loaded(name))

    assert work.schedule is not None  # noqa: S101  looked at before
    name = work.schedule.suite.name
    speakers = {side: open_speaker(side) for side in SIDES}
    won, paid, stopped = play_both(work.schedule, speakers, Plays(folder), on_progress=options.on_progress, stop=options.stop)
    comparisons = [Comparison.of(f"{name}: success", won)]
    if won != paid:
        comparisons.append(Comparison.of(f"{name}: reward", paid))
    return comparisons, stopped


def _compare_command(folder: Path, work: _Work, loaded: Loaded, options: EvaluationOptions) -> Comparison:
    """Run the command for each side, once: what one side scored is kept."""
    assert options.command is not None  # noqa: S101  looked at before
    scores: dict[SideName, dict[str, float]] = {}
    for name in SIDES:
        file = folder / f"command-{name}.json"
        if not file.exists():
            side, log = work.pair[name].side, folder / f"command-{name}.log"
            if side.url is not None:
                access = Access(side.url, side.name, options.token or "")
                found = run_command(options.command, access, log, options.command_timeout_s)
            else:
                with open_endpoint(loaded(name), side.name) as access:
                    found = run_command(options.command, access, log, options.command_timeout_s)
            write_json(file, found)
        scores[name] = {str(task): float(score) for task, score in json.loads(file.read_bytes()).items()}
        options.on_progress(Progress(len(scores), len(SIDES), None, what="runs of the command"))
    first, second = scores["candidate"], scores["opponent"]
    if first.keys() != second.keys():
        lone = ", ".join(sorted(first.keys() ^ second.keys())[:5])
        raise EvaluationError(f"the command scores other tasks for one side than for the other: {lone}; it must print each task for both")
    tasks = [TaskScore(task=task, candidate=first[task], opponent=second[task]) for task in sorted(first)]
    return Comparison.of("command", tasks)


def _compare_samples(folder: Path, work: _Work, loaded: Loaded, options: EvaluationOptions) -> tuple[list[Comparison], list[str]]:
    """The comparisons on held-out samples, and what could not be measured."""
    kept = MeasuredSamples(folder)
    clock = Clock(2 * len(work.samples), len(kept.known), "held-out samples")
    for name in SIDES:

        def load(name: SideName = name) -> tuple[Player, Measure]:
            from loraloop.train.dense import DenseEngine

            player = loaded(name)
            engine = DenseEngine(player.model, MEASURED_AT_ONCE)
            return player, lambda rows: engine.measure(rows).tolist()

        measure_samples((name, load), work.samples, kept, lambda: options.on_progress(clock.tell(len(kept.known))))
    comparisons = [
        Comparison.of(name, [TaskScore(task=key, candidate=first, opponent=second) for key, first, second in figures], higher_is_better=up)
        for name, up, figures in pair_figures(work.samples, kept)
    ]
    refused = [one for one in kept.known.values() if one.refused is not None and one.side == "candidate"]
    notes = [f"{len(refused)} held-out samples were not measured; {refused[0].key}: {refused[0].refused}"] if refused else []
    if not work.samples:
        notes.append(f"dataset {work.dataset.id if work.dataset else ''} has no held-out samples; build it with `--held-out 0.2`")
    return comparisons, notes


def _find_made(folder: Path) -> Evaluation | None:
    return _read(folder / EVALUATION_FILE) if (folder / EVALUATION_FILE).exists() else None


def _read(file: Path) -> Evaluation:
    try:
        return Evaluation.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise EvaluationError(f"{file} cannot be read as an evaluation: {error}; remove {file.parent} and evaluate again") from error
