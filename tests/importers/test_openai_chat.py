from __future__ import annotations

import json
import re

import pytest

from loraloop.episode import CONVERSATION, Episode, Success
from loraloop.errors import ImportFailed
from loraloop.importers.ingest import ingest_file
from loraloop.importers.openai_chat import OpenAIChatImporter
from loraloop.training_data import Refusal

GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
PLACE_FOUND_EXPECTED_DO = r"%s, (line|entry) \d+: found .+; expected .+; do this: .+"


def read(path):
    return list(OpenAIChatImporter().read(path))


def read_row(write, **row):
    row.setdefault("messages", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    (entry,) = read(write(json.dumps(row)))
    return entry


def by_case(fixtures):
    return {json.loads(episode.metadata.tags["case"]): episode for episode in read(fixtures / "openai" / "accepted.jsonl")}


def test_every_row_is_a_success_by_convention_of_the_format(fixtures):
    episodes = by_case(fixtures).values()
    assert len(episodes) == 6
    assert all(episode.outcome == Success(1.0) and episode.metadata.tags["outcome_from"] == "format" for episode in episodes)
    assert {episode.learn_model for episode in episodes} == {CONVERSATION}
    assert by_case(fixtures)["plain"].task_id is None


def test_tool_calls_are_kept_as_written(fixtures):
    episode = by_case(fixtures)["tools"]
    north, south = episode.messages[2].tool_calls
    assert north.function.arguments == '{"at" : "north"}'
    assert south.function.arguments == '{"at":"south","to":"sö"}'  # an object becomes its canonical JSON text, once
    assert [message.tool_call_id for message in episode.messages[3:5]] == ["b", "a"]
    assert episode.tools[0]["function"]["parameters"]["$defs"] == {"x": {}}
    assert (episode.task_id, episode.group_id) == ("7", "7")
    assert episode.metadata.tags["parallel_tool_calls"] == "true"


def test_absent_content_is_none_and_empty_content_stays_empty(fixtures):
    messages = by_case(fixtures)["tools"].messages
    assert messages[2].content is None
    assert messages[5].content == ""


def test_repeated_call_ids_are_kept_and_pair_by_order(fixtures):
    messages = by_case(fixtures)["repeated ids"].messages
    assert [call.id for message in messages for call in message.tool_calls] == ["c"] * 4
    assert [message.content for message in messages if message.role == "tool"] == ["one", "two", "three"]
    assert messages[-1].tool_calls[0].function.arguments == ""


def test_old_spellings_become_the_new_ones(fixtures):
    episode = by_case(fixtures)["old spellings"]
    assert [message.role for message in episode.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert episode.messages[1].content == "see here"
    assert episode.messages[2].tool_calls[0].id is None
    assert episode.messages[2].tool_calls[0].function.name == "look"
    assert episode.tools == ({"type": "function", "function": {"name": "look", "description": "Look."}},)
    assert "ignored_keys" not in episode.metadata.tags


def test_weights_are_kept_and_a_last_user_turn_stays(fixtures):
    episode = by_case(fixtures)["weights"]
    assert episode.metadata.tags["weight"] == "0.0"
    assert [message.weight for message in episode.messages] == [1, 0, 1, 1, 1]
    assert episode.messages[-1].content == "Observation: Episode finished, reward = True"


def test_unknown_keys_become_tags_or_are_named(fixtures):
    tags = by_case(fixtures)["left behind"].metadata.tags
    assert tags["source"] == '{"a":"ü","b":[1]}'
    assert tags["id"] == '"row-1"'
    assert tags["format"] == "openai"
    assert json.loads(tags["ignored_keys"]) == ["format", "messages.turn_idx"]


def test_a_long_unknown_value_is_named_not_kept(write):
    tags = read_row(write, long="x" * 998, short="x" * 997).metadata.tags
    assert json.loads(tags["ignored_keys"]) == ["long"]
    assert len(tags["short"]) == 999


@pytest.mark.parametrize(("task_id", "expected"), [(7, "7"), ("t", "t"), (None, None), ("", None), (True, None), (0.5, None), ([1], None)])
def test_only_text_and_integers_are_task_ids(write, task_id, expected):
    episode = read_row(write, task_id=task_id)
    assert episode.task_id == expected
    assert ("task_id" in episode.metadata.tags) == (expected is None and task_id is not None)


def test_every_refusal_has_its_reason_and_says_what_to_do(fixtures):
    path = fixtures / "openai" / "refused.jsonl"
    lines = path.read_text().splitlines()
    entries = read(path)
    assert len(entries) == len(lines)
    for line, entry in zip(lines, entries, strict=True):
        case = json.loads(line)["case"] if line.startswith("{") else json.loads(line)[0]
        assert isinstance(entry, Refusal), case
        assert entry.reason == case.partition(":")[0], (case, entry)
        assert re.fullmatch(PLACE_FOUND_EXPECTED_DO % re.escape(str(path)), entry.detail), entry.detail
    assert [int(re.search(r"line (\d+)", entry.detail)[1]) for entry in entries] == list(range(1, len(lines) + 1))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "bad_json"),
        (b'{"messages": [{"role": "user", "content": "a', "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"n": ' + b"9" * 5000 + b"}", "bad_json"),
        (b'{"messages": "\xff"}', "bad_encoding"),
        (b'{"messages": "\x00"}', "bad_encoding"),
        (b'{"messages": [], "deep": ' + b"[" * 200 + b"]" * 200 + b"}", "bad_shape"),
        (b"[1]", "bad_shape"),
        (b'"text"', "bad_shape"),
        (b"7", "bad_shape"),
    ],
)
def test_a_bad_line_spoils_only_itself(write, line, reason):
    first, bad, last = read(write(b"\n".join([GOOD.encode(), line, GOOD.encode()])))
    assert isinstance(first, Episode)
    assert first.id == last.id
    assert bad.reason == reason
    assert "line 2: found " in bad.detail
    assert len(bad.detail) < 600  # the path of the file among them


