"""A dataset on disk: a folder of samples and refusals named by the hash of its content, and a manifest that accounts for all.

The manifest is written last; a folder without one is not a dataset. Nothing is ever overwritten.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from loraloop.episode import Frozen
from loraloop.errors import DatasetError
from loraloop.files import file_sha256, read_jsonl
from loraloop.training_data import Method, TrainingData

MANIFEST_FILE = "manifest.json"
TRAIN_FILE = "train.jsonl"
HELD_OUT_FILE = "held_out.jsonl"
REFUSED_FILE = "refused.jsonl"
FORMAT_VERSION = 2


class Share(Frozen):
    """The samples of one group, such as one source or one task."""

    name: str
    samples: int
    share: float
    """Of all samples to train on."""


class BalanceReport(Frozen):
    """Of what the samples to train on consist; of each division the largest groups, the largest first."""

    source: tuple[Share, ...] = ()
    task: tuple[Share, ...] = ()
    outcome: tuple[Share, ...] = ()
    kind: tuple[Share, ...] = ()


class DatasetManifest(Frozen):
    """What a dataset holds, and what became of every episode.

    `episodes` = `episodes_used` + `episodes_held_out` + `episodes_refused`, and `episodes_refused` is the sum of `refused`: each
    episode is in a sample to train on, in a held-out one, or refused once, for one reason. An episode may be in several samples
    (pairs with reuse, one sample a call), a pair is of two episodes; where each sample is of one episode and each episode in one,
    `samples` + `held_out` + the sum of `refused` = `episodes`. Samples that were made and left out again are in `samples_dropped`.
    """

    schema_version: int = FORMAT_VERSION
    id: str
    method: Method
    learn_model: str
    episodes: int
    """Episodes looked at."""
    episodes_used: int
    """Those in at least one sample to train on."""
    episodes_held_out: int
    """Those in held-out samples."""
    episodes_refused: int
    samples: int
    """Samples to train on."""
    pairs: int
    """Of the samples, those of kind dpo."""
    held_out: int
    """Samples of tasks kept from training."""
    held_out_pairs: int
    tasks: int
    """Distinct tasks in `samples` and `held_out`; near-equal ones count once."""
    held_out_tasks: int
    held_out_fraction: float
    refused: dict[str, int]
    """Episodes by the reason for which they are in no sample."""
    samples_dropped: dict[str, int] = Field(default_factory=dict)
    """Samples that were made and left out, by reason: duplicates, caps."""
    secrets: dict[str, int] = Field(default_factory=dict)
    """Episodes looked at in which secrets were found, by kind; an episode may have several kinds."""
    personal_data: dict[str, int] = Field(default_factory=dict)
    """Episodes looked at in which personal data was found, by kind."""
    licenses: dict[str, int] = Field(default_factory=dict)
    """Episodes in samples by their `license` tag, "unknown" for those without."""
    balance: BalanceReport = Field(default_factory=BalanceReport)
    settings: dict[str, str | int | float | None] = Field(default_factory=dict)
    """What it was built with, by the names of DatasetSettings."""
    warnings: tuple[str, ...] = ()
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


def open_dataset(path: Path) -> Dataset:
    """The dataset in `path`, its files checked against the manifest. Raises DatasetError."""
    try:
        text = (path / MANIFEST_FILE).read_bytes()
        manifest = DatasetManifest.model_validate(_read_manifest(path, text))
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


def _read_manifest(path: Path, text: bytes) -> Any:
    """The manifest's object; one of format 1, which had one sample an episode, with what format 2 says in addition."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DatasetError(
            f"the manifest of {path} cannot be read (not JSON: {error}); remove that folder and build the dataset again"
        ) from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise DatasetError(
            f"{path} has format version {version}, and this loraloop knows versions up to {FORMAT_VERSION}; upgrade loraloop"
        )
    if version != 1:
        return values
    samples, held_out, refused = (values.get(name) for name in ("samples", "held_out", "refused"))
    n_refused = sum(refused.values()) if isinstance(refused, dict) else None
    told = {"episodes_used": samples, "episodes_held_out": held_out, "episodes_refused": n_refused, "pairs": 0, "held_out_pairs": 0}
    return {**values, **told}
