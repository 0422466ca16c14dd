"""Files are whole or absent, directories appear in one step, and nothing is overwritten."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from loraloop.files import (
    append_jsonl,
    canonical_json,
    content_hash,
    file_sha256,
    json_line,
    new_directory,
    read_jsonl,
    write_atomic,
    write_json,
    write_jsonl,
)

CUT_EMOJI = "cut \ud83d off"


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# --- JSON and hashes --------------------------------------------------------------------------------------------------------


def test_canonical_json_is_the_same_for_any_order_of_keys() -> None:
    assert canonical_json({"b": [1, None], "a": "é"}) == canonical_json({"a": "é", "b": [1, None]}) == '{"a":"é","b":[1,null]}'


def test_content_hash_depends_on_the_value_alone() -> None:
    assert content_hash({"b": 1, "a": 2}) == content_hash({"a": 2, "b": 1})
    assert content_hash({"a": 2}) != content_hash({"a": "2"})
    assert len(content_hash("x", 24)) == 24
    assert content_hash("x") == hashlib.blake2b(b'"x"', digest_size=16).hexdigest()
    assert content_hash(CUT_EMOJI) != content_hash("cut  off")


def test_not_a_number_is_never_written() -> None:
    for write in (canonical_json, json_line, content_hash):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write({"loss": float("nan")})


def test_json_line_keeps_the_order_of_keys_and_all_characters() -> None:
    assert json_line({"b": 1, "a": "é\n\u2028"}) == '{"b":1,"a":"é\\n\u2028"}'


def test_file_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) * 2 + 17)
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# --- write_atomic -----------------------------------------------------------------------------------------------------------


def test_write_atomic_replaces_the_content_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_atomic(path, "old\n")
    write_atomic(path, "new é\n")
    assert path.read_bytes() == "new é\n".encode()
    assert names_in(path.parent) == ["file.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_failed_write_leaves_the_old_content_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, "old\n")
    with pytest.raises(TypeError):
        write_atomic(path, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("inf")})
    assert path.read_text() == "old\n"
    assert names_in(tmp_path) == ["file.txt"]


def test_a_full_disk_leaves_the_old_content_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, "old\n")
    code = f"""
import resource, signal
from pathlib import Path
from loraloop.files import write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_atomic(Path({str(path)!r}), "x" * 1001)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "File too large" in ended.stderr
    assert path.read_text() == "old\n"
    assert names_in(tmp_path) == ["file.txt"]


def test_a_lone_surrogate_is_written_and_read_back_the_same(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"content": CUT_EMOJI}])
    assert (tmp_path / "rows.jsonl").read_bytes() == b'{"content":"cut \\ud83d off"}\n'
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == [{"content": CUT_EMOJI}]
    write_json(tmp_path / "one.json", CUT_EMOJI)
    assert json.loads((tmp_path / "one.json").read_bytes()) == CUT_EMOJI


# --- JSON Lines -------------------------------------------------------------------------------------------------------------


def test_rows_are_read_back_as_written(tmp_path: Path) -> None:
    rows = [{"b": 1, "a": "line\nbreak \u2028 \x85"}, [1.5, None], "text", {}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == rows
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == len(rows)


def test_no_rows_make_an_empty_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [])
    assert (tmp_path / "rows.jsonl").read_bytes() == b""
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == []


@pytest.mark.parametrize(
    "content",
    [
        b'{"a":1}\n{"a":2}',
        b'{"a":1}\n{"a":2}\n',
        b'\n{"a":1}\n  \n\n{"a":2}\n',
        b'{"a":1}\r\n{"a":2}\r\n',
        b'\xef\xbb\xbf{"a":1}\n{"a":2}\n',
    ],
    ids=["last line without newline", "plain", "blank lines", "Windows line ends", "byte order mark"],
)
def test_lines_are_read_however_they_were_saved(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    "line",
    [b'{"a":', b"not json", b'"\xff\xfe"', b"[" * 100_000, b"9" * 5_000],
    ids=["torn", "no json", "no UTF-8", "deep", "huge number"],
)
def test_an_unreadable_line_is_named_by_file_and_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a":1}\n\n' + line + b'\n{"a":2}\n')
    rows = read_jsonl(path)
    assert next(rows) == {"a": 1}
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: not JSON"):
        next(rows)