def test_a_bad_first_line_spoils_only_itself(write):
    for line in (b"\xff", b"not json", b"[1]", b'{"mess'):
        bad, good = read(write(line + b"\n" + GOOD.encode()))
        assert isinstance(bad, Refusal)
        assert isinstance(good, Episode)


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        f"\ufeff{GOOD}\r\n",
        f"\n  \r\n{GOOD}\r\n\r\n",
        f"[{GOOD}]",
        f"\ufeff[\n  {GOOD}\n]\n",
        json.dumps(json.loads(GOOD), indent=2),
    ],
)
def test_line_ends_marks_blank_lines_and_lists_make_no_difference(write, content):
    (entry,) = read(write(content))
    (plain,) = read(write(GOOD, "plain.jsonl"))
    assert entry.id == plain.id


def test_a_line_separator_inside_a_string_does_not_end_a_line(write):
    (entry,) = read(write(GOOD.replace('"a"', '"a\u2028b\x85c"')))
    assert entry.messages[0].content == "a\u2028b\x85c"


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff", "[]", "[\n]\n"])
def test_a_file_without_entries_gives_none(write, content):
    assert read(write(content)) == []


@pytest.mark.parametrize("content", [b"[{", b"{\n", b"[\n\xff\n]", f"{{\n}}{GOOD}".encode()])
def test_a_broken_document_cannot_be_imported(write, content):
    with pytest.raises(ImportFailed, match=r"found .*; expected one whole JSON document; do this: check that the file is complete"):
        read(write(content))


def test_a_file_that_is_not_there_cannot_be_imported(tmp_path):
    with pytest.raises(ImportFailed, match="cannot be opened"):
        read(tmp_path / "absent.jsonl")


def test_count_is_known_for_lines_and_not_for_lists(write):
    importer = OpenAIChatImporter()
    assert importer.count(write(f"\n{GOOD}\nbroken\n\n{GOOD}")) == 3
    assert importer.count(write("")) == 0
    assert importer.count(write(f"[{GOOD}]")) is None


def test_list_entries_are_numbered(write):
    _, refusal = read(write(f"[{GOOD}, 7]", "rows.json"))
    assert "rows.json, entry 2: found 7;" in refusal.detail


def test_ids_follow_from_what_is_said_alone(write):
    base = read_row(write).id
    assert read_row(write).id == base
    assert base.timestamp_ms == 0
    say = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    others = [
        read_row(write, messages=[say[0], {"role": "assistant", "content": "B"}]),
        read_row(write, messages=[{**say[0], "content": None}, say[1]]),
        read_row(write, messages=[{**say[0], "content": ""}, say[1]]),
        read_row(write, messages=[say[0], {**say[1], "weight": 0}]),
        read_row(write, tools=[{"type": "function", "function": {"name": "f"}}]),
        read_row(write, task_id=1),
        read_row(write, weight=1),
        read_row(write, source="x"),
    ]
    assert len({base, *(other.id for other in others)}) == len(others) + 1


def test_other_spellings_of_the_same_row_have_the_same_id(write):
    one = read_row(write, weight=1, tools=None, messages=[{"role": "assistant", "content": None}])
    two = read_row(write, weight=1.0, tools=[], functions=[], messages=[{"tool_calls": None, "role": "assistant"}])
    assert one.id == two.id


def test_rows_whose_keys_are_in_another_order_can_be_ingested_together(write, store):
    tool = {"type": "function", "function": {"name": "f"}}
    messages = json.loads(GOOD)["messages"]
    row = {"messages": messages, "a": 1, "b": 2, "tools": [tool]}
    reordered = {"b": 2, "a": 1, "tools": [tool], "messages": [dict(reversed(message.items())) for message in messages]}
    other_prompt = {**row, "tools": [dict(reversed(tool.items()))]}
    path = write("\n".join(json.dumps(line) for line in (row, reordered, other_prompt)))
    report = ingest_file(store, path)
    assert (report.stored, report.duplicates) == (2, 1)
    assert [list(episode.tools[0]) for episode in read(path)] == [list(tool), list(tool), [*reversed(tool)]]


