"""What is held out: whole clusters of tasks, for good, whatever else is built; over 1,000 random corpora."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from loraloop.dataset import Dataset, DatasetSettings, freeze
from loraloop.dataset.split import LEDGER_FILE, Clusters, TaskText, cluster_tasks, task_key
from loraloop.episode import (
    AnyRecord,
    Episode,
    EpisodeFilter,
    EpisodeId,
    EpisodeMetadata,
    Failure,
    LlmCallRecord,
    Message,
    Outcome,
    Success,
    Unknown,
)
from loraloop.errors import DatasetError, EmptyData
from loraloop.files import locked_directory
from loraloop.project import Project
from loraloop.testing import make_episode
from loraloop.training_data import Method, Refusal, TrainingData

WORDS = [f"{colour}{thing}" for colour in ("red", "green", "blue", "grey") for thing in ("boat", "house", "stone", "cloud", "table")]
LONG = (
    "please find the cheapest direct flight from the city of my user to the place that he named and book it for next friday in the morning"
)
CORPORA = 1000


def settings(**options: Any) -> DatasetSettings:
    return DatasetSettings(**{"unknown_license": "allow", "held_out_fraction": 0.4, "held_out_min_tasks": 2, **options})


def episode(number: int, request: str, answer: str | None = None, **changes: Any) -> Episode:
    said = (Message(role="user", content=request), Message(role="assistant", content=answer or f"answer {number}"))
    return make_episode(
        **{
            "id": EpisodeId.from_content(f"{number:032x}"),
            "task_id": f"task {number}",
            "outcome": Success(1.0),
            "messages": said,
            **changes,
        }
    )


class OneByOneLearn:
    """A learn model of single episodes, which are converted in the order in which they come."""

    name = "one_by_one"
    objective = "Answer."
    method: Method = "sft"

    def build_episodes(self, records: Iterable[AnyRecord], open_episodes: Sequence[Episode] = ()) -> list[Episode]:
        del records, open_episodes
        return []

    def evaluate(self, context: Sequence[AnyRecord]) -> Outcome:
        del context
        return Unknown()

    def convert(self, episode: Episode) -> TrainingData | Refusal:
        if not episode.outcome.is_success:
            return Refusal(reason="outcome_failure")
        return TrainingData(messages=episode.messages)


def build(episodes: list[Episode], directory: Path, **options: Any) -> Dataset:
    return freeze(episodes, OneByOneLearn(), directory, settings(**options))


def parts(dataset: Dataset) -> tuple[set[str], set[str]]:
    """The ids of the episodes (trained on, held out)."""
    return {str(one.episode_id) for one in dataset.load_training()}, {str(one.episode_id) for one in dataset.load_held_out()}


# --- an account of near-equality of the tests' own ---------------------------------------------------------------------------


def triples(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[at : at + 3]) for at in range(max(1, len(words) - 2))} if words else set()


def alike(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    return len(one & other) / len(one | other) if one | other else 0.0


def are_of_one_task(one: Episode, other: Episode) -> bool:
    if one.task_id == other.task_id or (one.group_id is not None and one.group_id == other.group_id):
        return True
    requests = [triples(each.messages[0].content or "") for each in (one, other)]
    whole = [triples("\n".join(f"{message.role} {message.content}" for message in each.messages)) for each in (one, other)]
    return alike(*requests) >= 0.7 or alike(*whole) >= 0.9


def random_corpus(draw: random.Random) -> list[Episode]:
    """Up to 14 episodes of up to 8 tasks: requests and answers are new, the same, or the same but for a word, a capital, a stop."""
    requests: list[str] = []
    answers: list[str] = []
    episodes = []
    for number in range(draw.randint(4, 14)):
        request, answer = (vary(draw, known) for known in (requests, answers))
        changes: dict[str, Any] = {"task_id": f"task {draw.randrange(8)}", "group_id": draw.choice([None, f"group {draw.randrange(6)}"])}
        if draw.random() < 0.2:
            changes["outcome"] = Failure("")
        episodes.append(episode(number + 1, request, answer, **changes))
    return episodes


def vary(draw: random.Random, known: list[str]) -> str:
    if not known or draw.random() < 0.6:
        text = " ".join(draw.choices(WORDS, k=draw.choice([2, 8, 30, 60])))
    else:
        words = draw.choice(known).split()
        if draw.random() < 0.7:
            words[draw.randrange(len(words))] = draw.choice(WORDS)
        text = " ".join(words).replace(" ", draw.choice([" ", "  ", ", "]))
        text = draw.choice([text, text.upper(), text + "."])
    known.append(text)
    return text


@pytest.fixture
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of datasets in seconds."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.usefixtures("without_waiting_for_the_disk")
@pytest.mark.parametrize("seeds", [range(150), pytest.param(range(150, CORPORA), marks=pytest.mark.slow)], ids=["some", "the rest"])
def test_no_held_out_task_nor_its_near_duplicate_is_trained_on_in_any_build(tmp_path: Path, seeds: range) -> None:
    n_held_out = n_mixed = 0
    for seed in seeds:
        draw = random.Random(seed)
        episodes = random_corpus(draw)
        ever_held_out: list[Episode] = []
        for share in (0.5, 1.0):  # some of the episodes, then all, held out by another share
            known = episodes[: int(share * len(episodes))]
            order = draw.sample(known, len(known))
            try:
                dataset = build(order, tmp_path / str(seed), held_out_fraction=draw.choice([0.0, 0.2, 0.5]))
            except EmptyData:
                continue
            trained, held_out = ([one for one in known if one.id in part] for part in parts(dataset))
            ever_held_out += held_out
            for one in trained:
                for other in ever_held_out:
                    assert not are_of_one_task(one, other), (seed, one, other)
            n_held_out += bool(held_out)
            n_mixed += bool(held_out and trained)
    assert n_held_out > 0.4 * len(seeds)
    assert n_mixed == n_held_out


@pytest.mark.usefixtures("without_waiting_for_the_disk")
@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, CORPORA), marks=pytest.mark.slow)], ids=["some", "the rest"])
def test_the_order_of_episodes_changes_no_byte(tmp_path: Path, seeds: range) -> None:
    for seed in seeds:
        draw = random.Random(seed)
        episodes = random_corpus(draw)
        found = []
        for number in range(2):
            with_error: object
            try:
                dataset = build(draw.sample(episodes, len(episodes)), tmp_path / f"{seed} {number}")
                with_error = {file.name: file.read_bytes() for file in dataset.path.iterdir()}, dataset.id
            except EmptyData as error:
                with_error = str(error)
            found.append(with_error)
        assert found[0] == found[1], seed


def test_hash_seeds_of_python_change_nothing(tmp_path: Path) -> None:
    code = f"""
