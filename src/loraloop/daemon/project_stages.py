"""The stages of a project: its own verbs, each made safe to be asked for again.

What proves a candidate and what serves it are given as objects. Without them nothing is promoted and nothing is switched: a candidate is
held, with that as the reason.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from loraloop.daemon.stages import Collected, Judged, Look, Observed
from loraloop.daemon.state import LoopState
from loraloop.dataset import Dataset, DatasetSettings
from loraloop.episode import EpisodeFilter
from loraloop.errors import ImportFailed, LoraTrainerError, ServingError
from loraloop.importers.ingest import IngestReport, find_side_file, refuse_file
from loraloop.importers.sources import search
from loraloop.learn.compose import compose
from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.lora.model import LoraModelId, TrainedModel
from loraloop.lora.registry import LoraModelRegistry
from loraloop.lora.runs import Run, RunStore
from loraloop.plugins import EpisodeStore, LearnModel
from loraloop.settings import ScenarioSettings, Settings
from loraloop.training_data import Method

MAX_DETAILS = 5
"""How many refusals a cycle tells in words."""
SECONDS_TO_LET_GO = 90.0
"""For what is left of a killed loop's training to end."""


class OpenProject(Protocol):
    """What the stages use of a project."""

    @property
    def directory(self) -> Path:
        """Where everything is kept."""
        ...

    @property
    def store(self) -> EpisodeStore:
        """Its episodes."""
        ...

    @property
    def registry(self) -> LoraModelRegistry:
        """Its models."""
        ...

    @property
    def runs(self) -> RunStore:
        """Its trainings."""
        ...

    def ingest(self, paths: Sequence[Path], *, license_name: str | None = None) -> Iterator[IngestReport]:
        """Read files."""
        ...

    def follow(self, paths: Sequence[Path], wait: Callable[[], bool], *, license_name: str | None = None) -> Iterator[IngestReport]:
        """Read what is new in growing files."""
        ...

    def build(
        self, learn_model: LearnModel | None = None, *, episode_filter: EpisodeFilter | None = None, settings: DatasetSettings | None = None
    ) -> Dataset:
        """Freeze a dataset."""
        ...

    def train(
        self,
        config: LoraTrainerConfig,
        *,
        dataset: str | None = None,
        method: Method | None = None,
        options: TrainOptions | None = None,
        model_id: LoraModelId | None = None,
    ) -> TrainedModel:
        """Train on a dataset."""
        ...

    def resume(self, run_id: str) -> TrainedModel:
        """Go on with a run."""
        ...


class Proof(Protocol):
    """Who judges a candidate."""

    def evaluate(self, scenario: ScenarioSettings, model: str, live: str | None) -> Judged:
        """As `Stages.evaluate`."""
        ...


class Serving(Protocol):
    """Who serves the promoted model, and hears how it does."""

    def apply(self, scenario: ScenarioSettings, model: str) -> None:
        """As `Stages.apply`."""
        ...

    def observe(self, scenario: ScenarioSettings, state: LoopState) -> Observed:
        """As `Stages.observe`."""
        ...

    def roll_back(self, scenario: ScenarioSettings, to: str | None, reason: str) -> None:
        """As `Stages.roll_back`."""
        ...


class NoProof:
    """Nothing is measured, so nothing is promoted."""

    def evaluate(self, scenario: ScenarioSettings, model: str, live: str | None) -> Judged:
        """Hold every candidate."""
        against = live or "the base model"
        return Judged(decision="hold", reason=f"{scenario.alias} has nothing set by which {model} could be proven better than {against}")


class NoServing:
    """Nothing serves this project."""

    def apply(self, scenario: ScenarioSettings, model: str) -> None:
        """Raises ServingError."""
        raise ServingError(f"nothing serves {scenario.alias!r}, so it cannot be switched to {model}; start `loraloop serve`")

    def observe(self, scenario: ScenarioSettings, state: LoopState) -> Observed:
        """There is nothing to hear."""
        return Observed(is_worse=False, is_decided=True, reason=f"nothing serves {scenario.alias}, so nothing is heard of {state.live}")

    def roll_back(self, scenario: ScenarioSettings, to: str | None, reason: str) -> None:
        """Raises ServingError."""
        raise ServingError(f"nothing serves {scenario.alias!r}, so it cannot be given back to {to or 'the base model'} ({reason})")


def find_files(source: Path) -> list[Path]:
    """What there is to take in from a file or folder; nothing from one that is not there yet."""
    try:
        return [found.path for found in search([source]) if find_side_file(found) is None]
    except ImportFailed:
        return []


