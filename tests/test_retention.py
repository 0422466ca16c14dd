"""What was asked to be forgotten is gone, and what something was made from is kept when the rest goes."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from models_made import save_model

from loraloop.dataset import DatasetSettings
from loraloop.episode import Episode, EpisodeMetadata, now_ms
from loraloop.errors import DatasetError
from loraloop.project import Project
from loraloop.testing import make_episode

DAY_MS = 86_400_000
POLICY = {"role": "system", "content": "Ask before you do anything. " * 50}


def talk(word: str, **changes: object) -> Episode:
    secret = f"The secret of the {word} is {word * 7}. " * 40
    messages = [POLICY, {"role": "user", "content": secret}, {"role": "assistant", "content": f"{word} is done."}]
    tags = {"license": "own"}
    return make_episode(messages=messages, task_id=word, **{"metadata": EpisodeMetadata(created_at=1, tags=tags), **changes})


@pytest.fixture
def project(tmp_path: Path) -> Project:
    with Project(tmp_path / "project") as opened:
        yield opened


def test_a_forgotten_episode_is_in_no_byte_of_the_store(project: Project) -> None:
    gone, kept = talk("egg"), talk("ham")
    project.store.append_many([gone, kept])
    report = project.forget([gone.id, "missing"])
    assert (report.forgotten, report.missing, report.made_from.models) == (1, ("missing",), ())
    assert project.store.get(kept.id) == kept
    project.store.close()
    path = project.directory / "episodes.db"
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM blobs").fetchone() == (2,), "the prompt, and the question of the one that is kept"
        assert connection.execute("SELECT count(*) FROM bodies").fetchone() == (1,)
    with Project(project.directory) as opened:
        assert not opened.store.append(gone)


def test_its_bytes_are_overwritten(tmp_path: Path) -> None:
    from loraloop.store.parts import COMPRESS_BYTES

    secret = "correct horse battery staple"
    assert len(secret) < COMPRESS_BYTES
    episode = make_episode(task_id=secret)
    with Project(tmp_path) as opened:
        opened.store.append_many([episode, make_episode()])
    assert secret.encode() in (tmp_path / "episodes.db").read_bytes()
    with Project(tmp_path) as opened:
        opened.forget([episode.id])
    assert secret.encode() not in (tmp_path / "episodes.db").read_bytes()


def test_what_was_made_from_it_is_named(project: Project) -> None:
    episodes = [talk(word) for word in ("egg", "ham", "rice", "soup", "tea")]
    project.store.append_many(episodes)
    dataset = project.build(settings=DatasetSettings(held_out_fraction=0.4))
    model = save_model(project.directory / "models", episode_ids=(episodes[0].id,))
    other = save_model(project.directory / "models", episode_ids=(episodes[1].id,))
    made_from = project.forget([episodes[0].id]).made_from
    assert (made_from.datasets, made_from.models) == ((dataset.id,), (str(model.id),))
    held_out = dataset.load_held_out()[0].episode_ids[0]
    assert project.forget([held_out]).made_from.datasets == (dataset.id,), "held-out samples are of it, too"
    assert str(other.id) not in made_from.models


def test_pruning_keeps_what_something_was_made_from(project: Project) -> None:
    now = now_ms()
    tags = {"license": "own"}
    old = [talk(word, metadata=EpisodeMetadata(created_at=now - 40 * DAY_MS, tags=tags)) for word in ("egg", "ham")]
    new = talk("rice", metadata=EpisodeMetadata(created_at=now - DAY_MS, tags=tags))
    project.store.append_many([*old, new])
    save_model(project.directory / "models", episode_ids=(old[0].id,))
    before = now - 30 * DAY_MS
    would = project.prune(before, dry_run=True)
    assert (would.older, would.removed, would.kept, project.store.count()) == (2, 1, 1, 3)
    did = project.prune(before)
    assert did == would.model_copy(update={"dry_run": False})
    assert {episode.id for episode in project.store.iter_episodes()} == {old[0].id, new.id}
    assert project.store.append(old[1]) is False, "what was pruned does not come back"
    assert project.store.append(old[1].model_copy(update={"id": make_episode().id})), "another one with its words is not kept out"
    assert project.prune(before, keep_used=False).removed == 2
    assert [episode.id for episode in project.store.iter_episodes()] == [new.id]


def test_nothing_is_removed_when_a_dataset_cannot_be_read(project: Project) -> None:
    episode = talk("egg")
    project.store.append_many([episode, *(talk(word) for word in ("ham", "rice"))])
    dataset = project.build(settings=DatasetSettings(held_out_fraction=0.4))
    (dataset.path / "train.jsonl").write_text("")
    for act in (lambda: project.forget([episode.id]), lambda: project.prune(now_ms())):
        with pytest.raises(DatasetError):
            act()
    assert project.store.count() == 3


def loraloop(*arguments: str, cwd: Path, code: int = 0, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loraloop", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, input=said, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_the_commands(tmp_path: Path) -> None:
    lines = [{"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": "done"}]} for word in ("egg", "ham")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ingest = ("ingest", "chats.jsonl", "--license", "own", "--json")
    loraloop(*ingest, cwd=tmp_path)
    first = json.loads(loraloop("episodes", "list", "--json", cwd=tmp_path).stdout.splitlines()[0])["id"]
    assert "Nothing is forgotten" in loraloop("forget", first, cwd=tmp_path, said="n\n", code=1).stderr
    assert "forgot 1 episodes" in loraloop("forget", first, cwd=tmp_path, said="y\n").stdout
    again = loraloop("ingest", "chats.jsonl", "--license", "MIT", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["refused"] == {"forgotten": 1}, "terms are no content: it is the same episode"
    assert "--readmit" in again.stderr
    report = json.loads(loraloop(*ingest, "--readmit", cwd=tmp_path).stdout)
    assert (report["stored"], report["duplicates"], report["refused"]) == (1, 1, {})
    assert "expected a number and h, d or w" in loraloop("prune", "--older-than", "soon", cwd=tmp_path, code=1).stderr
    dry = json.loads(loraloop("prune", "--older-than", "0h", "--dry-run", "--json", cwd=tmp_path).stdout)
    assert (dry["older"], dry["removed"], dry["dry_run"]) == (2, 2, True)
    assert "Nothing is removed" in loraloop("prune", "--older-than", "0h", cwd=tmp_path, code=1).stderr
    assert "removed 2" in loraloop("prune", "--older-than", "0h", "--yes", cwd=tmp_path).stdout
