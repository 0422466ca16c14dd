"""Aliases on the disk: what is read after a crash, and what a damaged file costs."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from loraloop.errors import ServingError
from loraloop.serve.aliases import AliasFile, AliasTable, CanaryShare, Served, make_move
from loraloop.serve.applier import Version


def make_version(digits: str, alias: str = "agent") -> Version:
    return Version.of_adapter(alias, adapter_sha256=digits * 64, adapter_path=Path("adapters") / digits, model_id=None, base_sha256=None)


def move_to(file: AliasFile, *versions: Version) -> AliasTable:
    table = file.read()
    for version in versions:
        before = table.aliases.get("agent", Served())
        after = before.moved_to(version)
        table = table.with_alias("agent", after)
        file.write(table)
        assert file.tell(make_move("agent", "apply", before, after, "better")) is None
    return table


def test_nothing_is_served_where_nothing_was_and_reading_makes_no_file(tmp_path: Path) -> None:
    assert AliasFile(tmp_path / "serving").read() == AliasTable()
    assert not (tmp_path / "serving").exists()


def test_what_was_written_is_read_with_the_versions_to_roll_back_to(tmp_path: Path) -> None:
    file = AliasFile(tmp_path)
    a, b, c = map(make_version, "abc")
    table = move_to(file, a, b, a, c)
    assert file.read() == table
    assert table.aliases["agent"].version == c
    assert table.aliases["agent"].previous == (a, b), "the last first, each once"
    assert [(move.before, move.after) for move in file.read_history()] == [
        (None, a.name),
        (a.name, b.name),
        (b.name, a.name),
        (a.name, c.name),
    ]
    assert file.read_history()[0].who


def test_a_canary_and_a_wish_are_kept(tmp_path: Path) -> None:
    file = AliasFile(tmp_path)
    served = Served(version=make_version("a"), canary=CanaryShare(version=make_version("b"), share=0.1), wanted=make_version("c"))
    file.write(AliasTable(aliases={"agent": served}))
    assert file.read().aliases["agent"] == served


@pytest.mark.parametrize("damage", ["", '{"aliases": {"agent": ', "null", '{"aliases": {"agent": {"version": {"name": "../x"}}}}', None])
def test_a_torn_or_missing_file_is_made_up_for_from_the_history_and_told(tmp_path: Path, damage: str | None) -> None:
    file = AliasFile(tmp_path)
    table = move_to(file, make_version("a"), make_version("b"))
    file.path.unlink()
    if damage is not None:
        file.path.write_text(damage)
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    found = file.read()
    assert found.aliases == table.aliases
    assert found.problem
    assert "history.jsonl" in found.problem
    assert ("is missing;" in found.problem) == (damage is None)
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir()) == before, "reading never writes"
    file.write(found)
    assert file.read() == AliasTable(aliases=table.aliases)
    if damage is not None:
        assert (tmp_path / "aliases.json.damaged").read_text() == damage


def test_when_the_history_is_gone_too_it_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    file = AliasFile(tmp_path)
    file.path.write_text("{")
    with pytest.raises(ServingError, match=r"cannot be read .*history.jsonl is not there; put it back from a copy"):
        file.read()
    file.history_path.write_text('{"no": 1}\n')
    with pytest.raises(ServingError, match=r"history\.jsonl"):
        file.read()


def test_a_line_of_the_history_that_was_never_finished_is_none(tmp_path: Path) -> None:
    file = AliasFile(tmp_path)
    move_to(file, make_version("a"))
    with file.history_path.open("a") as history:
        history.write('{"at": 1')
    assert len(file.read_history()) == 1


def test_a_full_disk_leaves_the_alias_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = AliasFile(tmp_path)
    table = move_to(file, make_version("a"))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        file.write(table.with_alias("agent", table.aliases["agent"].moved_to(make_version("b"))))
    told = file.tell(make_move("agent", "apply", Served(), Served(), "why"))
    assert told
    assert "No space" in told
    monkeypatch.undo()
    assert file.read() == table
    assert len(file.read_history()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aliases.json", "history.jsonl"]
    json.loads(file.path.read_text())
