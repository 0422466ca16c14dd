"""A dataset: a frozen folder of samples, divided by task, with a manifest that accounts for every episode.

The folder's name is the hash of its content, so the same episodes give the same folder and nothing is overwritten. The manifest is
written last; a folder without one is not a dataset.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from loraloop.episode import Episode, Frozen
from loraloop.errors import DatasetError, EmptyData
from loraloop.files import content_hash, file_sha256, json_line, new_directory, read_jsonl, write_json, write_jsonl
from loraloop.plugins import LearnModel
from loraloop.training_data import Method, Refusal, TrainingData, split_by_task

MANIFEST_FILE = "manifest.json"
TRAIN_FILE = "train.jsonl"
HELD_OUT_FILE = "held_out.jsonl"
REFUSED_FILE = "refused.jsonl"


class DatasetManifest(Frozen):
    """What a dataset holds. Every episode is counted once: in training, held out, or refused."""

    schema_version: int = 1
    id: str
    method: Method
    learn_model: str
    episodes: int
    """Episodes looked at."""
    samples: int
    """Samples to train on."""
    held_out: int
    """Samples of tasks kept from training."""
    tasks: int
    held_out_tasks: int
    held_out_fraction: float
    refused: dict[str, int]
    sha256: dict[str, str]
    """Of each file in the folder."""


class Dataset(Frozen):
    """A frozen dataset on disk."""

    path: Path
    manifest: DatasetManifest

    @property
    def id(self) -> str:
        """The hash of its content, also its folder's name."""
        return self.manifest.id

    def load_training(self) -> list[TrainingData]:
        """The samples to train on."""
        return [TrainingData.from_line(line) for line in read_jsonl(self.path / TRAIN_FILE)]

    def load_held_out(self) -> list[TrainingData]:
        """The samples to measure on."""
        return [TrainingData.from_line(line) for line in read_jsonl(self.path / HELD_OUT_FILE)]


def freeze(
    episodes: Iterable[Episode], learn_model: LearnModel, directory: Path, *, held_out_fraction: float = 0.2, min_tasks: int = 5
) -> Dataset:
    """Convert `episodes` and freeze them under `directory`; the same content gives the dataset that is there already, as the newest.

    Samples are ordered by episode id, so the order of `episodes` does not matter. Raises EmptyData when nothing is left to train on,
    DatasetError when the folder is damaged or cannot be written.
    """
    samples, refusals = _convert(episodes, learn_model)
    n_episodes = len(samples) + len(refusals)
    counts = dict(sorted(Counter(refusal.reason for refusal in refusals).items()))
    if not n_episodes:
        raise EmptyData("No episodes found to build from; ingest some first, or widen the filter")
    if not samples:
        raise EmptyData(f"none of {n_episodes} episodes gives a sample for {learn_model.name!r}", counts)
    training, held_out = split_by_task(samples, held_out_fraction, min_tasks)
    lines = [[sample.to_line() for sample in part] for part in (training, held_out)]
    refused = [refusal.model_dump(mode="json") for refusal in refusals]
    dataset_id = content_hash([learn_model.name, [[json_line(line) for line in part] for part in (*lines, refused)]], 24)
    path = directory / dataset_id
    if (path / MANIFEST_FILE).exists():
        dataset = open_dataset(path)
        with contextlib.suppress(OSError):  # of a project that can only be read
            os.utime(path / MANIFEST_FILE)
        return dataset
    with _as_dataset_error(path), contextlib.suppress(FileExistsError), new_directory(path) as folder:  # another process may be faster
        for name, rows in ((TRAIN_FILE, lines[0]), (HELD_OUT_FILE, lines[1]), (REFUSED_FILE, refused)):
            write_jsonl(folder / name, rows)
        manifest = DatasetManifest(
            id=dataset_id,
            method=learn_model.method,
            learn_model=learn_model.name,
            episodes=n_episodes,
            samples=len(training),
            held_out=len(held_out),
            tasks=_count_tasks(samples),
            held_out_tasks=_count_tasks(held_out),
            held_out_fraction=held_out_fraction,
            refused=counts,
            sha256={name: file_sha256(folder / name) for name in (TRAIN_FILE, HELD_OUT_FILE, REFUSED_FILE)},
        )
        write_json(folder / MANIFEST_FILE, manifest.model_dump(mode="json"))
    return open_dataset(path)


def open_dataset(path: Path) -> Dataset:
    """The dataset in `path`, its files checked against the manifest. Raises DatasetError."""
    try:
        manifest = DatasetManifest.model_validate_json((path / MANIFEST_FILE).read_bytes())
    except FileNotFoundError as error:
        advice = "remove that folder and" if path.exists() else "make one with"
        raise DatasetError(f"{path} is not a dataset: it has no {MANIFEST_FILE}; {advice} `loraloop build`") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}); see what is there, and who may read it") from error
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"
        raise DatasetError(f"the manifest of {path} cannot be read ({found}); remove that folder and build the dataset again") from error
    for name, expected in manifest.sha256.items():
        if not (path / name).is_file() or file_sha256(path / name) != expected:
            raise DatasetError(f"{path / name} is not the file that the manifest describes; remove {path} and build the dataset again")
    return Dataset(path=path, manifest=manifest)


def list_folders(directory: Path) -> list[Path]:
    """The folders of the datasets under `directory`, unopened, the one that was built last at the end."""
    found = (file for file in directory.glob(f"*/{MANIFEST_FILE}") if not file.parent.name.startswith("."))  # those a kill left aside
    return [file.parent for file in sorted(found, key=lambda file: (file.stat().st_mtime_ns, file.parent.name))]


def list_datasets(directory: Path) -> list[Dataset]:
    """The datasets under `directory`, the one that was built last at the end. Raises DatasetError when one is damaged."""
    return [open_dataset(folder) for folder in list_folders(directory)]


@contextlib.contextmanager
def _as_dataset_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be written ({error.strerror}); make room there, or make the project's folder writable"
        ) from error


def _convert(episodes: Iterable[Episode], learn_model: LearnModel) -> tuple[list[TrainingData], list[Refusal]]:
    """The sample or refusal of each episode, ordered by episode id."""
    samples: list[TrainingData] = []
    refusals: list[Refusal] = []
    for episode in episodes:
        converted = learn_model.convert(episode)
        if isinstance(converted, Refusal):
            refusals.append(converted)
        else:
            samples.append(converted)
    samples.sort(key=lambda sample: str(sample.episode_id))
    refusals.sort(key=lambda refusal: str(refusal.episode_id))
    return samples, refusals


def _count_tasks(samples: Sequence[TrainingData]) -> int:
    return len({sample.split_key or str(sample.episode_id) for sample in samples})
