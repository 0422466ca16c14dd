"""Datasets: frozen, named by their content, divided by task, and accounting for every episode."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from loraloop.dataset import (
    HELD_OUT_FILE,
    MANIFEST_FILE,
    REFUSED_FILE,
    TRAIN_FILE,
    Dataset,
    DatasetSettings,
    freeze,
    list_datasets,
    open_dataset,
)
from loraloop.dataset.split import LEDGER_FILE
from loraloop.episode import Episode, EpisodeId, EpisodeMetadata, Failure, Message, Outcome, Success, Timeout, Unknown
from loraloop.errors import DatasetError, EmptyData
from loraloop.files import file_sha256
from loraloop.learn.conversation import ConversationLearn
from loraloop.testing import make_episode

FILES = [TRAIN_FILE, HELD_OUT_FILE, REFUSED_FILE]


def episode(number: int, task: int | str | None = None, outcome: Outcome | None = None, **changes: Any) -> Episode:
    """An episode whose words no other has."""
    made = Success(1.0) if outcome is None else outcome
    task_id = f"task {number if task is None else task}"
    said = (Message(role="user", content=f"question {task_id}"), Message(role="assistant", content=f"answer {number}"))
    return make_episode(
        **{"id": EpisodeId.from_content(f"{number:032x}"), "task_id": task_id, "outcome": made, "messages": said, **changes}
    )


def mixed(n: int = 60, n_tasks: int = 20, seed: int = 0) -> list[Episode]:
    """Attempts at some tasks with all outcomes."""
    draw = random.Random(seed)
    outcomes: list[Outcome] = [Success(1.0), Success(0.5), Failure("wrong"), Timeout(0.3), Unknown()]
    return [episode(number, draw.randrange(n_tasks), draw.choice(outcomes)) for number in range(n)]


def frozen(episodes: Iterable[Episode], directory: Path, **options: Any) -> Dataset:
    return freeze(episodes, ConversationLearn(), directory, DatasetSettings(unknown_license="allow", **options))


def ids(path: Path) -> list[str]:
    return [json.loads(line)["episode_id"] for line in path.read_text().splitlines()]


def tasks_by_part(dataset: Dataset, episodes: list[Episode]) -> tuple[set[str | None], set[str | None]]:
    """(tasks trained on, tasks held out), told from the files."""
    task = {one.id: one.task_id for one in episodes}
    return {task[EpisodeId(one)] for one in ids(dataset.path / TRAIN_FILE)}, {
        task[EpisodeId(one)] for one in ids(dataset.path / HELD_OUT_FILE)
    }


# --- what it holds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_every_episode_is_counted_once_and_is_in_the_file_that_counts_it(tmp_path: Path, seed: int) -> None:
    episodes = mixed(seed=seed)
    dataset = frozen(episodes, tmp_path)
    manifest = dataset.manifest
    found = [ids(dataset.path / name) for name in FILES]
    assert sorted(one for part in found for one in part) == sorted(episode.id for episode in episodes)
    assert [len(part) for part in found] == [manifest.samples, manifest.held_out, sum(manifest.refused.values())]
    assert manifest.samples + manifest.held_out + sum(manifest.refused.values()) == manifest.episodes == len(episodes)
    assert (manifest.episodes_used, manifest.episodes_held_out) == (manifest.samples, manifest.held_out)
    assert manifest.episodes_refused == sum(manifest.refused.values())
    assert manifest.refused == {
        "outcome_failure": sum(one.outcome.is_failure for one in episodes),
        "outcome_timeout": sum(one.outcome.is_timeout for one in episodes),
        "outcome_unknown": sum(one.outcome.is_unknown for one in episodes),
    }
    assert manifest.held_out > 0
    trained, held_out = tasks_by_part(dataset, episodes)
    assert not trained & held_out, "no task is on both sides"
    assert (manifest.tasks, manifest.held_out_tasks) == (len(trained | held_out), len(held_out))
    assert (manifest.method, manifest.learn_model, manifest.held_out_fraction) == ("sft", "conversation", 0.2)
    assert manifest.sha256 == {name: file_sha256(dataset.path / name) for name in FILES}


def test_folder_is_named_by_the_content_and_has_four_files(tmp_path: Path) -> None:
    dataset = frozen(mixed(), tmp_path / "new" / "datasets")
    assert dataset.path == tmp_path / "new" / "datasets" / dataset.id
    assert sorted(file.name for file in dataset.path.iterdir()) == sorted([*FILES, MANIFEST_FILE])
    assert len(dataset.id) == 24
    assert set(dataset.id) <= set("0123456789abcdef")
    assert open_dataset(dataset.path) == dataset


def test_samples_are_read_back_as_they_were_converted(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{ "b":1, "a": 2 }'}}
    tool = {"type": "function", "function": {"parameters": {"b": 1, "a": 2}, "name": "find"}}
    messages = (
        Message(role="user", content="cut \ud83d off"),
        Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call, call]}),
        Message(role="tool", content="", tool_call_id="c1"),
        Message(role="assistant", content="done", weight=0.5),
    )
    original = episode(1, messages=messages, tools=(tool,), metadata=EpisodeMetadata(tags={"weight": "0.25"}))
    (read,) = frozen([original], tmp_path).load_training()
    assert read.messages == messages
    assert (read.weight, read.episode_id) == (0.25, original.id)
    assert json.dumps(read.tools) == json.dumps([tool]), "a template renders a schema in the order of its keys"


# --- the same content is the same dataset -----------------------------------------------------------------------------------


def test_order_of_episodes_does_not_matter(tmp_path: Path) -> None:
    episodes = mixed()
    first = frozen(episodes, tmp_path / "a")
    second = frozen(iter(random.Random(1).sample(episodes, len(episodes))), tmp_path / "b")
    assert first.manifest == second.manifest
    assert [file_sha256(first.path / name) for name in FILES] == [file_sha256(second.path / name) for name in FILES]


def test_time_of_recording_and_of_freezing_do_not_matter(tmp_path: Path) -> None:
    def at(ms: int) -> list[Episode]:
        return [one.model_copy(update={"metadata": EpisodeMetadata(created_at=ms)}) for one in mixed()]

    assert frozen(at(1), tmp_path / "a").id == frozen(at(2), tmp_path / "b").id


def test_the_same_content_is_not_written_again(tmp_path: Path) -> None:
    first = frozen(mixed(), tmp_path)
    files = {file: (file.stat().st_ino, file.read_bytes()) for file in first.path.iterdir()}
    assert frozen(mixed(), tmp_path) == first
    assert {file: (file.stat().st_ino, file.read_bytes()) for file in first.path.iterdir()} == files
    assert list_datasets(tmp_path) == [first]


@pytest.mark.parametrize(
    "change",
    [
        lambda episodes: episodes[:-1],
        lambda episodes: [*episodes, episode(999)],
        lambda episodes: [*episodes[:-1], episodes[-1].model_copy(update={"outcome": Failure("changed my mind")})],
        lambda episodes: [*episodes[:-1], episodes[-1].model_copy(update={"messages": (Message(role="assistant", content="other"),)})],
        lambda episodes: [*episodes[:-1], episodes[-1].model_copy(update={"tools": ({"b": 1, "a": 2},)})],
    ],
    ids=["one less", "one more", "another outcome", "other words", "other tools"],
)
def test_other_content_is_another_dataset(tmp_path: Path, change: Any) -> None:
    episodes = [episode(number) for number in range(6)]
    frozen(episodes, tmp_path)
    frozen(change(episodes), tmp_path)
    assert len(list_datasets(tmp_path)) == 2


def test_order_of_keys_in_a_tool_schema_is_content(tmp_path: Path) -> None:
    one = frozen([episode(1, tools=({"a": 1, "b": 2},))], tmp_path)
    assert frozen([episode(1, tools=({"b": 2, "a": 1},))], tmp_path).id != one.id


def test_processes_that_freeze_the_same_at_the_same_moment_all_get_it(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_freeze import frozen, mixed
episodes = mixed()
sys.stdin.readline()
for number in range(20):
    print(frozen(episodes[number:], Path({str(tmp_path)!r})).id)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert len({out for out, _ in said}) == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([LEDGER_FILE, *said[0][0].split()])


# --- what is held out -------------------------------------------------------------------------------------------------------


def test_a_held_out_task_stays_held_out_when_episodes_are_added(tmp_path: Path) -> None:
    few = [episode(number) for number in range(40)]
    more = [*few, *(episode(number, number % 50) for number in range(40, 120))]
    trained, held_out = tasks_by_part(frozen(few, tmp_path), few)
    trained_later, held_out_later = tasks_by_part(frozen(more, tmp_path), more)
    assert held_out
    assert held_out < held_out_later
    assert trained < trained_later
    assert 2 <= len(held_out) <= 16, "about a fifth of 40"


def test_a_greater_share_holds_out_more_and_keeps_what_was_held_out(tmp_path: Path) -> None:
    episodes = [episode(number) for number in range(40)]
    parts = [tasks_by_part(frozen(episodes, tmp_path / str(share), held_out_fraction=share), episodes)[1] for share in (0, 0.1, 0.3, 0.6)]
    assert parts[0] == set()
    assert parts[1] < parts[2] < parts[3]


def test_nothing_is_held_out_of_few_tasks(tmp_path: Path) -> None:
    episodes = [episode(number, number % 4) for number in range(40)]
    manifest = frozen(episodes, tmp_path, held_out_fraction=0.9).manifest
    assert (manifest.samples, manifest.held_out, manifest.tasks, manifest.held_out_tasks) == (40, 0, 4, 0)
    assert frozen(episodes, tmp_path, held_out_fraction=0.5, held_out_min_tasks=4).manifest.held_out > 0


def test_something_is_always_left_to_train_on(tmp_path: Path) -> None:
    manifest = frozen([episode(number) for number in range(6)], tmp_path, held_out_fraction=0.999999).manifest
    assert (manifest.samples, manifest.held_out) == (6, 0)


# --- nothing to freeze, and damage ------------------------------------------------------------------------------------------


def test_nothing_usable_is_empty_data_with_the_counts_and_writes_nothing(tmp_path: Path) -> None:
    episodes = [episode(1, outcome=Failure("")), episode(2, outcome=Failure("")), episode(3, outcome=Unknown())]
    with pytest.raises(EmptyData) as failure:
        frozen(episodes, tmp_path / "datasets")
    assert failure.value.refused == {"outcome_failure": 2, "outcome_unknown": 1}
    assert "none of 3 episodes gives a sample for 'conversation'" in str(failure.value)
    with pytest.raises(EmptyData, match="No episodes found to build from; ingest some first, or widen the filter"):
        frozen([], tmp_path / "datasets")
    assert not (tmp_path / "datasets").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["changed", "longer", "missing"])
def test_a_file_that_was_tampered_with_is_named(tmp_path: Path, name: str, damage: str) -> None:
    dataset = frozen(mixed(), tmp_path)
    file = dataset.path / name
    content = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(content[:-2] + b" \n" if damage == "changed" else content + b"\n")
    for look in (lambda: open_dataset(dataset.path), lambda: list_datasets(tmp_path), lambda: frozen(mixed(), tmp_path)):
        with pytest.raises(
            DatasetError, match=rf"{dataset.id}/{name} is not the file that the manifest describes; remove .*{dataset.id} and"
        ):
            look()


def test_a_folder_without_a_manifest_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"is not a dataset: it has no manifest\.json; make one with `loraloop build`"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(DatasetError, match=r"is not a dataset: it has no manifest\.json; remove that folder and `loraloop build`"):
        open_dataset(tmp_path)
    dataset = frozen(mixed(), tmp_path)
    (dataset.path / MANIFEST_FILE).unlink()
    assert list_datasets(tmp_path) == []
    with pytest.raises(DatasetError, match="is not a dataset"):
        frozen(mixed(), tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": "x"}', '{"schema_version": "new"}'])
def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    dataset = frozen(mixed(), tmp_path)
    (dataset.path / MANIFEST_FILE).write_text(content)
    with pytest.raises(
        DatasetError, match=rf"^the manifest of .*{dataset.id} cannot be read \(.+\); remove that folder and build the dataset again$"
    ):
        open_dataset(dataset.path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("where a folder belongs")
    with pytest.raises(DatasetError, match=r"file cannot be written \(File exists\)"):
        frozen(mixed(), tmp_path / "file")
    with pytest.raises(DatasetError, match=r"datasets cannot be written \(Not a directory\)"):
        frozen(mixed(), tmp_path / "file" / "datasets")


def test_what_a_killed_process_left_aside_is_not_listed(tmp_path: Path) -> None:
    dataset = frozen(mixed(), tmp_path)
    shutil.copytree(dataset.path, tmp_path / f".{dataset.id}.abcdefgh")
    assert list_datasets(tmp_path) == [dataset]


def test_a_directory_that_is_not_there_has_no_datasets(tmp_path: Path) -> None:
    assert list_datasets(tmp_path / "missing") == []