import random, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_split import build, random_corpus
for seed in (1, 2, 3, 4, 5):
    print(build(random_corpus(random.Random(seed)), Path(sys.argv[1]) / str(seed)).id)
"""
    said = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1]
    assert len(said[0].split()) == 5


# --- for good ---------------------------------------------------------------------------------------------------------------


def many(n: int = 30) -> list[Episode]:
    return [episode(number, f"{' '.join(random.Random(number).choices(WORDS, k=12))} {number}") for number in range(1, n + 1)]


def test_what_was_held_out_stays_so_at_every_share(tmp_path: Path) -> None:
    _, first = parts(build(many(), tmp_path, held_out_fraction=0.6))
    trained, later = parts(build(many(), tmp_path, held_out_fraction=0.0))
    assert first
    assert later == first
    assert not trained & first


def test_a_new_near_duplicate_of_a_held_out_task_is_held_out(tmp_path: Path) -> None:
    _, held_out = parts(build(many(), tmp_path))
    old = next(one for one in many() if one.id in held_out)
    new = episode(900, (old.messages[0].content or "").upper() + "!")
    trained, later = parts(build([*many(), new], tmp_path, held_out_fraction=0.0))
    assert str(new.id) in later
    assert str(new.id) not in trained


def test_a_task_that_joins_a_held_out_one_over_a_third_is_held_out_with_it(tmp_path: Path) -> None:
    """That one was trained on before does not matter: what models are measured on comes first."""
    trained, held_out = parts(build(many(), tmp_path))
    apart = [next(one for one in many() if one.id in part) for part in (trained, held_out)]
    between = [episode(900 + number, one.messages[0].content or "", group_id="both") for number, one in enumerate(apart)]
    _, later = parts(build([*many(), *between], tmp_path))
    assert {str(one.id) for one in (*apart, *between)} <= later


def test_a_held_out_task_is_known_again_under_another_name(tmp_path: Path) -> None:
    _, held_out = parts(build(many(), tmp_path))
    renamed = [one.model_copy(update={"task_id": f"renamed {one.task_id}"}) for one in many()]
    trained, later = parts(build(renamed, tmp_path, held_out_fraction=0.0))
    assert later == held_out
    assert trained


def test_a_request_that_most_tasks_begin_with_makes_them_no_one_task(tmp_path: Path) -> None:
    episodes = [episode(number, "Begin!") for number in range(1, 41)]
    dataset = build(episodes, tmp_path, held_out_fraction=0.2)
    assert 2 <= dataset.manifest.held_out_tasks <= 16
    frame = "Answer with one command and nothing else. You may look at the shop's pages and buy one thing. The thing to buy is this: "
    framed = [episode(number, f"{frame * 3} {' '.join(random.Random(number).choices(WORDS, k=9))}") for number in range(1, 41)]
    assert build(framed, tmp_path / "framed").manifest.tasks == 40


def test_few_tasks_with_one_request_are_one_task(tmp_path: Path) -> None:
    episodes = [episode(number, LONG if number < 5 else LONG.replace("friday", "monday")) for number in range(1, 9)]
    manifest = build(episodes, tmp_path).manifest
    assert (manifest.tasks, manifest.held_out) == (1, 0)
    assert "nothing is held out of 1 task" in manifest.warnings[0]


def test_when_all_that_is_there_was_held_out_nothing_is_trained(tmp_path: Path) -> None:
    _, held_out = parts(build(many(), tmp_path))
    with pytest.raises(
        EmptyData, match=rf"all {len(held_out)} samples are of tasks that an earlier build held out; ingest episodes of other tasks"
    ):
        build([one for one in many() if one.id in held_out], tmp_path)


def test_a_filter_does_not_hide_a_held_out_near_duplicate(tmp_path: Path) -> None:
    """A third task, which the filter leaves out, is near-equal to both."""
    old, new, other = ([f"{name}{number}" for number in range(12)] for name in ("old", "new", "other"))
    common = [f"w{number}" for number in range(80)]
    chain = [" ".join([*first, *common, *last]) for first, last in ((old, old), (new, old), (new, other))]
    assert alike(triples(chain[0]), triples(chain[2])) < 0.7
    with Project(tmp_path) as project:
        for number, text in enumerate(chain):
            scenario = EpisodeMetadata(scenario="middle" if number == 1 else "ends", created_at=0)
            project.store.append(episode(500 + number, text, metadata=scenario))
        project.store.append_many([one.model_copy(update={"metadata": EpisodeMetadata(scenario="ends")}) for one in many(8)])
        manifest = project.build(episode_filter=EpisodeFilter(scenario="ends"), settings=settings()).manifest
    assert (manifest.episodes, manifest.tasks) == (10, 9)


def test_builds_at_the_same_moment_lose_nothing_of_the_ledger(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_split import build, many
number = int(sys.argv[1])
sys.stdin.readline()
for at in range(number, 60, 3):
    build(many(60)[at: at + 8], Path({str(tmp_path)!r}), held_out_fraction=0.5)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(number)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    held_out = set()
    for folder in tmp_path.glob("*/held_out.jsonl"):
        held_out |= {json.loads(line)["episode_id"] for line in folder.read_text().splitlines()}
    trained, later = parts(build(many(60), tmp_path, held_out_fraction=0.0))
    assert later == held_out
    assert not trained & held_out


def test_a_build_waits_for_the_ledger_and_reads_it_afterwards(tmp_path: Path) -> None:
    _, held_out = parts(build(many(), tmp_path / "elsewhere"))
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_split import build, many
episodes = many()
print("ready", flush=True)
build(episodes, Path({str(tmp_path)!r}) / "here", held_out_fraction=0.0)
"""
    with locked_directory(tmp_path / "here"):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(1)
        assert process.poll() is None
        (tmp_path / "here" / LEDGER_FILE).write_text((tmp_path / "elsewhere" / LEDGER_FILE).read_text())
    assert process.wait(timeout=60) == 0
    process.stdout.close()
    [folder] = (tmp_path / "here").glob("*/held_out.jsonl")
    assert {json.loads(line)["episode_id"] for line in folder.read_text().splitlines()} == held_out


