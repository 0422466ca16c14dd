"""What a line is does not depend on the lines before it, and what they share is made once."""

from __future__ import annotations

import json
import tracemalloc
from functools import partial

import pytest

from loraloop.chat.openai_messages import take_messages
from loraloop.chat.refused_entry import EntryRefused
from loraloop.episode import Episode
from loraloop.importers.json_input import parse_json
from loraloop.importers.openai_chat import OpenAIChatImporter
from loraloop.importers.plain_messages import find_plain
from loraloop.importers.remembered import MAX_REMEMBERED, Remembered
from loraloop.importers.repeated import MAX_IN_VAIN, MAX_KEPT, Repeated
from loraloop.testing.mutations import mutate

TOOLS = [{"type": "function", "function": {"name": f"f{n}", "description": 'says "tools" ' + "long " * 60}} for n in range(2)]
MEMBER = '"tools": ' + json.dumps(TOOLS)
LINES = {
    "first": '{"a": 1, %s}',
    "last of two": '{"tools": [1], %s}',
    "first of two": '{%s, "tools": [1]}',
    "both": "{%s, %s}",
    "inside another": '{"a": {%s}}',
    "inside and outside": '{"a": {%s}, "tools": []}',
    "in a list": "[{%s}]",
    "name that ends so": '{"a\\%s}',
    "inside text": '{"a": "%s"}',
    "cut off": '{"a": 1, %s',
    "more behind it": "{%s, x}",
    "value goes on": "{%s [1]}",
    "with NUL": '{"a": "\\u0000", %s}',
    "a mark of its own": '{"tools": "\\u0000", "b": {%s}}',
    "half a pair": '{"a": "\\ud800", %s}',
    "not UTF-8": '{"a": "\udcff", %s}',
    "not finite": '{"a": NaN, %s}',
}


def parse(parser, line):
    try:
        return json.dumps(parser(line))  # NaN is not equal to itself
    except EntryRefused as error:
        return str(error)


@pytest.mark.parametrize("form", LINES.values(), ids=LINES)
def test_a_line_is_what_it_is_without_the_lines_before_it(form):
    line = form.replace("%s", MEMBER).encode("utf-8", "surrogateescape")
    repeated = Repeated("tools")
    repeated.parse(b"{%s}" % MEMBER.encode())
    assert parse(repeated.parse, line) == parse(parse_json, line)


def test_damaged_lines_are_what_they_are_without_the_lines_before_them():
    good = json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": TOOLS}).encode()
    repeated = Repeated("tools")
    repeated.parse(good)
    for seed in range(2_000):
        line = mutate(good, seed)
        assert parse(repeated.parse, line) == parse(parse_json, line), seed


def test_the_member_of_a_line_that_repeats_it_is_the_same_object():
    repeated = Repeated("tools")
    rows = [repeated.parse(json.dumps({"n": n, "tools": TOOLS}).encode()) for n in range(3)]
    assert [row["n"] for row in rows] == [0, 1, 2]
    assert rows[0]["tools"] == TOOLS
    assert rows[1]["tools"] is rows[2]["tools"]


def test_members_that_never_come_again_are_not_kept_for_ever():
    repeated = Repeated("tools")
    row = lambda n: json.dumps({"tools": [f"{n} " * 200]}).encode()  # noqa: E731  as short as it is used
    for n in range(MAX_IN_VAIN + 1):
        repeated.parse(row(n))
    assert repeated.parse(row(MAX_IN_VAIN))["tools"] is not repeated.parse(row(MAX_IN_VAIN))["tools"]
    assert repeated.parse(row(MAX_IN_VAIN - 1))["tools"] is repeated.parse(row(MAX_IN_VAIN - 1))["tools"]


def test_what_was_made_of_an_object_is_remembered_while_it_is_among_the_last():
    made = []
    remembered = Remembered(lambda given: made.append(given) or len(made), lambda *_: True)
    one, equal = [1], [1]
    assert [remembered(one), remembered(one), remembered(equal)] == [1, 1, 2]
    for n in range(MAX_REMEMBERED):
        remembered([n])
    assert remembered(one) > 2