class ProjectStages:
    """The stages of `project` as `settings` have them."""

    def __init__(self, project: OpenProject, settings: Settings, *, proof: Proof | None = None, serving: Serving | None = None) -> None:
        self._project, self._settings = project, settings
        self._proof, self._serving = proof or NoProof(), serving or NoServing()
        self._alone = threading.Lock()
        self._training: set[str] = set()
        self._taken_in: dict[Path, tuple[int, int]] = {}

    def collect(self, scenario: ScenarioSettings) -> Collected:
        """Growing files are read from where they were left, others as a whole when they have changed; what is known is stored once.

        A file that cannot be read, which may be half written, is tried again when it has changed.
        """
        files = [path for source in scenario.sources for path in find_files(self._project.directory / source)]
        growing = [path for path in files if path.suffix == ".jsonl"]
        whole = [path for path in files if path.suffix != ".jsonl"]
        with self._alone:  # positions of all followed files are in one file
            return self._collect(growing, whole, scenario.license)

    def _collect(self, growing: list[Path], whole: list[Path], license_name: str | None) -> Collected:
        reports = []
        for report in self._project.follow(growing, lambda: False, license_name=license_name) if growing else ():
            if "not_followed" in report.refused:
                whole.append(Path(report.path))
            else:
                reports.append(report)
        for path in whole:
            reports += self._take_in(path, license_name)
        refused: Counter[str] = Counter()
        for report in reports:
            refused.update(report.refused)
        details = [refusal.detail for report in reports for refusal in report.refusals]
        return Collected(stored=sum(report.stored for report in reports), refused=dict(refused), details=tuple(details[:MAX_DETAILS]))

    def _take_in(self, path: Path, license_name: str | None) -> list[IngestReport]:
        """The report of a file that is read as a whole; none when it is as it was."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return []
        signature = (status.st_size, status.st_mtime_ns)
        if self._taken_in.get(path) == signature:
            return []
        self._taken_in[path] = signature
        try:
            return list(self._project.ingest([path], license_name=license_name))
        except ImportFailed as error:
            return [refuse_file(path, error)]

    def look(self, scenario: ScenarioSettings, state: LoopState) -> Look:
        """By the number of episodes that are new since the last round."""
        n_episodes = self._project.store.count(scenario.episode_filter)
        n_new = n_episodes - min(state.n_episodes, n_episodes)
        reason = f"{n_new} new episodes of {scenario.min_new_episodes}"
        return Look(fire=n_new >= scenario.min_new_episodes, reasons=(reason,), n_episodes=n_episodes)

    def build(self, scenario: ScenarioSettings) -> str:
        """The dataset's id is the hash of what is in it, so that building again gives the same."""
        learn_model = compose(scenario.method, scenario.learn_model)
        settings = self._settings.dataset_settings(scenario)
        return self._project.build(learn_model, episode_filter=scenario.episode_filter, settings=settings).id

    def is_spent(self, run: str) -> bool:
        """A run whose data alone was written, that failed before its first step, or that a script of the user's own left unfinished."""
        found = self._project.runs.directory / run
        if not found.exists():
            return False
        begun = Run(found)
        self._wait_for(begun)
        try:
            can_resume = begun.can_resume
        except LoraTrainerError:  # killed before it was told anything, so nothing was trained
            return True
        status = begun.status
        never_began = status.state == "failed" and not status.step and not status.checkpoint
        return never_began or (not can_resume and status.state in ("failed", "stopped", "interrupted"))

    def train(self, scenario: ScenarioSettings, dataset: str, run: str) -> str:
        """Begin the run, go on with it, or give the model that has come of it."""
        if any(model.id == run for model in self._project.registry.list_models()):
            return run
        begun = Run(self._project.runs.directory / run)
        self._training.add(run)
        try:
            if begun.path.exists():
                self._wait_for(begun)
                return self._project.resume(run).id
            config, options = self._settings.trainer_settings(scenario)
            told = {"dataset": dataset, "method": scenario.method, "options": options, "model_id": LoraModelId(run)}
            return self._project.train(config, **told).id  # type: ignore[arg-type]
        finally:
            self._training.discard(run)

    def evaluate(self, scenario: ScenarioSettings, model: str, live: str | None) -> Judged:
        """By what was given as proof."""
        return self._proof.evaluate(scenario, model, live)

    def apply(self, scenario: ScenarioSettings, model: str) -> None:
        """By what was given as serving."""
        self._serving.apply(scenario, model)

    def observe(self, scenario: ScenarioSettings, state: LoopState) -> Observed:
        """By what was given as serving."""
        return self._serving.observe(scenario, state)

    def roll_back(self, scenario: ScenarioSettings, to: str | None, reason: str) -> None:
        """By what was given as serving."""
        self._serving.roll_back(scenario, to, reason)

    def stop(self) -> None:
        """Trainings save a checkpoint and end; anything else is short, or can be done again."""
        for run in tuple(self._training):
            with suppress(LoraTrainerError):  # it has not begun, or has ended
                Run(self._project.runs.directory / run).stop()

    def _wait_for(self, run: Run) -> None:
        """Until nobody works on it: a training that has lost its parent ends by itself. Raises LoraTrainerError when it does not."""
        deadline = time.monotonic() + SECONDS_TO_LET_GO
        while run.is_held:
            if time.monotonic() > deadline:
                raise LoraTrainerError(f"another process works on run {run.id}; watch it by `loraloop runs watch {run.id}`")
            time.sleep(0.2)
