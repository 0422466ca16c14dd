"""Caps, the balance report, the terms, and the accounts of group learn models."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from loraloop.dataset import HELD_OUT_FILE, MANIFEST_FILE, REFUSED_FILE, TRAIN_FILE, Dataset, DatasetSettings, freeze, open_dataset
from loraloop.episode import AnyRecord, Episode, EpisodeId, EpisodeMetadata, Failure, Message, Outcome, Success, Timeout, Unknown
from loraloop.errors import DatasetError, EmptyData, SettingsError
from loraloop.files import write_json
from loraloop.learn.compose import compose
from loraloop.learn.conversation import ConversationLearn
from loraloop.plugins import LearnModel
from loraloop.testing import make_episode
from loraloop.training_data import Method, Refusal, TrainingData


def episode(number: int, task: int = 0, outcome: Outcome | None = None, scenario: str = "kitchen", **tags: str) -> Episode:
    said = (Message(role="user", content=f"cook dish {task}"), Message(role="assistant", content=f"cooked {number}"))
    return make_episode(
        id=EpisodeId.from_content(f"{number:032x}"),
        task_id=f"dish {task}",
        group_id=f"dish {task}",
        outcome=outcome or Success(1.0),
        messages=said,
        metadata=EpisodeMetadata(scenario=scenario, tags=tags),
    )


def build(episodes: list[Episode], directory: Path, learn_model: LearnModel | None = None, **options: Any) -> Dataset:
    settings = DatasetSettings(**{"unknown_license": "allow", "held_out_fraction": 0.0, **options})
    return freeze(episodes, learn_model or ConversationLearn(), directory, settings)


# --- caps -------------------------------------------------------------------------------------------------------------------


def test_of_one_task_the_best_are_kept_and_the_rest_refused(tmp_path: Path) -> None:
    episodes = [episode(number, number % 2, Success(number / 10)) for number in range(1, 9)]
    dataset = build(episodes, tmp_path, max_per_task=2)
    assert [one.episode_id for one in dataset.load_training()] == [EpisodeId.from_content(f"{number:032x}") for number in (5, 6, 7, 8)]
    assert dataset.manifest.refused == {"cap_task": 4}
    assert dataset.manifest.episodes == dataset.manifest.samples + sum(dataset.manifest.refused.values())


def test_of_one_source_so_many_are_kept_drawn_by_hash(tmp_path: Path) -> None:
    episodes = [episode(number, number, scenario="big" if number < 30 else "small") for number in range(40)]
    dataset = build(episodes, tmp_path, max_per_source=12)
    assert dataset.manifest.refused == {"cap_source": 18}
    assert {share.name: share.samples for share in dataset.manifest.balance.source} == {"big": 12, "small": 10}
    kept = [one.episode_id for one in dataset.load_training()]
    assert kept != [one.id for one in episodes[:12]] + [one.id for one in episodes[30:]], "not those of the least ids"
    shuffled = build(random.Random(0).sample(episodes, 40), tmp_path / "again", max_per_source=12)
    assert [one.episode_id for one in shuffled.load_training()] == kept


def test_caps_leave_the_held_out_side_whole(tmp_path: Path) -> None:
    episodes = [episode(number, number % 20) for number in range(100)]
    dataset = build(episodes, tmp_path, held_out_fraction=0.3, max_per_task=1)
    manifest = dataset.manifest
    assert manifest.held_out == 5 * manifest.held_out_tasks > 0
    assert manifest.samples == 20 - manifest.held_out_tasks


# --- balance ----------------------------------------------------------------------------------------------------------------


def test_balance_tells_shares_by_source_task_outcome_and_kind(tmp_path: Path) -> None:
    episodes = [episode(1), episode(2), episode(3, 1, Failure("")), episode(4, 2, source="web")]
    manifest = build(episodes, tmp_path, compose("kto")).manifest
    told = {name: [(share.name, share.samples, share.share) for share in shares] for name, shares in manifest.balance}
    assert told == {
        "source": [("kitchen", 3, 0.75), ("web", 1, 0.25)],
        "task": [("kitchen/dish 0", 2, 0.5), ("kitchen/dish 1", 1, 0.25), ("kitchen/dish 2", 1, 0.25)],
        "outcome": [("success", 3, 0.75), ("failure", 1, 0.25)],
        "kind": [("kto desirable", 3, 0.75), ("kto undesirable", 1, 0.25)],
    }


def test_undesirable_samples_alone_are_a_dataset_with_a_warning(tmp_path: Path) -> None:
    manifest = build([episode(number, number, Failure("")) for number in range(4)], tmp_path, compose("kto")).manifest
    assert manifest.samples == 4
    assert any("every sample to train on is undesirable, none desirable" in warning for warning in manifest.warnings)


def test_scores_outside_the_scale_make_the_others_doubtful(tmp_path: Path) -> None:
    episodes = [episode(number, number, Success(score)) for number, score in enumerate((0.5, 1.0, 1.2))]
    manifest = build(episodes, tmp_path).manifest
    assert manifest.refused == {"score_outside_scale": 1}
    assert any("1 episodes are refused for a score outside the scale" in warning for warning in manifest.warnings)
    declared = build(episodes, tmp_path, compose("sft", None, {"score_range": (0, 2)})).manifest
    assert not any("outside the scale" in warning for warning in declared.warnings)


# --- accounts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "weighted", "dpo", "kto"])
def test_every_episode_is_used_held_out_or_refused_once_by_every_method(tmp_path: Path, method: str) -> None:
    outcomes: list[Outcome] = [Success(1.0), Success(0.5), Failure("wrong"), Timeout(0.3), Unknown()]
    for seed in range(10):
        draw = random.Random(seed)
        episodes = [episode(number, draw.randrange(12), draw.choice(outcomes)) for number in range(80)]
        episodes += [one.model_copy(update={"id": EpisodeId.from_content(f"{900 + n:032x}")}) for n, one in enumerate(episodes[:9])]
        options = {"held_out_fraction": 0.3, "max_per_task": 3}
        manifest, folder = (dataset := build(episodes, tmp_path / str(seed), compose(method), **options)).manifest, dataset.path
        used, held_out = (ids_of(folder / name) for name in (TRAIN_FILE, HELD_OUT_FILE))
        refused = [json.loads(line)["episode_id"] for line in (folder / REFUSED_FILE).read_text().splitlines()]
        assert len(refused) == len(set(refused)) == sum(manifest.refused.values()) == manifest.episodes_refused
        assert (len(used), len(held_out)) == (manifest.episodes_used, manifest.episodes_held_out)
        assert not used & held_out
        assert not (used | held_out) & set(refused)
        assert used | held_out | set(refused) == {str(one.id) for one in episodes}
        assert manifest.episodes == len(episodes) == manifest.episodes_used + manifest.episodes_held_out + manifest.episodes_refused
        assert manifest.pairs == (manifest.samples if method == "dpo" else 0)
        assert manifest.method == method
        if method != "dpo":
            assert manifest.samples + manifest.held_out + manifest.episodes_refused == manifest.episodes


def ids_of(path: Path) -> set[str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line[name] for line in lines for name in ("episode_id", "rejected_episode_id") if name in line}


class BrokenLearn:
    """Converts groups, and keeps its promise or not."""

    name = "broken"
    objective = "Break."
    method: Method = "sft"

    def __init__(self, give: str) -> None:
        self.give = give

    def build_episodes(self, records: Iterable[AnyRecord], open_episodes: Sequence[Episode] = ()) -> list[Episode]:
        del records, open_episodes
        return []

    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        del context
        return Unknown()

    def convert(self, episode: Episode) -> TrainingData | Refusal:
        return TrainingData(messages=episode.messages, episode_id=episode.id)

    def group_key(self, episode: Episode) -> str:
        del episode
        return "one"

    def convert_group(self, episodes: Sequence[Episode]) -> list[TrainingData | Refusal]:
        first = self.convert(episodes[0])
        samples = [self.convert(one) for one in episodes]
        return {
            "lost": [first],
            "both": [*samples, Refusal(episode_id=episodes[0].id, reason="no_partner")],
            "strange": [*samples, Refusal(episode_id=EpisodeId.parse("ep-other"), reason="no_partner")],
            "nameless": [*samples, TrainingData(messages=episodes[0].messages)],
        }[self.give]


@pytest.mark.parametrize(
    ("give", "says"),
    [
        ("lost", "'broken' lost 2 episodes, ep-0000000000000-0{31}1 first; each must be in a sample or refused"),
        ("both", "'broken' refused ep-0000000000000-0{32}, and has it in a sample too"),
        ("strange", "'broken' gave the refusal no_partner of ep-other, which is of no episode that it was given"),
        ("nameless", "'broken' gave a sample of no episode"),
    ],
)
def test_a_learn_model_that_loses_an_episode_is_named(tmp_path: Path, give: str, says: str) -> None:
    with pytest.raises(DatasetError, match=says):
        build([episode(number, number) for number in range(3)], tmp_path, BrokenLearn(give))
    assert not list(tmp_path.iterdir())


# --- terms ------------------------------------------------------------------------------------------------------------------


def test_an_unknown_licence_is_refused_unless_a_setting_allows_it(tmp_path: Path) -> None:
    episodes = [episode(1, 1, license="MIT"), episode(2, 2), episode(3, 3, license=" unknown "), episode(4, 4, license="NOASSERTION")]
    manifest = build(episodes, tmp_path, unknown_license="refuse").manifest
    assert (manifest.samples, manifest.refused, manifest.licenses) == (1, {"license_unknown": 3}, {"MIT": 1})
    manifest = build(episodes, tmp_path).manifest
    assert (manifest.samples, manifest.refused, manifest.licenses) == (4, {}, {"MIT": 1, "unknown": 3})
    assert DatasetSettings().unknown_license == "refuse"


def test_without_any_known_licence_the_error_names_both_ways_out(tmp_path: Path) -> None:
    with pytest.raises(EmptyData, match=r"`--unknown-license allow`, and `loraloop ingest --license NAME`") as failure:
        build([episode(1)], tmp_path, unknown_license="refuse")
    assert failure.value.refused == {"license_unknown": 1}


# --- settings and formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"held_out_fraction": 1.0}, "held_out_fraction=1.0: expected 0 <= share < 1"),
        ({"held_out_fraction": float("nan")}, "held_out_fraction=nan: expected"),
        ({"near_duplicate": 0.2}, "near_duplicate=0.2: expected 0.5 <= similarity <= 1"),
        ({"max_per_task": 0}, "max_per_task=0: expected a whole number >= 1"),
        ({"max_per_source": True}, "max_per_source=True: expected a whole number >= 1"),
        ({"held_out_min_tasks": None}, "held_out_min_tasks=None: expected a whole number >= 1"),
        ({"secrets": "show"}, "secrets='show': expected quarantine or allow"),
        ({"personal_data": "allow"}, "personal_data='allow': expected quarantine or report or off"),
        ({"unknown_license": "ask"}, "unknown_license='ask': expected refuse or allow"),
    ],
)
def test_a_setting_outside_its_range_is_named(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        DatasetSettings(**setting)


def test_a_dataset_of_the_first_format_opens(tmp_path: Path) -> None:
    dataset = build([episode(1, 1), episode(2, 2, Unknown())], tmp_path)
    new = {
        "episodes_used",
        "episodes_held_out",
        "episodes_refused",
        "pairs",
        "held_out_pairs",
        "samples_dropped",
        "secrets",
        "personal_data",
    }
    new |= {"licenses", "balance", "settings", "warnings"}
    old = {**dataset.manifest.model_dump(mode="json", exclude=new), "schema_version": 1}
    write_json(dataset.path / MANIFEST_FILE, old)
    manifest = open_dataset(dataset.path).manifest
    assert (manifest.samples, manifest.episodes_used, manifest.episodes_refused, manifest.pairs) == (1, 1, 1, 0)


def test_a_dataset_of_a_later_format_says_so(tmp_path: Path) -> None:
    dataset = build([episode(1)], tmp_path)
    write_json(dataset.path / MANIFEST_FILE, {"schema_version": 3})
    with pytest.raises(DatasetError, match="has format version 3, and this loraloop knows versions up to 2; upgrade loraloop"):
        open_dataset(dataset.path)


def test_progress_is_told_by_step(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    settings = DatasetSettings(unknown_license="allow")
    episodes = [episode(number, number) for number in range(250)]
    freeze(episodes, ConversationLearn(), tmp_path, settings, on_progress=lambda step, n_episodes: told.append((step, n_episodes)))
    assert [count for step, count in told if step == "scanned"] == [100, 200, 250]
    assert ("converted", 250) in told