# --- new_directory ----------------------------------------------------------------------------------------------------------


def test_directory_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "made"
    with new_directory(path) as folder:
        assert not path.exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("content")
        (folder / "link").symlink_to("nowhere")
    assert names_in(path.parent) == ["made"]
    assert (path / "sub" / "file").read_text() == "content"
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_directory_of_a_block_that_fails_never_appears(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_directory(tmp_path / "made") as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("content", [None, "kept"], ids=["empty", "with a file"])
def test_directory_that_is_there_already_is_refused_before_the_block(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "made"
    path.mkdir()
    if content:
        (path / "file").write_text(content)
    with pytest.raises(FileExistsError, match="exists already"), new_directory(path):
        pytest.fail("the block must not run")
    assert names_in(tmp_path) == ["made"]
    assert [file.read_text() for file in path.iterdir()] == ([content] if content else [])


@pytest.mark.parametrize("kind", ["empty directory", "directory", "file", "dangling link"])
def test_what_appeared_during_the_block_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "made"

    def overtaken() -> None:
        with new_directory(path) as folder:
            (folder / "file").write_text("mine")
            if kind == "file":
                path.write_text("theirs")
            elif kind == "dangling link":
                path.symlink_to("nowhere")
            else:
                path.mkdir()
            if kind == "directory":
                (path / "file").write_text("theirs")

    with pytest.raises(FileExistsError, match="exists already"):
        overtaken()
    assert names_in(tmp_path) == ["made"]
    if path.is_symlink():
        assert str(path.readlink()) == "nowhere"
    else:
        found = [path.read_text()] if path.is_file() else [file.read_text() for file in path.iterdir()]
        assert found == ([] if kind == "empty directory" else ["theirs"])


def test_directory_does_not_appear_when_the_process_is_killed_within_the_block(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from loraloop.files import new_directory
with new_directory(Path({str(tmp_path / "made")!r})) as folder:
    (folder / "file").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert ended.returncode == -9
    assert not (tmp_path / "made").exists()
    assert all(name.startswith(".made.") for name in names_in(tmp_path))
    with new_directory(tmp_path / "made") as folder:  # what was left aside is in nobody's way
        (folder / "file").write_text("whole")
    assert (tmp_path / "made" / "file").read_text() == "whole"


def test_of_many_processes_that_make_one_directory_exactly_one_wins(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from loraloop.files import new_directory
with new_directory(Path({str(tmp_path / "made")!r})) as folder:
    for n in range(20):
        (folder / f"file{{n}}").write_text(str(os.getpid()))
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(4)]
    complaints = [process.communicate(timeout=60)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 1, 1, 1]
    assert all("FileExistsError" in complaint for complaint, code in zip(complaints, codes, strict=True) if code)
    winner = processes[codes.index(0)].pid
    assert {file.read_text() for file in (tmp_path / "made").iterdir()} == {str(winner)}
    assert names_in(tmp_path) == ["made"]


# --- a file that grows by lines ---------------------------------------------------------------------------------------------


def test_lines_are_appended_one_below_another(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    values = [{"b": 1, "a": "é\n"}, {"a": CUT_EMOJI}, []]
    for value in values:
        append_jsonl(path, value)
    assert list(read_jsonl(path)) == values
    assert path.read_bytes().startswith(b'{"b":1,"a":"\xc3\xa9\\n"}\n')
    assert stat.S_IMODE(path.stat().st_mode) & 0o444


def test_a_last_line_without_its_newline_is_skipped_when_told_so_and_cut_off_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":2}')
    assert list(read_jsonl(path)) == [{"a": 1}, {"a": 2}]
    assert list(read_jsonl(path, skip_torn=True)) == [{"a": 1}]
    append_jsonl(path, {"a": 3})
    assert path.read_bytes() == b'{"a":1}\n{"a":3}\n'


def test_a_line_that_does_not_fit_on_the_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the first part of the line is taken, the rest refused."""
    path = tmp_path / "lines.jsonl"
    append_jsonl(path, "before")
    code = f"""
import resource, signal
from pathlib import Path
from loraloop.files import append_jsonl
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
append_jsonl(Path({str(path)!r}), "x" * 100)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "File too large" in done.stderr
    assert path.read_bytes() == b'"before"\n'
