"""A training file becomes samples, or an error that names what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraloop.train.data import read_samples


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


GOOD = {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_a_line_with_only_conversations_is_a_sample(tmp_path: Path) -> None:
    (read,) = read_samples(write_lines(tmp_path / "data.jsonl", GOOD))
    assert [(message.role, message.content) for message in read.messages] == [("user", "a"), ("assistant", "b")]
    assert (read.kind, read.weight, read.tools, read.episode_id) == ("sft", 1.0, (), None)


def test_a_line_that_is_not_json_is_named_by_its_number(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", GOOD, "", '{"conversations": [')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3: not JSON"):
        read_samples(path)


@pytest.mark.parametrize(
    "line",
    [
        [],
        {},
        {"conversations": []},
        {"conversations": "text"},
        {"conversations": [{"role": "robot", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
        {**GOOD, "kind": "ppo"},
        {**GOOD, "weight": -1},
        {**GOOD, "weight": "heavy"},
        {**GOOD, "tools": 5},
        {**GOOD, "rejected": 5},
        {**GOOD, "episode_id": "../x"},
    ],
    ids=lambda line: json.dumps(line)[:60],
)
def test_a_line_that_is_no_sample_is_named_by_its_number(tmp_path: Path, line: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.jsonl, sample 2: "):
        read_samples(write_lines(tmp_path / "data.jsonl", GOOD, line))
