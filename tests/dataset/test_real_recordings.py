"""Datasets of real recordings: exact counts, and every episode accounted for by every method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraloop.dataset import DatasetManifest, DatasetSettings
from loraloop.errors import EmptyData
from loraloop.learn.compose import compose
from loraloop.project import Project

Build = Callable[..., DatasetManifest]


@pytest.fixture(scope="module")
def build(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The manifest of what a method makes of a folder of recordings; a project of its own for each folder."""
    folders: dict[str, Path] = {}

    def make(recordings: str, method: str, **settings: Any) -> DatasetManifest:
        fresh = recordings not in folders
        folder = folders.setdefault(recordings, tmp_path_factory.mktemp("project"))
        with Project(folder) as project:
            if fresh:
                list(project.ingest([shared_data / recordings]))
            manifest = project.build(compose(method, settings=settings), settings=DatasetSettings(unknown_license="allow")).manifest
        assert manifest.episodes == manifest.episodes_used + manifest.episodes_held_out + manifest.episodes_refused
        assert manifest.episodes_refused == sum(manifest.refused.values())
        assert 0 < manifest.held_out_tasks < manifest.tasks / 3
        return manifest

    return make


@pytest.mark.parametrize(
    ("method", "counts", "refused"),
    [
        ("sft", (37, 0, 6), {"outcome_failure": 97}),
        ("weighted", (37, 0, 6), {"outcome_failure": 97}),
        ("dpo", (19, 19, 4), {"gap_too_small": 16, "no_partner": 78}),
        ("kto", (124, 0, 16), {}),
    ],
)
def test_tau_bench_by_every_method(build: Build, method: str, counts: tuple[int, int, int], refused: dict[str, int]) -> None:
    manifest = build("tau_bench", method)
    assert manifest.episodes == 140
    assert (manifest.samples, manifest.pairs, manifest.held_out) == counts
    assert manifest.refused == refused
    assert (manifest.secrets, manifest.personal_data) == ({}, {"e-mail address": 98})


def test_intercode_sql(build: Build) -> None:
    manifest = build("intercode/sql", "sft")
    assert (manifest.episodes, manifest.samples, manifest.held_out) == (2094, 1129, 285)
    assert manifest.refused == {"duplicate": 18, "near_duplicate": 31, "outcome_failure": 227, "outcome_timeout": 404}
    assert manifest.held_out_tasks / manifest.tasks == pytest.approx(0.2, abs=0.05)


def test_scores_of_wordle_above_the_scale_are_refused_until_it_is_declared(build: Build) -> None:
    assert build("verifiers", "weighted").refused["score_outside_scale"] == 11
    assert "score_outside_scale" not in build("verifiers", "weighted", score_range=(0.0, 2.0)).refused


def test_nothing_is_learned_from_recordings_without_an_outcome(build: Build) -> None:
    with pytest.raises(EmptyData) as failure:
        build("swe_agent", "sft")
    assert failure.value.refused == {"outcome_unknown": 22}


def test_failures_alone_are_empty_data_to_sft_and_undesirable_to_kto(build: Build) -> None:
    with pytest.raises(EmptyData) as failure:
        build("who_and_when", "sft")
    assert failure.value.refused == {"outcome_failure": 30}
    manifest = build("who_and_when", "kto")
    assert (manifest.samples + manifest.held_out, manifest.refused) == (30, {})
    assert "every sample to train on is undesirable" in manifest.warnings[0]
    assert [share.name for share in manifest.balance.kind] == ["kto undesirable"]
