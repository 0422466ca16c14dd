"""A dataset: what is left of many episodes once terms, secrets, duplicates, held-out tasks and caps have had their say; frozen.

`freeze` is the file to read; `manifest` is what a dataset is on disk.
"""

from loraloop.dataset.freeze import freeze
from loraloop.dataset.manifest import (
    HELD_OUT_FILE,
    MANIFEST_FILE,
    REFUSED_FILE,
    TRAIN_FILE,
    Dataset,
    DatasetManifest,
    list_datasets,
    list_folders,
    open_dataset,
)
from loraloop.dataset.settings import DatasetSettings

__all__ = [
    "HELD_OUT_FILE",
    "MANIFEST_FILE",
    "REFUSED_FILE",
    "TRAIN_FILE",
    "Dataset",
    "DatasetManifest",
    "DatasetSettings",
    "freeze",
    "list_datasets",
    "list_folders",
    "open_dataset",
]
