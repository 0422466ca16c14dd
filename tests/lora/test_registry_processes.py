"""Several processes and one registry, and processes that are killed: nothing is lost, and nothing is half there."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from forked import SERVER as PROCESSES
from models_made import PEFT_ADAPTER, make_model, save_model
from registry_workers import delete_the_same, move_often, save_many, save_the_same, work_until_killed

from loraloop.lora.registry import MODEL_FILE, LoraModelRegistry
from loraloop.lora.states import TRANSITIONS, ModelState, StateChange

LEGAL = {(step.before, step.state) for step in TRANSITIONS}
ROUNDS = 40


def in_four(work: Callable[..., Any], directory: Path, *arguments: list[Any]) -> list[Any]:
    """What `work` gives in each of four processes that begin at one moment."""
    with ProcessPoolExecutor(4, mp_context=PROCESSES) as pool:
        list(pool.map(time.sleep, [0.3] * 4))  # all of them are there
        begin_at = time.time() + 0.2
        given = [pool.submit(work, directory, begin_at, *own) for own in zip(*arguments, strict=True)]
        return [one.result(timeout=60) for one in given]


def check_history(history: tuple[StateChange, ...]) -> None:
    """Every change is in the table and follows the one before it, and each rollback is to what had been promoted."""
    now = ModelState.CANDIDATE
    for number, change in enumerate(history):
        assert change.before == now
        assert (change.before, change.state) in LEGAL
        if change.before is ModelState.RETIRED:
            assert ModelState.PROMOTED in {earlier.state for earlier in history[:number]}
        now = change.state


def test_processes_that_record_at_once_lose_nothing(tmp_path: Path) -> None:
    recorded = [model_id for ids in in_four(save_many, tmp_path, [10] * 4) for model_id in ids]
    registry = LoraModelRegistry(tmp_path)
    assert len(set(recorded)) == 40
    assert [model.id for model in registry.list_models()] == sorted(recorded)
    for model_id in recorded:
        registry.verify(model_id)


def test_a_model_that_several_processes_record_at_once_is_recorded_by_one(tmp_path: Path) -> None:
    models = [make_model(tmp_path) for _ in range(20)]
    offered = [[model.model_copy(update={"sample_count": worker}) for model in models] for worker in range(4)]
    taken = in_four(save_the_same, tmp_path, offered)
    assert Counter(model_id for ids in taken for model_id in ids) == {model.id: 1 for model in models}
    for model in LoraModelRegistry(tmp_path).list_models():
        assert model.id in taken[model.sample_count], "what is recorded is of the process that was told so"


def test_a_model_that_several_processes_delete_at_once_is_deleted_by_one(tmp_path: Path) -> None:
    kept, *models = [save_model(tmp_path) for _ in range(21)]
    deleted = in_four(delete_the_same, tmp_path, [[model.id for model in models]] * 4)
    assert Counter(model_id for ids in deleted for model_id in ids) == {model.id: 1 for model in models}
    assert [entry.name for entry in tmp_path.iterdir()] == [kept.id]


def test_processes_that_move_one_model_at_once_make_a_legal_history(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    LoraModelRegistry(tmp_path).move(model.id, "promoted", "begin")  # from here on there is always another move, back and forth
    done = in_four(move_often, tmp_path, list(range(4)), [60] * 4)
    history = LoraModelRegistry(tmp_path).get_history(model.id)
    check_history(history)
    assert Counter(change.reason for change in history) == {"begin": 1} | {f"worker {worker}": count for worker, count in enumerate(done)}
    assert min(done) > 0, "each had its way"


def test_a_kill_at_any_instant_loses_nothing_that_was_acknowledged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, log, draw = tmp_path / "models", tmp_path / "log", random.Random(5)
    cut_off: Counter[str] = Counter()
    for number in range(ROUNDS):
        started = log.stat().st_size if log.exists() else 0
        process = PROCESSES.Process(target=work_until_killed, args=(directory, log), daemon=True)
        process.start()
        while not log.exists() or log.stat().st_size == started:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        process.join(timeout=10)
        told = log.read_text().splitlines()
        if told[-1].startswith("begin"):
            cut_off[told[-1].split()[1]] += 1
        check_all(LoraModelRegistry(directory), told, sweeps=number % 2 == 0)
    with capsys.disabled():
        print(f"\n{ROUNDS} kills, {cut_off.total()} within {dict(sorted(cut_off.items()))}: none lost, none half there")
    assert cut_off.total() > 0


def test_a_kill_within_a_deletion_leaves_no_half_model(tmp_path: Path) -> None:
    files = {**PEFT_ADAPTER, **{f"{number}.bin": "" for number in range(1500)}}  # so that removing them takes a while
    registry = LoraModelRegistry(tmp_path)
    for _ in range(3):
        model = save_model(tmp_path, files)
        whole = count_entries(model.adapter_path)
        process = PROCESSES.Process(target=delete_the_same, args=(tmp_path, 0.0, [model.id]), daemon=True)
        process.start()
        while process.is_alive() and count_entries(model.adapter_path) == whole:
            pass
        process.kill()
        process.join(timeout=10)
        assert count_entries(model.adapter_path) in (0, whole)
        registry.sweep()
        assert registry.list_models() == []
        assert list(tmp_path.iterdir()) == []


def count_entries(folder: Path) -> int:
    try:
        return sum(1 for _ in folder.iterdir())
    except FileNotFoundError:
        return 0


def check_all(registry: LoraModelRegistry, told: list[str], *, sweeps: bool) -> None:
    """What the log says was done is there; what it says was begun is there or not, as a whole."""
    begun: dict[str, set[str]] = {}
    ended: dict[str, set[str]] = {}
    for line in told:
        when, what, model_id = line.split()
        (begun if when == "begin" else ended).setdefault(model_id, set()).add(what)
    listed = {str(model.id): model for model in registry.list_models()}
    assert listed.keys() <= begun.keys()
    for model_id, what in begun.items():
        done = ended.get(model_id, set())
        if "save" in done and "delete" not in what:
            assert model_id in listed, "a model that was recorded is lost"
        if "delete" in done:
            assert model_id not in listed, "a model that was deleted is there again"
    for model_id in listed:
        registry.verify(model_id)
        history = registry.get_history(model_id)
        check_history(history)
        done = [state for state in ("promoted", "retired") if state in ended.get(model_id, set())]
        assert [change.state for change in history][: len(done)] == done, "a state that was acknowledged is lost"
    if sweeps:
        registry.sweep()
        assert [entry for entry in registry.directory.iterdir() if entry.name.endswith(".deleted")] == []
    folders = [folder for folder in registry.directory.glob("lora-*") if (folder / MODEL_FILE).exists()]
    assert {folder.name for folder in folders} == listed.keys()