def test_near_equal_conversations_of_two_tasks_are_on_one_side(tmp_path: Path) -> None:
    """Their requests are others and what they do at the end is another, so both stay, and would give each other away."""
    long = " ".join(random.Random(1).choices([f"w{number}" for number in range(500)], k=300))
    episodes = many(20)
    for number in range(20):
        said = (
            Message(role="user", content=f"{WORDS[number]} now"),
            Message(role="tool", content=long if number < 10 else f"{number} {long[::-1]}"),
        )
        end = Message(role="assistant", content=f"press {number}")
        episodes.append(episode(500 + number, "", messages=(*said, end)))
    for seed in range(5):
        renamed = [one.model_copy(update={"task_id": f"{seed} {one.task_id}"}) for one in episodes]
        trained, held_out = parts(build(renamed, tmp_path / str(seed), held_out_fraction=0.5))
        for first, last in ((500, 510), (510, 520)):
            alike_ids = {str(EpisodeId.from_content(f"{number:032x}")) for number in range(first, last)}
            assert alike_ids <= trained or alike_ids <= held_out


def test_the_ledger_holds_no_text_and_is_written_only_when_it_grows(tmp_path: Path) -> None:
    build(many(), tmp_path)
    ledger = tmp_path / LEDGER_FILE
    assert not any(word in ledger.read_text() for word in ("task", "river", "request"))
    before = ledger.stat().st_mtime_ns
    build(many(), tmp_path)
    assert ledger.stat().st_mtime_ns == before


