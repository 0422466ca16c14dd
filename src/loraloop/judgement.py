"""A candidate's way through the gate: what it has trained on, the verdict, and what then becomes of it.

Each step can be repeated: the verdict is on the disk before the state of the model moves, the state before the event says so, and whoever
was killed in between judges the same evidence again and only does what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from loraloop.dataset import list_folders, open_dataset
from loraloop.dataset.similar import Shingles, shingle, without_boilerplate
from loraloop.dataset.split import first_request
from loraloop.episode import Frozen, Message
from loraloop.errors import EvaluationError
from loraloop.evaluate.contamination import Overlap, TaskTrace, find_overlaps
from loraloop.evaluate.gate import Evidence, judge, override
from loraloop.evaluate.verdict import Choice, Policy, Verdict
from loraloop.files import content_hash
from loraloop.lora.model import TrainedModel
from loraloop.lora.registry import LoraModelRegistry
from loraloop.lora.states import ModelState, list_next
from loraloop.plugins import EpisodeStore
from loraloop.store.ledger import Event, Ledger
from loraloop.training_data import TrainingData

JUDGED = "gate"
"""The kind of the event that a judgement leaves; its subject is the model."""
STATES: dict[Choice, ModelState] = {"promote": ModelState.PROMOTED, "hold": ModelState.HELD, "reject": ModelState.REJECTED}


class Judgement(Frozen):
    """What is kept in the folder of a model: a verdict with all that it rests on. Judged again, the evidence gives the verdict."""

    verdict: Verdict
    evidence: Evidence
    policy: Policy
    adapter_sha256: str | None
    """The adapter that was judged."""


def find_trained_tasks(
    tasks: Mapping[str, str], model: TrainedModel, registry: LoraModelRegistry, store: EpisodeStore, datasets: Path
) -> tuple[Overlap, ...] | None:
    """Which of `tasks`, first requests by task id, the model or one that it went on from has trained on.

    A task's name is looked up in the episodes; where those are forgotten, what the dataset says still tells its text. None when it
    cannot be told, as neither is there any more. Raises LoraTrainerError for a parent that is gone, DatasetError for a damaged dataset.
    """
    trained: set[tuple[str, str]] = set()
    folders = {folder.name: folder for folder in list_folders(datasets)}
    ancestor: TrainedModel | None = model
    while ancestor is not None:
        found = _list_trained(ancestor, store, folders.get(ancestor.dataset or ""))
        if found is None:
            return None
        trained |= found
        ancestor = registry.get(ancestor.parent) if ancestor.parent else None
    by_name = sorted(trained, key=lambda one: (one[0].startswith("episode "), one))  # a task's own name tells more than its episode's
    named = [*by_name, *tasks.items()]
    parts = without_boilerplate([shingle(text) for _, text in named], [name for name, _ in named])
    traces = [_trace(name, text, part) for (name, text), part in zip(named, parts, strict=True)]
    return find_overlaps(traces[len(trained) :], traces[: len(trained)])


def list_trained_samples(model: TrainedModel, registry: LoraModelRegistry, datasets: Path) -> list[TrainingData] | None:
    """All that the model, and those that it went on from, have trained on; None when a dataset of theirs is not there any more.

    Raises LoraTrainerError for a parent that is gone, DatasetError for a damaged dataset.
    """
    folders = {folder.name: folder for folder in list_folders(datasets)}
    found: dict[str, list[TrainingData]] = {}
    ancestor: TrainedModel | None = model
    while ancestor is not None:
        folder = folders.get(ancestor.dataset or "")
        if folder is None:
            return None
        if folder.name not in found:
            found[folder.name] = open_dataset(folder).load_training()
        ancestor = registry.get(ancestor.parent) if ancestor.parent else None
    return [sample for samples in found.values() for sample in samples]


def decide(
    registry: LoraModelRegistry, ledger: Ledger, evidence: Evidence, policy: Policy | None = None, *, override_reason: str | None = None
) -> Verdict:
    """Judge the candidate of `evidence`, keep the verdict with it, and move the model accordingly.

    With `override_reason` it is promoted whatever the verdict, which is kept. The adapter must be what was recorded. Raises
    LoraTrainerError for an unknown or changed model, and for one that is promoted or retired and would become something else:
    that is for a rollback. Then nothing has changed.
    """
    policy = policy or Policy()
    model = registry.verify(evidence.candidate)
    if model.id != evidence.candidate:
        raise EvaluationError(f"the evidence is of {evidence.candidate!r}, expected the whole id {model.id}")
    verdict = judge(evidence, policy)
    if override_reason is not None and verdict.decision != "promote":
        verdict = override(verdict, override_reason)
    judgement = Judgement(verdict=verdict, evidence=evidence, policy=policy, adapter_sha256=model.adapter_sha256)
    return _carry_out(registry, ledger, model, judgement)


def promote(registry: LoraModelRegistry, ledger: Ledger, model_id: str, reason: str) -> Verdict:
    """Promote a model that was judged otherwise, for a reason that is kept with its verdict.

    Raises EvaluationError for a blank reason and a model that nobody has judged: there is nothing yet to put aside.
    """
    model = registry.verify(model_id)
    judgement = find_judgement(registry, model.id)
    if judgement is None:
        raise EvaluationError(f"{model.id} was never judged; evaluate it first: `loraloop evaluate {model.id}`")
    if judgement.verdict.decision != "promote":
        judgement = judgement.model_copy(update={"verdict": override(judgement.verdict, reason)})
    return _carry_out(registry, ledger, model, judgement)


def find_judgement(registry: LoraModelRegistry, model_id: str) -> Judgement | None:
    """The newest judgement of a model, None when it was never judged. Raises EvaluationError when its file is damaged."""
    kept = registry.find_verdict(model_id)
    if kept is None:
        return None
    try:
        return Judgement.model_validate_json(kept)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise EvaluationError(f"the verdict of {model_id} cannot be read ({where}: {first['msg']}); remove it and judge again") from error


def _carry_out(registry: LoraModelRegistry, ledger: Ledger, model: TrainedModel, judgement: Judgement) -> Verdict:
    verdict, state = judgement.verdict, STATES[judgement.verdict.decision]
    if model.state == ModelState.REJECTED and state == ModelState.PROMOTED and verdict.overridden is None:
        raise EvaluationError(
            f"{model.id} was rejected, and tries until one succeeds prove nothing; train again, or promote it with a reason"
        )
    if model.state != state and state not in list_next(registry.get_history(model.id)):
        registry.move(model.id, state, verdict.reason)  # raises, and says what it may become
    registry.save_verdict(model.id, judgement.model_dump(mode="json"))
    if model.state != state:
        registry.move(model.id, state, verdict.reason)
    data = verdict.model_dump(mode="json")
    digest = content_hash(judgement.model_dump(mode="json"))
    told = any(event.data.get("judgement") == digest for event in ledger.iter_events(kind=JUDGED, subject=model.id))
    if not told:
        event = {"judgement": digest, "state": str(state), "champion": judgement.evidence.champion, "verdict": data}
        ledger.add(Event(kind=JUDGED, subject=model.id, data=event))
    return verdict


def _list_trained(model: TrainedModel, store: EpisodeStore, folder: Path | None) -> set[tuple[str, str]] | None:
    """(task, first request) of all that one training was given; None when neither its episodes nor its dataset are there."""
    requests: dict[str, str | None] = dict.fromkeys(map(str, model.episode_ids))
    if folder is not None:
        for sample in open_dataset(folder).load_training():
            of = {str(one) for one in (sample.episode_id, sample.rejected_episode_id) if one is not None}
            requests.update(dict.fromkeys(of, _opening(sample.messages)))
    found = set()
    for known_id, request in requests.items():
        episode = store.find(known_id)
        if episode is None and request is None:
            return None
        if request is not None:
            found.add((f"episode {known_id}", request))
        if episode is not None:
            told = first_request(episode)
            names = {episode.task_id, episode.group_id, *(record.task_id for record in episode.records)} - {None}
            found |= {(str(name), told) for name in names or {f"episode {known_id}"}}
    return found


def _trace(name: str, text: str, parts: Shingles) -> TaskTrace:
    return TaskTrace(task_id=name, content=content_hash(" ".join(text.split())) if text.strip() else None, parts=parts)


def _opening(messages: Sequence[Message]) -> str:
    """The user's first turn that is no demonstration."""
    return next((message.content for message in messages if message.role == "user" and message.content and not message.is_demo), "")
