"""Measuring both sides: plays, a command, held-out samples; each leaves in the evaluation's folder what it has as it gets it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from loraloop.dataset import Dataset
from loraloop.errors import EvaluationError
from loraloop.evaluate.command import run_command
from loraloop.evaluate.endpoint import Access, open_endpoint
from loraloop.evaluate.likelihood import HeldOutSample, Measure, MeasuredSamples, measure_samples, pair_figures
from loraloop.evaluate.planned import PlannedVerdict
from loraloop.evaluate.result import SIDES, Comparison, SideName, TaskScore
from loraloop.evaluate.rollout import Player
from loraloop.evaluate.sequential import SequentialVerdict
from loraloop.evaluate.speaker import InProcessSpeaker, ServedSpeaker, Speaker
from loraloop.evaluate.suite import Clock, Plays, Progress, Schedule, play_both
from loraloop.evaluate.verdict import Policy, Verdict
from loraloop.evaluation.options import EvaluationOptions
from loraloop.evaluation.reuse import name_sides, reuse_plays
from loraloop.evaluation.sides import Contender
from loraloop.files import write_json

TOKENS_A_SIGN = 20
"""After so many tokens of the plays under way their progress is told."""
MEASURED_AT_ONCE = 4
"""Rows of held-out samples."""


@dataclass(frozen=True)
class Work:
    """What is measured of both sides, found before anything is loaded."""

    pair: Mapping[SideName, Contender]
    schedule: Schedule | None
    dataset: Dataset | None
    samples: Sequence[HeldOutSample]
    notes: tuple[str, ...]


class Early:
    """Looks at the scores behind each block of tasks that both sides have played, until they decide."""

    def __init__(self, policy: Policy, n_tasks: int) -> None:
        planned = n_tasks >= policy.min_tasks  # finds what all tasks would find; with fewer nothing is decided either way
        self.sequential = PlannedVerdict(n_tasks, policy) if planned else SequentialVerdict(policy, max_tasks=n_tasks)
        self.n = 0
        self.verdict: Verdict | None = None
        self.stopped = False

    def __call__(self, candidate: Sequence[float], opponent: Sequence[float]) -> bool:
        """Whether the plays may end."""
        if len(candidate) > self.n:
            self.verdict = self.sequential.add(candidate[self.n :], opponent[self.n :])
            self.n = len(candidate)
        self.stopped = self.sequential.decided
        return self.stopped


Loaded = Callable[[SideName], Player]


def measure_both(folder: Path, work: Work, options: EvaluationOptions) -> tuple[list[Comparison], list[str], Early | None]:
    """(comparisons, the one to decide by first, notes, what decided early where that was asked for)."""
    comparisons, notes = list[Comparison](), list[str]()
    early = Early(options.policy, len(work.schedule.tasks)) if work.schedule is not None and options.early else None

    @cache
    def loaded(name: SideName) -> Player:
        return work.pair[name].load(options.dtype)

    if work.schedule is not None:
        comparisons += _play(folder, work, loaded, (options, early))
    if options.command is not None:
        comparisons.append(_compare_command(folder, work, loaded, options))
    if work.dataset is not None:
        measured, refused = _compare_samples(folder, work, loaded, options)
        comparisons += measured
        notes += refused
    return comparisons, notes, early


def _play(folder: Path, work: Work, loaded: Loaded, how: tuple[EvaluationOptions, Early | None]) -> list[Comparison]:
    options, early = how

    def open_speaker(name: SideName) -> Callable[[], Speaker]:
        side = work.pair[name].side
        if side.url is not None:
            return lambda: ServedSpeaker(str(side.url), side.name, options.token)
        return lambda: InProcessSpeaker(loaded(name), tell_token)

    assert work.schedule is not None  # noqa: S101  looked at before
    schedule = replace(work.schedule, side_keys=name_sides({side: work.pair[side].side for side in SIDES}, work.schedule, options))
    name = schedule.suite.name
    plays = Plays(folder)
    if not options.again:
        reuse_plays(plays, schedule, folder.parent)
    latest = Progress(len(plays), 2 * len(schedule.tasks) * schedule.seeds, None)

    def tell(progress: Progress) -> None:
        nonlocal latest
        latest = progress
        options.on_progress(progress)

    def tell_token(done: int, total: int, step: int) -> None:
        """A sign of life: the first plays of a block may take minutes."""
        if step % TOKENS_A_SIGN == 0:
            options.on_progress(replace(latest, what=f"plays ({total - done} under way, at token {step})"))

    speakers = {side: open_speaker(side) for side in SIDES}
    scores, stopped = play_both(schedule, speakers, plays, on_progress=tell, stop=early)
    if early is not None:  # the last block decides nothing any more, and is looked at all the same
        early([one.candidate for one in scores.success], [one.opponent for one in scores.success])
        early.stopped = stopped
    comparisons = [Comparison.of(f"{name}: success", scores.success)]
    if scores.reward != scores.success:
        comparisons.append(Comparison.of(f"{name}: reward", scores.reward))
    comparisons.append(Comparison.of(f"{name}: actions executed", scores.executed))
    return comparisons


def _compare_command(folder: Path, work: Work, loaded: Loaded, options: EvaluationOptions) -> Comparison:
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


def _compare_samples(folder: Path, work: Work, loaded: Loaded, options: EvaluationOptions) -> tuple[list[Comparison], list[str]]:
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