@pytest.mark.parametrize("content", ["", "[]", '{"held_out": 3}', "{"])
def test_a_damaged_ledger_stops_the_build(tmp_path: Path, content: str) -> None:
    build(many(), tmp_path)
    (tmp_path / LEDGER_FILE).write_text(content)
    with pytest.raises(DatasetError, match=r"split\.json cannot be read .*restore it from a backup"):
        build(many(), tmp_path)


# --- clusters ---------------------------------------------------------------------------------------------------------------


def test_clusters_are_the_same_in_whatever_order_they_grow() -> None:
    pairs = [("d", "c"), ("a", "b"), ("c", "b"), ("x", "y")]
    for seed in range(20):
        clusters = Clusters()
        for one, other in random.Random(seed).sample(pairs, len(pairs)):
            clusters.join(one, other)
        assert {key: sorted(members) for key, members in clusters.members().items()} == {"a": ["a", "b", "c", "d"], "x": ["x", "y"]}


def test_the_request_of_an_episode_of_records_is_that_of_its_first_call() -> None:
    call = LlmCallRecord(messages=(Message(role="user", content="boil an egg"),), response=Message(role="assistant", content="done"))
    assert TaskText.of(make_episode(messages=(), records=(call,))).request == "boil an egg"
    assert TaskText.of(make_episode(messages=(), records=())).request == ""


def test_a_demonstration_is_not_the_request() -> None:
    demo = Message(role="user", content="an example", is_demo=True)
    asked = Message(role="user", content="the task")
    assert TaskText.of(make_episode(messages=(demo, asked, Message(role="assistant", content="done")))).request == "the task"


def test_tasks_of_one_number_in_two_scenarios_are_two() -> None:
    texts = [TaskText("airline/1", None, "book a flight to Rome"), TaskText("retail/1", None, "send back these shoes")]
    clusters = cluster_tasks(texts)
    assert clusters.find(task_key("airline/1")) != clusters.find(task_key("retail/1"))
