"""A project: one directory that holds everything, and one method per verb.

`episodes.db` is the episode store unless a URL names another, `datasets/<id>/` are frozen datasets, `runs/<id>/` training files and
logs, `models/<id>/` adapters and their records, `serving/` what answers to which alias. `followed.json` keeps up to where growing
files were read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from loraloop import judgement, pipeline, retention, serving
from loraloop.chat.rows import ACCEPTED
from loraloop.daemon import state
from loraloop.daemon.cycle import CycleReport
from loraloop.daemon.project_stages import ProjectStages, Proof, Serving
from loraloop.daemon.proving import MeasuredProof, ServedByProject
from loraloop.daemon.status import LoopStatus, status_of
from loraloop.daemon.watch import Watch, choose
from loraloop.data_report.findings import Findings, ReportOptions
from loraloop.dataset import Dataset, DatasetSettings, list_datasets, list_folders, open_dataset
from loraloop.episode import CONVERSATION, EpisodeFilter, Label, Message
from loraloop.errors import DatasetError, StoreError
from loraloop.evaluate.contamination import Overlap
from loraloop.evaluate.gate import Evidence
from loraloop.evaluate.probes import ProbeResult
from loraloop.evaluate.report import to_html
from loraloop.evaluate.result import Evaluation
from loraloop.evaluate.verdict import Policy, Verdict
from loraloop.evaluation import EvaluationOptions, Evaluator, ProbeOptions, Sources
from loraloop.files import write_atomic
from loraloop.importers.ingest import IngestReport
from loraloop.importers.scores import ScoreRule
from loraloop.label import LabelReport, label_from
from loraloop.lora.config import LoraTrainerConfig, TrainOptions
from loraloop.lora.model import LoraModelId, TrainedModel
from loraloop.lora.registry import LoraModelRegistry
from loraloop.lora.runs import RunStore
from loraloop.lora.states import ModelState
from loraloop.lora.trainer import LoraTrainer, OnEvent
from loraloop.plugins import LearnModel, find
from loraloop.retention import ForgetReport, PruneReport
from loraloop.serve.aliases import Served
from loraloop.serve.fleet_status import ApplyReport
from loraloop.serve.orders import DEFAULT_ALIAS, ApplyOrder, PromoteOrder, RollbackOrder, ServiceAddress, ServiceSettings, ServiceStatus
from loraloop.settings import load_settings
from loraloop.store.sql import SqlEpisodeStore
from loraloop.training_data import Method


class Project:
    """An open project directory; a context manager. Made when it is not there, unless `create` is False: then StoreError.

    Its episodes are in `episodes.db`, or at `store_url`, such as `postgresql+psycopg://USER@HOST/DATABASE`; without one at what its
    settings say, the environment's `LORALOOP_STORE_URL` first. Raises SettingsError for settings that cannot be.
    """

    def __init__(self, directory: str | Path, *, create: bool = True, store_url: str | None = None) -> None:
        self.directory = Path(directory)
        database = self.directory / "episodes.db"
        self.settings = load_settings(self.directory)
        url = store_url or self.settings.get("store", "url")
        if not create and not (self.directory if url else database).exists():
            lacks = "" if url else f" (it has no {database.name})"
            raise StoreError(f"no project in {self.directory}{lacks}; begin one with `loraloop ingest PATH`")
        self.store = SqlEpisodeStore(url or database)
        self.directory.mkdir(parents=True, exist_ok=True)  # where the store is elsewhere, nothing has made it
        self.registry = LoraModelRegistry(self.directory / "models")
        self.runs = RunStore(self.directory / "runs")
        self.registry.sweep()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.store.close()

    def ingest(
        self,
        paths: Sequence[Path],
        format_name: str | None = None,
        on_progress: Callable[[Path, int, int | None], None] = lambda path, done, total: None,
        *,
        license_name: str | None = None,
        score_rule: ScoreRule | None = None,
        readmit: bool = False,
    ) -> Iterator[IngestReport]:
        """Read files into the store, one report each."""
        told = {"license_name": license_name, "score_rule": score_rule, "readmit": readmit}
        return pipeline.ingest(self.store, paths, format_name, on_progress, **told)  # type: ignore[arg-type]

    def label(self, labels: Sequence[Label]) -> None:
        """Say how episodes ended; the newest label of each counts. Raises StoreError when one is not there: then none is added."""
        self.store.add_labels(labels)

    def label_from(self, path: Path, key: str | None = None) -> LabelReport:
        """Join outcomes that were recorded elsewhere, and say what became of each."""
        return label_from(self.store, path, key)

    def forget(self, episode_ids: Sequence[str]) -> ForgetReport:
        """Remove episodes for good, keep them out, and name what was made from them."""
        return retention.forget(self.store, episode_ids, self._made())

    def prune(self, before_ms: int, *, keep_used: bool = True, dry_run: bool = False) -> PruneReport:
        """Remove the episodes that were stored before a time, with `keep_used` none that anything was made from."""
        return retention.prune(self.store, before_ms, self._made() if keep_used else None, dry_run=dry_run)

    def follow(
        self,
        paths: Sequence[Path],
        wait: Callable[[], bool],
        *,
        format_name: str | None = None,
        license_name: str | None = None,
        score_rule: ScoreRule | None = None,
    ) -> Iterator[IngestReport]:
        """Read what is new in growing files into the store, until `wait`, called when there is nothing new, says False."""
        positions = self.directory / "followed.json"
        return pipeline.follow(
            self.store, paths, positions, wait, format_name=format_name, license_name=license_name, score_rule=score_rule
        )

    def export(self, target: Path | TextIO, format_name: str = "openai", episode_filter: EpisodeFilter | None = None) -> Counter[str]:
        """Write episodes to a file as OpenAI chat lines or ATIF trajectories; counts by outcome. Raises SettingsError."""
        return pipeline.export(self.store, target, format_name, episode_filter)

    def build(
        self,
        learn_model: LearnModel | None = None,
        *,
        episode_filter: EpisodeFilter | None = None,
        settings: DatasetSettings | None = None,
        on_progress: Callable[[str, int], None] = lambda step, n_episodes: None,
    ) -> Dataset:
        """Freeze episodes into a dataset; by default whole conversations of the episodes that ended well."""
        model = learn_model or find("learn_models", CONVERSATION)()
        return pipeline.build(
            self.store,
            model,
            self.directory / "datasets",
            episode_filter=episode_filter,
            settings=settings,
            on_progress=on_progress,
        )

    def report(
        self,
        dataset: str | None = None,
        base_model: str | None = None,
        options: ReportOptions | None = None,
        *,
        path: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> tuple[Findings, Path]:
        """What the dataset with this id (without one the newest) will teach, and its page: beside its folder unless told otherwise."""
        chosen = self.get_dataset(dataset)
        page = path or chosen.path.with_suffix(".html")
        return pipeline.report(chosen, page, base_model, options, say), page

    def train(
        self,
        config: LoraTrainerConfig,
        *,
        dataset: str | None = None,
        method: Method | None = None,
        options: TrainOptions | None = None,
        on_event: OnEvent | None = None,
        model_id: LoraModelId | None = None,
    ) -> TrainedModel:
        """Train on the dataset with this id, without one the newest that `method` trains. All files go into this project.

        The model gets `model_id`, or a new one; there is never a second training of one id.
        """
        config = config.replace(output_dir=self.directory / "models", data_dir=self.directory / "runs")
        chosen = self.get_dataset(dataset) if dataset is not None or method is None else self._get_newest(method)
        return pipeline.train(self.store, chosen, config, options, on_event, method=method, model_id=model_id)

    def check_training(
        self,
        config: LoraTrainerConfig,
        *,
        dataset: str | None = None,
        method: Method | None = None,
        options: TrainOptions | None = None,
        on_event: OnEvent | None = None,
    ) -> None:
        """Look whether `train` could start with the same arguments. Raises LoraTrainerError with all that stands in its way."""
        config = config.replace(output_dir=self.directory / "models", data_dir=self.directory / "runs")
        chosen = self.get_dataset(dataset) if dataset is not None or method is None else self._get_newest(method)
        pipeline.check_training(self.store, chosen, config, options, on_event, method=method)

    def resume(self, run_id: str, *, force: bool = False, on_event: OnEvent | None = None, **changes: Any) -> TrainedModel:
        """Go on with the run whose id begins with `run_id`, or the `latest`, to the very adapter that it would have become.

        `changes` are settings of LoraTrainerConfig and TrainOptions that are not what they were, which needs `force`, like all else
        that has changed.
        """
        run = self.runs.get(run_id)
        trainer = LoraTrainer.of_run(run, self.store, output_dir=self.directory / "models", **changes)
        return pipeline.resume(trainer, run, on_event, force=force)

    def watch(
        self,
        aliases: Sequence[str] = (),
        *,
        once: bool = False,
        interval_seconds: float | None = None,
        proof: Proof | None = None,
        serving: Serving | None = None,
    ) -> Generator[CycleReport, None, None]:
        """Run the loops of these aliases, of all without any, and give a report of every cycle; see `Watch.run`.

        Raises SettingsError for an alias that there is not, LeaseHeld when another process watches the project.
        """
        scenarios = choose(self.settings.scenarios, aliases)
        stages = self._stages(proof, serving)
        seconds = self.settings.get("watch", "interval_seconds") if interval_seconds is None else interval_seconds
        return Watch(self.directory, self.store.ledger, scenarios, stages, seconds).run(once=once)

    def status(self, aliases: Sequence[str] = ()) -> list[LoopStatus]:
        """Where the loops of these aliases stand, of all without any. Raises SettingsError for an alias that there is not."""
        stages = self._stages()
        return [status_of(self.store.ledger, one, stages, self.directory) for one in choose(self.settings.scenarios, aliases)]

    def _stages(self, proof: Proof | None = None, serving: Serving | None = None) -> ProjectStages:
        return ProjectStages(self, self.settings, proof=proof or MeasuredProof(self), serving=serving or ServedByProject(self))

    def ask_round(self, aliases: Sequence[str] = ()) -> None:
        """Let the loops of these aliases, all without any, begin a round as soon as none is under way, whatever the trigger waits for."""
        for alias in [one.alias for one in choose(self.settings.scenarios, aliases)] if aliases else [state.EVERY_ALIAS]:
            state.request(self.store.ledger, alias)

    def pause(self, aliases: Sequence[str] = (), *, paused: bool = True) -> None:
        """Let the loops of these aliases, all without any, begin no further stage, or with `paused=False` go on again."""
        change = state.pause if paused else state.resume
        for alias in [one.alias for one in choose(self.settings.scenarios, aliases)] if aliases else [state.EVERY_ALIAS]:
            change(self.store.ledger, alias)

    def evaluate(self, model_id: str, against: str = "live", options: EvaluationOptions | None = None) -> Evaluation:
        """Measure a model against another side on the same tasks: `live`, `base`, another model, or NAME@URL; kept in `evaluations/`.

        What was measured already is read, and what was cut off goes on. Raises SettingsError, EvaluationError, LoraTrainerError.
        """
        return self._evaluator.run(model_id, against, options or EvaluationOptions())

    def report_evaluation(self, evaluation: Evaluation, path: Path) -> None:
        """Write an evaluation of this project as one page of HTML."""
        write_atomic(path, to_html(evaluation, self.directory / "evaluations" / evaluation.id))

    def list_evaluations(self) -> list[Evaluation]:
        """The finished evaluations, the newest last. Raises EvaluationError when one is damaged."""
        return self._evaluator.list_evaluations()

    def get_evaluation(self, evaluation_id: str) -> Evaluation:
        """The finished evaluation whose id is or begins with `evaluation_id`, or the `latest`. Raises EvaluationError."""
        return self._evaluator.get(evaluation_id)

    @property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self.directory / "evaluations", Sources(self.registry, self.store, self._find_base, self.get_dataset))

    def _find_base(self, model: TrainedModel) -> str:
        """Where a model's base model was when it was trained: what the run was told, else how the model names it."""
        known = {run.id: run for run in self.runs.list_runs()}
        run = known.get(model.run or "")
        return str(run.plan.config["base_model"]) if run else model.base_model

    def list_datasets(self) -> list[Dataset]:
        """The datasets, the one that was built last at the end. Raises DatasetError when one is damaged."""
        return list_datasets(self.directory / "datasets")

    def get_dataset(self, dataset_id: str | None = None) -> Dataset:
        """The dataset whose id begins with `dataset_id`, the one that was built last without. Raises DatasetError."""
        folders = list_folders(self.directory / "datasets")
        if dataset_id is None:
            if not folders:
                raise DatasetError(f"no dataset in {self.directory}; make one with `loraloop build`")
            return open_dataset(folders[-1])
        found = [folder for folder in folders if folder.name.startswith(dataset_id)]
        if len(found) != 1:
            known = ", ".join(folder.name for folder in folders[-5:]) or "none; make one with `loraloop build`"
            raise DatasetError(f"{len(found)} datasets begin with {dataset_id!r}; known: {known}")
        return open_dataset(found[0])

    def _get_newest(self, method: Method) -> Dataset:
        """The dataset that was built last among those that `method` trains. Raises DatasetError."""
        for folder in reversed(list_folders(self.directory / "datasets")):
            dataset = open_dataset(folder)
            if dataset.manifest.method in ACCEPTED[method]:
                return dataset
        raise DatasetError(f"no dataset in {self.directory} for {method}; make one with `loraloop build --method {method}`")

    def list_models(self) -> list[TrainedModel]:
        """The trained models, oldest first."""
        return self.registry.list_models()

    def get_model(self, model_id: str) -> TrainedModel:
        """The model whose id is or begins with `model_id`, or `latest`. Raises LoraTrainerError."""
        return self.registry.get(model_id)

    def move_model(self, model_id: str, state: ModelState | str, reason: str) -> TrainedModel:
        """Give a model another state. Raises LoraTrainerError for a change that the table of states lacks."""
        return self.registry.move(model_id, state, reason)

    def judge(self, evidence: Evidence, policy: Policy | None = None, *, override_reason: str | None = None) -> Verdict:
        """Send a candidate through the gate: its verdict is kept with the evidence, and its state moves. See `judgement.decide`."""
        return judgement.decide(self.registry, self.store.ledger, evidence, policy, override_reason=override_reason)

    def promote(self, model_id: str, reason: str) -> Verdict:
        """Promote a model that was held or rejected, for a reason that is kept. Raises EvaluationError without one."""
        return judgement.promote(self.registry, self.store.ledger, self.registry.get(model_id).id, reason)

    def find_judgement(self, model_id: str) -> judgement.Judgement | None:
        """What a model was judged to be and on what evidence, None when it never was."""
        return judgement.find_judgement(self.registry, model_id)

    def find_trained_tasks(self, model_id: str, tasks: Mapping[str, str]) -> tuple[Overlap, ...] | None:
        """Which of `tasks`, first requests by id, the model has trained on; None when that cannot be told."""
        model = self.registry.get(model_id)
        return judgement.find_trained_tasks(tasks, model, self.registry, self.store, self.directory / "datasets")

    def list_requests(self, model_id: str, options: EvaluationOptions) -> dict[str, tuple[Message, ...]]:
        """How each task begins that a model would be measured by; none where only a command knows its tasks."""
        return self._evaluator.list_requests(model_id, options)

    def probe(
        self, model_id: str, requests: Mapping[str, Sequence[Message]], probes: ProbeOptions, options: EvaluationOptions
    ) -> tuple[ProbeResult, ...] | None:
        """What probes find in a model, `requests` being how held-out tasks begin; None when what it has trained on is gone."""
        samples = judgement.list_trained_samples(self.registry.get(model_id), self.registry, self.directory / "datasets")
        return None if samples is None else self._evaluator.probe(model_id, samples, requests, probes, options)

    def delete_model(self, model_id: str) -> LoraModelId:
        """Remove a model and give its whole id. Raises LoraTrainerError while it is promoted or served, or something goes on from it."""
        return self.registry.delete(model_id, self._find_use)

    def serve(self, settings: ServiceSettings, on_ready: Callable[[ServiceAddress], None]) -> int:
        """Serve until a signal says to end, and give its number; `on_ready` is told where, when requests are answered.

        Raises ServingError when it cannot begin.
        """
        return serving.serve(self._serving, self.store, self.registry, settings, on_ready)

    def apply(self, model: str, alias: str = DEFAULT_ALIAS, *, canary: float | None = None, override: str | None = None) -> ApplyReport:
        """Let a promoted model answer to `alias`, or to the share `canary` of its conversations; another only with `override`, a reason.

        Raises ServingError and LoraTrainerError saying why not; then nothing has changed.
        """
        return serving.apply(self._serving, self.registry, ApplyOrder(model=model, alias=alias, canary=canary, override=override))

    def promote_canary(self, alias: str = DEFAULT_ALIAS) -> ApplyReport:
        """Let the canary of `alias` answer to all of its conversations. Raises ServingError."""
        return serving.promote(self._serving, PromoteOrder(alias=alias))

    def rollback(self, alias: str = DEFAULT_ALIAS, *, to: str | None = None, why: str = "") -> ApplyReport:
        """End the trial of a canary, or let `alias` go back to what answered before, the last one or `to`. Raises ServingError."""
        return serving.rollback(self._serving, self.registry, RollbackOrder(alias=alias, to=to, why=why))

    def serving_status(self) -> ServiceStatus | dict[str, Served]:
        """How the running service stands; without one, what each alias stands for. Raises ServingError."""
        return serving.read_status(self._serving)

    def _made(self) -> retention.Made:
        return self.list_datasets(), self.runs.list_runs(), self.registry.list_models()

    @property
    def _serving(self) -> Path:
        return self.directory / "serving"

    def _find_use(self, model_id: LoraModelId) -> str | None:
        """What needs a model, in words."""
        return serving.find_use(self._serving, model_id) or self._find_run_from(model_id)

    def _find_run_from(self, model_id: LoraModelId) -> str | None:
        """The run that continues from a model, and is not finished, in words."""
        for run in self.runs.list_runs():
            run_state = run.status.state
            if run_state != "finished" and run.plan.parent == model_id:
                return f"the run {run.id}, which is {run_state}, continues from it; delete it when that is finished"
        return None
