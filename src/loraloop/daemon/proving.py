"""What proves and what serves a project's candidates: its own evaluation and gate, and its own service."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from loraloop.daemon.stages import Judged, Observed
from loraloop.daemon.state import LoopState
from loraloop.episode import Failure, Message, Outcome, Success, Timeout
from loraloop.evaluate.contamination import Overlap
from loraloop.evaluate.gate import Evidence, GuardScores
from loraloop.evaluate.probes import ProbeResult
from loraloop.evaluate.result import SIDES, Evaluation
from loraloop.evaluate.verdict import Policy, Verdict
from loraloop.evaluation import EvaluationOptions, ProbeOptions
from loraloop.judgement import Judgement
from loraloop.lora.registry import LoraModelRegistry
from loraloop.lora.states import ModelState, list_next
from loraloop.serve.aliases import Served
from loraloop.serve.applier import BASE, HASH_DIGITS
from loraloop.serve.canary import CanaryBounds, Trial
from loraloop.serve.fleet_status import ApplyReport
from loraloop.serve.orders import ServiceStatus
from loraloop.settings import ScenarioSettings
from loraloop.store.sql import SqlEpisodeStore


class ProvingProject(Protocol):
    """What proof and serving use of a project."""

    @property
    def store(self) -> SqlEpisodeStore:
        """Its episodes."""
        ...

    @property
    def registry(self) -> LoraModelRegistry:
        """Its models."""
        ...

    def evaluate(self, model_id: str, against: str = "live", options: EvaluationOptions | None = None) -> Evaluation:
        """Measure a model against another."""
        ...

    def judge(self, evidence: Evidence, policy: Policy | None = None) -> Verdict:
        """Send a candidate through the gate."""
        ...

    def find_judgement(self, model_id: str) -> Judgement | None:
        """What a model was judged to be."""
        ...

    def find_trained_tasks(self, model_id: str, tasks: Mapping[str, str]) -> tuple[Overlap, ...] | None:
        """Which of the tasks the model has trained on."""
        ...

    def list_requests(self, model_id: str, options: EvaluationOptions) -> dict[str, tuple[Message, ...]]:
        """How each task begins that a model would be measured by."""
        ...

    def probe(
        self, model_id: str, requests: Mapping[str, Sequence[Message]], probes: ProbeOptions, options: EvaluationOptions
    ) -> tuple[ProbeResult, ...] | None:
        """What probes find in a model."""
        ...

    def apply(self, model: str, alias: str, *, override: str | None = None) -> ApplyReport:
        """Let a model answer to an alias."""
        ...

    def rollback(self, alias: str, *, to: str | None = None, why: str = "") -> ApplyReport:
        """Let an alias go back."""
        ...

    def serving_status(self) -> ServiceStatus | dict[str, Served]:
        """How the service stands, or what each alias stands for."""
        ...


class MeasuredProof:
    """The project's evaluation and gate. What they need and nobody has looked at holds a candidate."""

    def __init__(self, project: ProvingProject) -> None:
        self._project = project

    def evaluate(self, scenario: ScenarioSettings, model: str, live: str | None) -> Judged:
        """As the scenario's `evaluate` has it, against what is live; once judged, the same again."""
        judgement = self._project.find_judgement(model)
        champion = live or BASE
        if judgement is not None and judgement.evidence.champion == champion:
            scores = judgement.evidence.candidate_scores
            return _judged(judgement.verdict, None, sum(scores) / len(scores))
        if not scenario.evaluate:
            return Judged(decision="hold", reason=f"the scenario {scenario.alias!r} does not say what {model} is to be measured on")
        return self._judge(scenario, model, champion)

    def _judge(self, scenario: ScenarioSettings, model: str, champion: str) -> Judged:
        options = replace(scenario.evaluation_options, policy=scenario.gate)
        requests = self._project.list_requests(model, options)
        texts = {task: str(request[-1].content or "") if request else "" for task, request in requests.items()}
        if options.environment is not None:
            texts = _telling(texts)
        overlaps = self._project.find_trained_tasks(model, texts)
        near = frozenset(one.held_out for one in overlaps or () if one.by == "near")
        if requests and near >= requests.keys():
            reason = f"all {len(near)} tasks are nearly tasks that {model} has trained on, so there is none left to prove it on"
            return Judged(decision="hold", reason=reason)
        options = replace(options, left_out=near)
        measured = self._project.evaluate(model, champion, options)
        if measured.verdict is None:
            reason = f"{measured.primary.name} is not from 0 to 1, or less of it is better: there is nothing to promote {model} by"
            return Judged(decision="hold", reason=reason, evaluation=measured.id)
        candidate, opponent = measured.scores()
        tasks = tuple(one.task for one in measured.primary.scores)
        named = self._project.find_trained_tasks(model, {task: "" for task in tasks if task not in texts})
        evidence = Evidence(
            candidate=model,
            champion=champion,
            task_ids=tasks,
            candidate_scores=tuple(candidate),
            champion_scores=tuple(opponent),
            guards=_guards(measured, scenario.gate),
            sequential=measured.verdict if measured.plan.early else None,
            overlaps=None if overlaps is None or named is None else tuple(one for one in (*overlaps, *named) if one.held_out in tasks),
            probes=None if measured.verdict.decision == "reject" else self._probe(scenario, model, requests, options),
        )
        return _judged(self._project.judge(evidence, scenario.gate), measured.id, measured.primary.candidate)

    def _probe(
        self, scenario: ScenarioSettings, model: str, requests: Mapping[str, Sequence[Message]], options: EvaluationOptions
    ) -> tuple[ProbeResult, ...] | None:
        """Where only a command knows the tasks, triggers are tried on the requests of held-out samples."""
        held_out = replace(options, environment=None, tasks=None, command=None, held_out=True)
        return self._project.probe(model, requests or self._project.list_requests(model, held_out), scenario.probes, options)


