"""Evaluating a model, put together: which two sides, measured on what, kept where.

    sides       MODEL, `live` (the promoted model, else the base model), `base`, or NAME@URL for one that is served
    what        plays in an environment; held-out samples of a dataset; a command of the user's
    kept        evaluations/<id>/: plan.json first, what is measured as it comes, evaluation.json last

The id is a hash of the plan, so that the same question has one answer: asked again it is read, and one that was cut off goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from loraloop.base_model import BaseModel, Dtype, resolve_base
from loraloop.errors import EvaluationError, SettingsError
from loraloop.evaluate.environment import Task, TaskSuite, find_object, hash_tasks
from loraloop.evaluate.result import SIDES, Comparison, Evaluation, EvaluationPlan, Side, SideName
from loraloop.evaluate.rollout import Player, load_player
from loraloop.evaluate.speaker import InProcessSpeaker, ServedSpeaker, Speaker
from loraloop.evaluate.suite import Plays, Progress, Schedule, Stop, play_both
from loraloop.files import content_hash, write_json
from loraloop.lease import Lease
from loraloop.lora.model import TrainedModel
from loraloop.lora.registry import LoraModelRegistry
from loraloop.lora.states import ModelState
from loraloop.plugins import find

PLAN_FILE = "plan.json"
EVALUATION_FILE = "evaluation.json"
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


class Evaluator:
    """Evaluates the models of one project directory."""

    def __init__(self, directory: Path, registry: LoraModelRegistry, find_base: Callable[[TrainedModel], str]) -> None:
        self.directory = directory
        self.registry = registry
        self.find_base = find_base
        """Where the base model of a model was when it was trained."""

    def run(self, model: str, against: str, options: EvaluationOptions) -> Evaluation:
        """Measure both sides and give the evaluation, which is then kept; one that was made already is read.

        Raises SettingsError, LoraTrainerError for a model that there is not, BaseModelError, EvaluationError; LeaseHeld while another
        process makes the same.
        """
        options.check()
        pair, notes = self._find_sides(model, against, options)
        if options.environment is None:
            raise SettingsError("nothing to measure; name an environment")
        schedule = _schedule(options)
        plan = self._plan(pair, schedule, options)
        folder = self.directory / plan.id
        made = _find_made(folder)
        if made is not None:
            return made
        lease = Lease(folder / "lease")
        lease.acquire(f"the evaluation of {plan.candidate.name} against {plan.opponent.name}")
        with lease.kept():
            write_json(folder / PLAN_FILE, plan.model_dump(mode="json"))
            comparisons, stopped = _play(folder, pair, schedule, options)
            evaluation = Evaluation(
                id=plan.id,
                plan=plan,
                comparisons=tuple(comparisons),
                notes=(*notes, *schedule.suite.notes),
                stopped_early=stopped,
            )
            write_json(folder / EVALUATION_FILE, evaluation.model_dump(mode="json"))
        return evaluation

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
        base = resolve_base(options.base or self.find_base(model))
        if model.base_sha256 not in (None, base.sha256):
            raise EvaluationError(
                f"{model.id} was trained on another base model than {base.path} (hash {base.sha256[:12]}, expected "
                f"{(model.base_sha256 or '')[:12]}); give the right one with --base"
            )
        side = Side(name=model.id, base_model=base.name, base_sha256=base.sha256, adapter_sha256=model.adapter_sha256)
        return Contender(side, base, model.adapter_path, model)

    def _plan(self, pair: Mapping[SideName, Contender], schedule: Schedule, options: EvaluationOptions) -> EvaluationPlan:
        plan = EvaluationPlan(
            candidate=pair["candidate"].side,
            opponent=pair["opponent"].side,
            environment=options.environment,
            options=dict(options.options),
            n_tasks=len(schedule.tasks),
            tasks_hash=hash_tasks(schedule.tasks),
            seeds=options.seeds,
            temperature=options.chosen_temperature,
        )
        while options.again and _find_made(self.directory / plan.id) is not None:
            plan = plan.model_copy(update={"again": plan.again + 1})
        return plan


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


def _play(
    folder: Path, pair: Mapping[SideName, Contender], schedule: Schedule, options: EvaluationOptions
) -> tuple[list[Comparison], bool]:
    def open_speaker(name: SideName) -> Callable[[], Speaker]:
        contender = pair[name]
        if contender.side.url is not None:
            return lambda: ServedSpeaker(str(contender.side.url), contender.side.name, options.token)
        return lambda: InProcessSpeaker(contender.load(options.dtype))

    suite = options.environment
    speakers = {name: open_speaker(name) for name in SIDES}
    won, paid, stopped = play_both(schedule, speakers, Plays(folder), on_progress=options.on_progress, stop=options.stop)
    comparisons = [Comparison.of(f"{suite}: success", won)]
    if [one.model_dump() for one in won] != [one.model_dump() for one in paid]:
        comparisons.append(Comparison.of(f"{suite}: reward", paid))
    return comparisons, stopped


def _find_made(folder: Path) -> Evaluation | None:
    return _read(folder / EVALUATION_FILE) if (folder / EVALUATION_FILE).exists() else None


def _read(file: Path) -> Evaluation:
    try:
        return Evaluation.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise EvaluationError(f"{file} cannot be read as an evaluation: {error}; remove {file.parent} and evaluate again") from error
