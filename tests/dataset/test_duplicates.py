"""Duplicates are left out before anything is held out, and what only looks like one is not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from loraloop.dataset import REFUSED_FILE, Dataset, DatasetSettings, freeze
from loraloop.dataset.duplicates import find_duplicates
from loraloop.dataset.similar import SimilarTexts, shingle, similarity, without_boilerplate
from loraloop.episode import Episode, EpisodeId, Failure, Message, Outcome, Success
from loraloop.learn.compose import compose
from loraloop.testing import make_episode
from loraloop.training_data import TrainingData

WORDS = [f"word{number}" for number in range(200)]


def text(n: int, seed: int = 0, changed: int = 0) -> str:
    """`n` words, the last `changed` of which are others."""
    words = random.Random(seed).choices(WORDS, k=n)
    return " ".join([*words[: n - changed], *(f"other{number}" for number in range(changed))])


def episode(number: int, request: str, answer: str, outcome: Outcome | None = None, **changes: Any) -> Episode:
    said = (
        Message(role="system", content="You are an agent. " + text(400, 9)),
        Message(role="user", content=request),
        Message(role="assistant", content=answer),
    )
    given = {
        "id": EpisodeId.from_content(f"{number:032x}"),
        "task_id": f"task {number}",
        "outcome": outcome or Success(1.0),
        "messages": said,
    }
    return make_episode(**{**given, **changes})


def build(episodes: list[Episode], directory: Path, method: str = "sft", **options: Any) -> Dataset:
    return freeze(
        episodes, compose(method), directory, DatasetSettings(**{"unknown_license": "allow", "held_out_fraction": 0.0, **options})
    )


def refusals(dataset: Dataset) -> dict[str, tuple[str, str]]:
    lines = (json.loads(line) for line in (dataset.path / REFUSED_FILE).read_text().splitlines())
    return {line["episode_id"]: (line["reason"], line["detail"]) for line in lines}


def test_the_same_said_twice_is_refused_once_and_names_the_one_that_is_kept(tmp_path: Path) -> None:
    episodes = [episode(number, "boil an egg", "done", task_id="egg") for number in (3, 1, 2)] + [episode(4, "boil two", "done")]
    dataset = build(episodes, tmp_path)
    kept = EpisodeId.from_content(f"{1:032x}")
    assert {one.episode_id for one in dataset.load_training()} == {kept, EpisodeId.from_content(f"{4:032x}")}
    assert refusals(dataset) == {str(EpisodeId.from_content(f"{number:032x}")): ("duplicate", f"the same as {kept}") for number in (2, 3)}
    assert (dataset.manifest.refused, dataset.manifest.samples_dropped) == ({"duplicate": 2}, {"duplicate": 2})


def test_other_tools_or_calls_make_it_no_duplicate(tmp_path: Path) -> None:
    plain = episode(1, "boil an egg", "done")
    tools = episode(2, "boil an egg", "done", tools=({"type": "function", "function": {"name": "boil"}},))
    call = {"id": "c", "type": "function", "function": {"name": "boil", "arguments": '{"eggs": 1}'}}
    calls = [
        episode(
            number, "", "", messages=(plain.messages[1], Message.model_validate({"role": "assistant", "content": None, "tool_calls": [c]}))
        )
        for number, c in ((3, call), (4, {**call, "function": {"name": "boil", "arguments": '{"eggs": 2}'}}))
    ]
    assert build([plain, tools, *calls], tmp_path).manifest.samples_dropped.get("duplicate", 0) == 0
    assert build([plain, *calls], tmp_path).manifest.samples == 3


def test_what_is_nearly_the_same_is_refused_and_the_better_score_is_kept(tmp_path: Path) -> None:
    long = text(300)
    episodes = [
        episode(1, long, text(100, 1), Success(0.5)),
        episode(2, long.upper() + "!", text(100, 1, changed=2), Success(0.9)),
        episode(3, text(300, changed=60), text(100, 1)),
    ]
    dataset = build(episodes, tmp_path)
    better = EpisodeId.from_content(f"{2:032x}")
    assert refusals(dataset) == {str(EpisodeId.from_content(f"{1:032x}")): ("near_duplicate", f"nearly the same as {better}")}
    assert build(episodes, tmp_path, near_duplicate=1.0).manifest.refused == {}
    assert build(episodes, tmp_path, near_duplicate=0.6).manifest.refused == {"near_duplicate": 2}


def test_a_long_request_with_another_answer_is_no_duplicate(tmp_path: Path) -> None:
    """Only the answer is trained: with the request alone nearly all of two conversations would be the same."""
    episodes = [episode(number, text(500), f"click on button {number}") for number in range(1, 4)]
    assert build(episodes, tmp_path).manifest.samples == 3


def test_a_long_common_system_prompt_makes_no_duplicates(tmp_path: Path) -> None:
    episodes = [episode(number, text(8, number), text(6, 50 + number)) for number in range(1, 6)]
    assert build(episodes, tmp_path).manifest.samples == 5


def test_a_success_and_a_failure_that_are_nearly_equal_both_stay(tmp_path: Path) -> None:
    episodes = [
        episode(1, text(300), text(200, 1), group_id="g", task_id="t"),
        episode(2, text(300), text(200, 1, changed=4), Failure(""), group_id="g", task_id="t"),
    ]
    assert build(episodes, tmp_path, "kto").manifest.samples == 2
    manifest = build(episodes, tmp_path, "dpo").manifest
    assert (manifest.pairs, manifest.episodes_used, manifest.refused) == (1, 2, {})


def test_of_two_pairs_that_are_the_same_both_episodes_of_one_are_refused(tmp_path: Path) -> None:
    episodes = [
        episode(
            10 * group + is_good,
            "boil an egg",
            "well" if is_good else "badly",
            Success(1.0) if is_good else Failure(""),
            group_id=str(group),
            task_id=str(group),
        )
        for group in (1, 2)
        for is_good in (0, 1)
    ]
    dataset = build(episodes, tmp_path, "dpo")
    manifest = dataset.manifest
    assert (manifest.pairs, manifest.samples, manifest.episodes_used) == (1, 1, 2)
    assert (manifest.refused, manifest.samples_dropped) == ({"duplicate": 2}, {"duplicate": 1})


def test_samples_of_one_episode_are_not_each_others_near_duplicates() -> None:
    turns = [Message(role="user" if number % 2 == 0 else "assistant", content=text(50, number)) for number in range(40)]
    samples = [
        TrainingData(messages=tuple(turns[: 2 * n]), episode_id=EpisodeId.parse("ep-1"), weight=1.0) for n in range(15, 20)
    ]  # one sample for each call
    assert not find_duplicates(samples, ["success"] * 5, ["task"] * 5, 0.9).dropped
    others = [sample.model_copy(update={"episode_id": EpisodeId.parse(f"ep-{number}")}) for number, sample in enumerate(samples)]
    assert find_duplicates(others, ["success"] * 5, ["task"] * 5, 0.9).dropped


# --- similarity ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 1.0])
def test_looking_up_the_rarest_finds_exactly_what_comparing_all_finds(threshold: float) -> None:
    for seed in range(150):
        draw = random.Random(seed)
        texts = [frozenset(draw.sample(range(14), draw.randint(0, 12))) for _ in range(14)]
        similar = SimilarTexts.of(texts, threshold)
        for number, one in enumerate(texts):
            expected = [other for other in range(number) if similarity(texts[other], one) >= threshold]
            assert similar.find(one) == expected
            assert similar.add(one) == number


def test_case_spaces_and_punctuation_are_no_difference() -> None:
    assert shingle("Boil  an EGG, now!") == shingle("boil an egg now")
    assert shingle("boil an egg") != shingle("boil an apple")
    assert shingle("boil") != shingle("fry")
    assert shingle("… !") == frozenset()


def test_what_half_of_twenty_tasks_have_in_common_is_no_likeness() -> None:
    frame = "answer with one command and nothing else please"
    texts = [shingle(f"{frame} {text(5, number)}") for number in range(20)]
    tasks = [f"task {number}" for number in range(20)]
    left = without_boilerplate(texts, tasks)
    assert not shingle(frame) & left[0]
    assert left[0]
    assert without_boilerplate(texts[:19], tasks[:19]) == texts[:19]
    assert without_boilerplate(texts, ["one task"] * 20) == texts, "attempts at one task are alike, and that is no frame"