class ServedByProject:
    """The project's service; where none runs, an order is kept for its next start. What is replaced is put away, and brought back."""

    def __init__(self, project: ProvingProject, bounds: CanaryBounds | None = None) -> None:
        self._project, self._bounds = project, bounds or CanaryBounds()

    def apply(self, scenario: ScenarioSettings, state: LoopState) -> None:
        """The model answers to the alias from then on; the one before is retired."""
        model = str(state.model)
        if self._find_live(scenario.alias) != model:
            self._project.apply(model, scenario.alias)
        if state.live is not None and state.live != model:
            self._move(state.live, ModelState.RETIRED, f"{model} has taken its place")

    def observe(self, scenario: ScenarioSettings, state: LoopState) -> Observed:
        """The live model's first 20, 40, 80 … scores beside those of the one before (`serve.canary.Trial`).

        What is beyond the last look waits for the next, so that a process that begins anew, however often, looks no oftener.
        """
        scores = self.list_scores(scenario, state)
        trial = Trial(str(state.live), self._bounds)
        trial.canary.scores = scores[: _last_look(len(scores), self._bounds.first_look)]
        trial.canary.scored = len(trial.canary.scores)
        trial.champion.scores = self._scores_of(scenario, state.previous, None)
        worse = trial.judge()
        told = worse or f"{len(scores)} episodes with a score, nothing speaks against it"
        return Observed(is_worse=worse is not None, is_decided=False, reason=told)

    def roll_back(self, scenario: ScenarioSettings, state: LoopState, reason: str) -> None:
        """What answered before is brought back from where it was put away, and the other is retired."""
        before = state.previous
        if before is not None:
            self._move(before, ModelState.PROMOTED, reason)
        if self._find_live(scenario.alias) != before:
            if before is None:
                self._project.apply(BASE, scenario.alias, override=reason)
            else:
                self._project.rollback(scenario.alias, to=before, why=reason)
        if state.live is not None and state.live != before:
            self._move(state.live, ModelState.RETIRED, reason)

    def list_scores(self, scenario: ScenarioSettings, state: LoopState) -> list[float]:
        """Of the episodes since it was applied."""
        return self._scores_of(scenario, state.live, state.applied_at) if state.live is not None else []

    def _scores_of(self, scenario: ScenarioSettings, model: str | None, since: int | None) -> list[float]:
        """The scores of episodes in which one version alone answered, as the router tells it by the tag `model`; None is the base model."""
        prefix = f"{BASE}@"
        if model is not None:
            prefix = f"{scenario.alias}@{(self._project.registry.get(model).adapter_sha256 or '')[:HASH_DIGITS]}"
        wanted = scenario.episode_filter.model_copy(update={"since": since})
        found = [one for one in self._project.store.list_meta(wanted) if one.metadata.tags.get("model", "").startswith(prefix)]
        return [score for one in found if "," not in one.metadata.tags["model"] and (score := _score(one.outcome)) is not None]

    def _find_live(self, alias: str) -> str | None:
        """The model that answers to the alias, or is kept for it; None for the base model and for an alias that nobody has applied."""
        status = self._project.serving_status()
        if isinstance(status, ServiceStatus):
            found = status.fleet.aliases.get(alias)
            return found.model_id if found else None
        served = status.get(alias)
        version = (served.wanted or served.version) if served else None
        return version.model_id if version else None

    def _move(self, model: str, state: ModelState, reason: str) -> None:
        """Give a model a state that it may have and does not have yet."""
        registry = self._project.registry
        if registry.get(model).state is not state and state in list_next(registry.get_history(model)):
            registry.move(model, state, reason)


def _telling(texts: Mapping[str, str]) -> dict[str, str]:
    """What tells one task of a suite from another: a text that several begin with is of none of them."""
    tasks = Counter(texts.values())
    return {task: text if tasks[text] == 1 else "" for task, text in texts.items()}


def _last_look(n: int, first: int) -> int:
    """The last of `first`, twice, four times it … that `n` reaches; 0 before the first."""
    return first << ((n // first).bit_length() - 1) if n >= first else 0


def _guards(measured: Evaluation, policy: Policy) -> dict[str, GuardScores]:
    """The scores of the policy's guarded metrics, as far as they were measured; more is better."""
    found = {}
    for one in measured.comparisons:
        if one.name in policy.guards:
            sign = 1.0 if one.higher_is_better else -1.0
            candidate, champion = (tuple(sign * getattr(score, side) for score in one.scores) for side in SIDES)
            found[one.name] = GuardScores(candidate=candidate, champion=champion)
    return found


def _judged(verdict: Verdict, evaluation: str | None, score: float) -> Judged:
    return Judged(decision=verdict.decision, reason=verdict.reason, evaluation=evaluation, score=score)


def _score(outcome: Outcome) -> float | None:
    """0 to 1; None where it is not known."""
    match outcome:
        case Success(score=score):
            return min(max(score, 0.0), 1.0)
        case Timeout(partial_score=partial):
            return min(max(partial or 0.0, 0.0), 1.0)
        case Failure():
            return 0.0
    return None