def test_demonstration_turns_are_marked(write):
    say = [{"role": "assistant", "content": "x", "is_demo": True}, {"role": "assistant", "content": "y"}]
    assert [message.is_agent for message in read_row(write, messages=say).messages] == [False, True]


def test_turns_of_another_author_are_not_the_agents(write):
    say = [
        {"role": "assistant", "content": text, "author": author} for text, author in (("x", "simulated_user"), ("y", "agent"), ("z", None))
    ]
    episode = read_row(write, messages=say)
    assert [message.is_agent for message in episode.messages] == [False, True, True]
    assert [message.author for message in episode.messages] == ["simulated_user", "agent", None]
    assert "ignored_keys" not in episode.metadata.tags


def call(arguments, name="find"):
    return [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": name, "arguments": arguments}}]}]


@pytest.mark.parametrize(
    ("arguments", "kept", "n_decoded"),
    [
        ('{"a":  1}', '{"a":  1}', None),
        (json.dumps('{"a":  1}'), '{"a":  1}', "1"),
        (json.dumps(json.dumps('{"a":  1}')), '{"a":  1}', "1"),
        ('{"a": "{}"}', '{"a": "{}"}', None),
        ('"half', '"half', None),
        ("not json", "not json", None),
        ("[1]", "[1]", None),
        ("", "", None),
    ],
)
def test_arguments_that_were_encoded_twice_are_decoded_and_counted(write, arguments, kept, n_decoded):
    episode = read_row(write, messages=call(arguments))
    assert episode.messages[0].tool_calls[0].function.arguments == kept
    assert episode.metadata.tags.get("decoded_arguments") == n_decoded


def tool(name, properties, **more):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties, **more}}}


def test_keys_that_a_table_format_padded_are_taken_out_and_counted(write):
    text = {"type": "string", "default": None, "enum": None}
    padded = [tool("find", {"where": text, "shelf": None}, required=["where"]), tool("open", {"where": None, "shelf": text}, required=None)]
    episode = read_row(write, tools=padded, messages=call({"where": "x", "shelf": None}))
    plain = [tool("find", {"where": {"type": "string"}}, required=["where"]), tool("open", {"shelf": {"type": "string"}})]
    assert list(episode.tools) == plain
    assert episode.messages[0].tool_calls[0].function.arguments == '{"where":"x"}'
    assert episode.metadata.tags["padded_keys_removed"] == "8"


def test_nulls_that_mean_something_stay(write):
    default = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    other = {"enum": ["a", None], "const": None, "examples": [None, {"a": None}]}
    tools = [tool("find", {"where": default, "default": {"type": "string", "default": None}, "kind": other})]
    episode = read_row(write, tools=tools, messages=call({"where": None}))
    assert list(episode.tools) == tools
    assert episode.messages[0].tool_calls[0].function.arguments == '{"where":null}'
    assert "padded_keys_removed" not in episode.metadata.tags


def test_arguments_of_a_tool_that_is_not_listed_are_kept_as_they_are(write):
    episode = read_row(write, tools=[tool("find", {"where": {}})], messages=call({"x": None}, name="other"))
    assert episode.messages[0].tool_calls[0].function.arguments == '{"x":null}'


@pytest.mark.parametrize("change", [{"weight": 0}, {"is_demo": True}, {"author": "teacher"}])
def test_an_observation_inside_a_turn_that_is_not_learned_is_kept(write, change):
    trace = {"role": "assistant", "content": "Action: a\nObservation: b", **change}
    assert read_row(write, messages=[trace, {"role": "assistant", "content": "c"}]).messages[0].content == trace["content"]


@pytest.mark.parametrize(
    ("name", "n_entries"),
    [("fireact_hotpotqa.jsonl", 500), ("tau2_train_sft-v1-small.jsonl", 37)],
)
def test_real_files_are_taken_over_whole(shared_data, name, n_entries):
    path = shared_data / "openai_ft" / name
    with path.open() as file:
        rows = [json.loads(line) for line in file]
    episodes = read(path)
    assert len(episodes) == n_entries == len({episode.id for episode in episodes})
    for row, episode in zip(rows, episodes, strict=True):
        assert isinstance(episode, Episode), episode
        assert list(episode.tools) == row.get("tools", [])
        assert [message.to_openai() for message in episode.messages] == [{"content": None, **raw} for raw in row["messages"]]
        assert "ignored_keys" not in episode.metadata.tags


def test_real_rows_with_images_are_refused(shared_data):
    assert [entry.reason for entry in read(shared_data / "sharegpt" / "mllm_demo.json")] == ["unsupported_content"] * 6
