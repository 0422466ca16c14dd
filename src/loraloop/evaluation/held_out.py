"""What an evaluation measures of a dataset: its held-out samples, and the failed attempts at the same tasks from the store."""

from __future__ import annotations

from collections.abc import Iterator

from loraloop.dataset import Dataset
from loraloop.episode import Episode, EpisodeFilter
from loraloop.evaluate.likelihood import HeldOutSample
from loraloop.files import content_hash
from loraloop.learn.transcript import conversation_of
from loraloop.plugins import EpisodeStore
from loraloop.training_data import Refusal, TrainingData

N_SAMPLES = 40
"""Of each ending, where nothing is said."""


def list_held_out(dataset: Dataset, store: EpisodeStore, n_samples: int = N_SAMPLES) -> list[HeldOutSample]:
    """At most `n_samples` of each ending, chosen by hash: held-out successes, failures of the same tasks, and pairs.

    A dataset for sft holds no failures; they come from the store, from episodes of tasks that are held out. Of pairs, the better sides
    are successes and the worse ones failures, too. Keys are unique.
    """
    found = [*_of_dataset(dataset), *_failures(dataset, store)]
    chosen: list[HeldOutSample] = []
    for ending in ("success", "failure", "pair"):
        by_content = {content_hash(one.sample.to_line()): one for one in found if one.ending == ending}
        chosen += [by_content[key] for key in sorted(by_content)[:n_samples]]
    keys: dict[str, int] = {}
    unique = []
    for one in chosen:
        number = keys[one.key] = keys.get(one.key, 0) + 1
        unique.append(HeldOutSample(one.key if number == 1 else f"{one.key}#{number}", one.ending, one.sample))
    return unique


def _of_dataset(dataset: Dataset) -> Iterator[HeldOutSample]:
    for sample in dataset.load_held_out():
        key = str(sample.episode_id or content_hash(sample.to_line(), 16))
        if sample.kind == "dpo":
            yield HeldOutSample(f"{key} over {sample.rejected_episode_id or 'the other'}", "pair", sample)
            better, worse = sample.sides
            yield HeldOutSample(key, "success", better)
            yield HeldOutSample(str(sample.rejected_episode_id or f"{key}, the other"), "failure", worse)
        else:
            is_good = sample.desirable if sample.desirable is not None else sample.weight > 0
            plain = sample.model_copy(update={"kind": "sft", "desirable": None, "weight": 1.0})
            yield HeldOutSample(key, "success" if is_good else "failure", plain)


def _failures(dataset: Dataset, store: EpisodeStore) -> Iterator[HeldOutSample]:
    """Failed episodes of the tasks that are held out."""
    if dataset.manifest.method != "sft":
        return
    ids = [sample.episode_id for sample in dataset.load_held_out() if sample.episode_id is not None]
    tasks = {task for episode in map(store.find, ids) if episode is not None for task in [_task(episode)] if task}
    for episode in store.iter_episodes(EpisodeFilter(outcome="failure")):
        transcripts = conversation_of(episode) if _task(episode) in tasks and not episode.is_open else ()
        if isinstance(transcripts, Refusal):
            continue
        for transcript in transcripts:
            if any(message.is_agent for message in transcript.messages):
                sample = TrainingData(messages=transcript.messages, tools=transcript.tools, episode_id=episode.id)
                yield HeldOutSample(str(episode.id), "failure", sample)


def _task(episode: Episode) -> str | None:
    return episode.group_id or episode.task_id
