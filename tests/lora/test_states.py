"""The states of a model: what the table allows, and a history that only grows."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path

import pytest
from models_made import save_model

from loraloop.errors import LoraTrainerError
from loraloop.lora.registry import LoraModelRegistry
from loraloop.lora.states import HISTORY_FILE, MEANINGS, TRANSITIONS, ModelState, read_history

LEGAL = {
    "candidate": {"promoted", "held", "rejected"},
    "held": {"promoted", "rejected", "retired"},
    "promoted": {"retired"},
    "rejected": {"promoted", "retired"},
    "retired": {"promoted"},
}
"""Written out once more, so that a change of the table is a change of this too."""
WAY_TO = {"candidate": [], "held": ["held"], "promoted": ["promoted"], "rejected": ["rejected"], "retired": ["promoted", "retired"]}


def test_a_model_without_a_history_is_a_candidate(tmp_path: Path) -> None:
    model, registry = save_model(tmp_path), LoraModelRegistry(tmp_path)
    assert model.state is registry.get(model.id).state is ModelState.CANDIDATE
    assert registry.get_history(model.id) == ()
    assert not (model.adapter_path / HISTORY_FILE).exists()


@pytest.mark.parametrize(("before", "state"), list(itertools.product(LEGAL, LEGAL)))
def test_what_the_table_has_is_done_and_all_else_is_refused(tmp_path: Path, before: str, state: str) -> None:
    model, registry = save_model(tmp_path), LoraModelRegistry(tmp_path)
    for step in WAY_TO[before]:
        registry.move(model.id, step, "on the way")
    if state in LEGAL[before]:
        assert registry.move(model.id, state, "at last").state == state
        assert registry.get(model.id).state == registry.list_models()[0].state == state
        return
    with pytest.raises(LoraTrainerError, match=f"{model.id} is {before} and cannot become {state}; it may become") as caught:
        registry.move(model.id, state, "at last")
    assert set(re.findall(r"\w+", str(caught.value).partition("may become ")[2])) - {"or"} == LEGAL[before]
    assert registry.get(model.id).state == before
    assert len(registry.get_history(model.id)) == len(WAY_TO[before])


def test_the_table_has_each_change_once_and_every_state_a_meaning() -> None:
    assert len({(step.before, step.state) for step in TRANSITIONS}) == len(TRANSITIONS) == sum(map(len, LEGAL.values()))
    assert list(MEANINGS) == list(ModelState)


def test_a_rollback_is_only_to_what_has_been_promoted_before(tmp_path: Path) -> None:
    registry = LoraModelRegistry(tmp_path)
    for way in (["rejected", "retired"], ["held", "retired"]):
        model = save_model(tmp_path)
        for state in way:
            registry.move(model.id, state, "why")
        with pytest.raises(LoraTrainerError, match="is retired and cannot become promoted, as it has never been promoted; it stays that"):
            registry.move(model.id, "promoted", "rollback")
        assert registry.get(model.id).state is ModelState.RETIRED
    for _ in range(2):
        model = save_model(tmp_path)
        for state in ("held", "promoted", "retired", "promoted", "retired", "promoted"):
            assert registry.move(model.id, state, "why").state == state


def test_promoting_one_model_changes_no_other(tmp_path: Path) -> None:
    first, second = save_model(tmp_path), save_model(tmp_path)
    registry = LoraModelRegistry(tmp_path)
    for model in (first, second):
        registry.move(model.id, ModelState.PROMOTED, "better")
    assert [model.state for model in registry.list_models()] == ["promoted", "promoted"]


def test_a_name_that_is_no_state_and_a_blank_reason_are_refused(tmp_path: Path) -> None:
    model, registry = save_model(tmp_path), LoraModelRegistry(tmp_path)
    with pytest.raises(LoraTrainerError, match="'best' is no state of a model; expected candidate, promoted, held, rejected or retired"):
        registry.move(model.id, "best", "why")
    with pytest.raises(LoraTrainerError, match="becomes promoted for no reason; say why"):
        registry.move(model.id, "promoted", " \n")
    assert registry.get_history(model.id) == ()


def test_every_change_is_a_line_with_its_time_and_reason(tmp_path: Path) -> None:
    model, registry = save_model(tmp_path), LoraModelRegistry(tmp_path)
    record = (model.adapter_path / "trained_model.json").read_bytes()
    reasons = ["12 of 40 goals\nbefore 5", "half a sign \ud83d", "é"]
    before = b""
    for state, reason in zip(("promoted", "retired", "promoted"), reasons, strict=True):
        registry.move(model.id, state, reason)
        now = (model.adapter_path / HISTORY_FILE).read_bytes()
        assert now.startswith(before), "what was written stays as it was"
        before = now
    lines = [json.loads(line) for line in before.splitlines()]
    assert [list(line) for line in lines] == [["state", "from", "at", "reason"]] * 3
    assert [(line["from"], line["state"]) for line in lines] == [
        ("candidate", "promoted"),
        ("promoted", "retired"),
        ("retired", "promoted"),
    ]
    assert [line["reason"] for line in lines] == [reasons[0], "half a sign \\ud83d", "é"]
    assert model.id.timestamp_ms <= lines[0]["at"] <= lines[1]["at"] <= lines[2]["at"]
    assert [change.before for change in registry.get_history(model.id)] == ["candidate", "promoted", "retired"]
    assert (model.adapter_path / "trained_model.json").read_bytes() == record


def test_a_history_cut_anywhere_in_its_last_line_is_read_without_it_and_goes_on(tmp_path: Path) -> None:
    model, registry = save_model(tmp_path), LoraModelRegistry(tmp_path)
    path = model.adapter_path / HISTORY_FILE
    registry.move(model.id, "held", "unclear, é")
    first = path.read_bytes()
    registry.move(model.id, "rejected", "worse, é")
    whole = path.read_bytes()
    torn = [whole[:end] for end in range(len(first) + 1, len(whole))] + [first + b"\0" * 50, b"\0" * 7, whole[: len(first) // 2]]
    for left in torn:
        path.write_bytes(left)
        kept = first if left.startswith(first) else b""
        assert registry.get(model.id).state == ("held" if kept else "candidate")
        moved = registry.move(model.id, "promoted", "better")
        assert moved.state is ModelState.PROMOTED
        assert path.read_bytes().startswith(kept)
        assert [change.state for change in read_history(model.adapter_path)] == (["held"] if kept else []) + ["promoted"]
        assert b"\0" not in path.read_bytes()


@pytest.mark.parametrize("line", ["{", "[]", '{"state": "best", "from": "held", "at": 1, "reason": "r"}', '{"state": "held"}', "\udcff"])
def test_a_damaged_history_is_named(tmp_path: Path, line: str) -> None:
    model, registry = save_model(tmp_path), LoraModelRegistry(tmp_path)
    (model.adapter_path / HISTORY_FILE).write_bytes(os.fsencode(line) + b"\n")
    for use in (registry.get, registry.delete, lambda model_id: registry.move(model_id, "held", "why")):
        with pytest.raises(LoraTrainerError, match=f"the history of {model.id} cannot be read: .*{HISTORY_FILE}"):
            use(model.id)