def test_what_is_too_large_to_keep_is_made_anew():
    remembered = Remembered(list, lambda given, made: len(given) + len(made) < 4)
    short, long = [1], [1, 2]
    assert remembered(short) is remembered(short)
    assert remembered(long) is not remembered(long)


def test_long_tool_schemas_are_let_go_with_their_episodes(write):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write("\n".join(json.dumps({"messages": messages, "tools": [{"name": f"{n}" * 500_000}]}) for n in range(10, 34)))
    tracemalloc.start()
    try:
        assert sum(isinstance(entry, Episode) for entry in OpenAIChatImporter().read(path)) == 24
        assert tracemalloc.get_traced_memory()[1] < 12e6  # each line has 1e6 bytes
    finally:
        tracemalloc.stop()


def test_plain_messages_are_what_the_careful_way_makes_of_them():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    good = [
        {"role": "user", "content": "a ü"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "", "tool_call_id": "c", "name": "f"},
        {"role": "assistant", "content": "b"},
    ]
    assert find_plain(good) == tuple(take_messages(good, "messages").messages)
    n_plain = 0
    for seed in range(3_000):
        try:
            raw = json.loads(mutate(json.dumps(good).encode(), seed))
        except ValueError:
            continue
        plain = find_plain(raw)
        if plain is None:
            continue
        n_plain += 1
        taken = refusal = None
        try:
            taken = take_messages(raw, "messages")
        except EntryRefused as error:
            refusal = error
        if taken is not None:
            assert (tuple(taken.messages), taken.ignored, taken.n_decoded) == (plain, set(), 0), seed
        else:
            assert refusal.reason in {"no_agent_turn", "unpaired_tool_result", "unanswered_tool_call"}, seed
    assert n_plain > 300


@pytest.mark.parametrize(
    "message",
    [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": "a\0"},
        {"role": "user", "content": "a\ud800"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "user", "content": "a", "weight": 0},
        {"role": "user", "content": "a", "turn": 1},
        {"role": "user", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ' "{}"'}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f\0", "arguments": "{}"}}]},
    ],
)
def test_what_may_need_care_is_not_plain(message):
    assert find_plain([{"role": "user", "content": "a"}]) is not None
    assert find_plain([{"role": "user", "content": "a"}, message]) is None


def test_episodes_of_one_file_share_their_tools_and_differ_in_everything_else(write):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns, "tools": TOOLS, "task_id": n} for n in range(3)]
    path = write("\n".join(map(json.dumps, rows)))
    episodes = list(OpenAIChatImporter().read(path))
    alone = [next(OpenAIChatImporter().read(write(json.dumps(row)))) for row in rows]
    assert all(isinstance(episode, Episode) for episode in episodes)
    assert [episode.id for episode in episodes] == [episode.id for episode in alone]
    assert [episode.tools for episode in episodes] == [tuple(TOOLS)] * 3
    assert episodes[1].tools is episodes[2].tools


def test_a_tool_that_is_refused_is_refused_in_every_line(write):
    bad = [{"type": "function", "function": {"name": "f", "description": "x" * 300 + "\ud800"}}]
    row = partial(dict, messages=[{"role": "assistant", "content": "b"}], tools=bad)
    entries = list(OpenAIChatImporter().read(write("\n".join(json.dumps(row(task_id=n)) for n in range(3)))))
    assert [entry.reason for entry in entries] == ["bad_encoding"] * 3
    assert len({entry.detail.partition(": ")[2] for entry in entries}) == 1


def test_a_member_that_comes_again_and_again_outlives_those_that_do_not():
    repeated = Repeated("tools")
    row = lambda n: json.dumps({"tools": [f"{n} " * 200]}).encode()  # noqa: E731  as short as it is used
    kept = [repeated.parse(row(0)), repeated.parse(row(0))][1]["tools"]
    for n in range(1, 3 * MAX_KEPT):
        repeated.parse(row(n))
        assert repeated.parse(row(0))["tools"] is kept
