from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloop.episode import Episode, Failure, Success, Unknown
from loraloop.errors import ImportFailed
from loraloop.importers.langsmith import LangSmithImporter
from loraloop.testing.mutations import mutate
from loraloop.training_data import Refusal


def read(path):
    return list(LangSmithImporter().read(path))


def run(run_id, run_type="llm", **more):
    return {
        "id": run_id,
        "trace_id": "t",
        "run_type": run_type,
        "inputs": {"messages": [{"role": "user", "content": "Hi"}]},
        "outputs": {"content": "Yes"},
        **more,
    }


@pytest.fixture
def episodes(write):
    def from_runs(*runs):
        return read(write("".join(json.dumps(one) + "\n" for one in runs)))

    return from_runs


def turns(episode):
    return [(message.role, message.content, [call.function.arguments for call in message.tool_calls]) for message in episode.messages]


def test_a_trace_is_one_episode_with_its_task_outcome_and_times(fixtures):
    episode, other = read(fixtures / "langsmith" / "runs.jsonl")
    assert turns(episode) == [
        ("system", "Cook.", []),
        ("user", "Where is the egg?", []),
        ("assistant", "", ['{"a":  1}']),
        ("tool", "shelf", []),
        ("assistant", "On the shelf.", []),
    ], "of the two places where LangChain keeps a call, the arguments are what the agent wrote"
    assert (episode.task_id, episode.group_id, episode.outcome) == ("egg", "egg", Success(1.0))
    assert (episode.metadata.started_at, episode.metadata.ended_at) == (1_735_689_601_000, 1_735_689_603_500)
    tags = episode.metadata.tags
    assert (tags["model"], tags["outcome_from"], tags["score.toxicity"], tags["finish_reason"]) == ("m-1", "correctness", "0", "stop")
    assert [tool["function"]["name"] for tool in episode.tools] == ["find"]
    assert (other.outcome, other.metadata.tags["model"]) == (Failure("reward 0.25"), "m-2")


def test_what_somebody_else_would_have_said_is_not_stored(fixtures):
    assert all("GROUND TRUTH" not in entry.model_dump_json() for entry in read(fixtures / "langsmith" / "runs.jsonl"))


def test_runs_come_in_any_order_as_lines_a_list_or_an_object(write, fixtures):
    rows = [json.loads(line) for line in (fixtures / "langsmith" / "runs.jsonl").read_text().splitlines()]
    expected = {episode.id for episode in read(fixtures / "langsmith" / "runs.jsonl")}
    shuffled = [rows[at] for at in (3, 5, 0, 4, 2, 1)]
    for text in ("\n".join(map(json.dumps, shuffled)), json.dumps(shuffled, indent=1), json.dumps({"runs": shuffled})):
        path = write(text)
        assert LangSmithImporter().detect(path, text)
        assert {episode.id for episode in read(path)} == expected


def test_children_may_lie_inside_their_run(write, fixtures):
    top, *children = [json.loads(line) for line in (fixtures / "langsmith" / "runs.jsonl").read_text().splitlines()][:4]
    inside = [{key: part for key, part in child.items() if key not in {"trace_id", "parent_run_id"}} for child in children]
    (episode,) = read(write(json.dumps({**top, "child_runs": inside})))
    assert episode.id == read(fixtures / "langsmith" / "runs.jsonl")[0].id


def test_dotted_order_says_trace_and_parent_where_nothing_else_does(episodes):
    first = {"id": "a", "run_type": "chain", "dotted_order": "20250101T000000000000Za"}
    inner = {**run("b"), "dotted_order": f"{first['dotted_order']}.20250101T000001000000Zb"}
    del inner["trace_id"]
    (episode,) = episodes(inner, first)
    assert (episode.metadata.tags["trace_id"], episode.metadata.tags["span_id"]) == ("a", "a")


def test_a_graph_called_by_a_tool_is_a_linked_episode(episodes):
    asked = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "find", "arguments": "{}"}}],
    }
    user = {"role": "user", "content": "Where?"}
    main, sub = episodes(
        run("top", "chain"),
        run(
            "m1",
            inputs={"messages": [user]},
            outputs={"choices": [{"message": asked}]},
            parent_run_id="top",
            start_time="2025-01-01T00:00:01Z",
        ),
        run("tool", "tool", name="find", parent_run_id="top"),
        run("s1", parent_run_id="tool", outputs={"content": "here"}, start_time="2025-01-01T00:00:02Z"),
        run(
            "m2",
            inputs={"messages": [user, asked, {"role": "tool", "tool_call_id": "c", "content": "here"}]},
            outputs={"content": "There."},
            parent_run_id="top",
            start_time="2025-01-01T00:00:03Z",
        ),
    )
    assert [content for _, content, _ in turns(main)] == ["Where?", None, "here", "There."]
    assert (turns(sub)[-1][1], sub.metadata.tags["agent"], sub.metadata.tags["parent_span_id"]) == ("here", "find", "top")


@pytest.mark.parametrize(
    ("given", "said", "told"),
    [
        (  # Anthropic's own request and response
            {"system": "Cook.", "messages": [{"role": "user", "content": [{"type": "text", "text": "Egg?"}]}], "model": "m"},
            {"role": "assistant", "stop_reason": "tool_use", "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "I look."}, {"type": "tool_use", "id": "a", "name": "find", "input": {"b": 1, "a": 2}}]},
            [("system", "Cook.", []), ("user", "Egg?", []), ("assistant", "I look.", ['{"b":1,"a":2}'])],
        ),
        (  # OpenAI's Responses
            {"instructions": "Cook.", "input": [{"role": "user", "content": [{"type": "input_text", "text": "Egg?"}]}, {"type": "function_call", "call_id": "a", "name": "find", "arguments": "{}"}, {"type": "function_call_output", "call_id": "a", "output": "shelf"}]},
            {"object": "response", "output": [{"type": "reasoning", "summary": []}, {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}, {"type": "function_call", "call_id": "b", "name": "find", "arguments": '{"x":  1}'}, {"type": "function_call", "call_id": "c", "name": "clock", "arguments": "{}"}]},
            [("system", "Cook.", []), ("user", "Egg?", []), ("assistant", None, ["{}"]), ("tool", "shelf", []), ("assistant", "I look.", ['{"x":  1}', "{}"])],
        ),
        (  # LangChain's messages as plain objects
            {"messages": [[{"type": "human", "data": {"content": "Egg?"}}, {"type": "ai", "content": "", "tool_calls": [{"name": "find", "args": {"b": 1}, "id": "a"}]}, {"type": "tool", "content": "shelf", "tool_call_id": "a"}]]},
            {"generations": [[{"text": "Yes.", "message": {"type": "ai", "content": "Yes."}}]]},
            [("user", "Egg?", []), ("assistant", "", ['{"b":1}']), ("tool", "shelf", []), ("assistant", "Yes.", [])],
        ),
        ({"prompt": "Egg?"}, {"generations": [[{"text": "Yes."}]]}, [("user", "Egg?", []), ("assistant", "Yes.", [])]),
        (  # Gemini's contents
            {"contents": [{"role": "user", "parts": [{"text": "Egg?"}]}], "config": {"system_instruction": "Cook."}},
            {"candidates": [{"finish_reason": "STOP", "content": {"role": "model", "parts": [{"text": "Hm.", "thought": True}, {"function_call": {"name": "find", "args": {}}}]}}]},
            [("system", "Cook.", []), ("user", "Egg?", []), ("assistant", None, ["{}"])],
        ),
    ],
)  # fmt: skip
def test_requests_and_responses_of_all_providers_are_read(episodes, given, said, told):
    (episode,) = episodes(run("a", inputs=given, outputs=said))
    assert turns(episode) == told


def test_what_a_model_thought_is_apart(episodes):
    said = {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Yes."}]}
    (episode,) = episodes(run("a", outputs=said))
    assert (turns(episode)[-1][1], episode.messages[1].reasoning) == ("Yes.", "Hm.")


def test_tools_of_all_providers_become_openai_s(episodes):
    schema = {"type": "object", "properties": {}}
    expected = {"type": "function", "function": {"name": "find", "parameters": schema}}
    for offered in (
        {"name": "find", "input_schema": schema},
        {"type": "function", "name": "find", "parameters": schema, "description": None},
        expected,
        {"function_declarations": [{"name": "find", "parameters": schema}]},
    ):
        (episode,) = episodes(run("a", extra={"invocation_params": {"tools": [offered]}}))
        assert episode.tools == (expected,)


def test_feedback_is_taken_by_its_key(episodes):
    for feedback, outcome in (
        ({"correctness": {"n": 2, "avg": 0.5}}, Failure("correctness 0.5")),
        ({"user_score": {"n": 1, "avg": 1}}, Unknown()),
        ({"Correctness": {"n": 1, "avg": 1}}, Success(1.0)),
    ):
        (episode,) = episodes(run("a", feedback_stats=feedback))
        assert episode.outcome == outcome
    late = [
        {"run_id": "a", "trace_id": "t", "key": "success", "score": value, "created_at": at}
        for value, at in ((True, "2025-02-01T00:00:00Z"), (False, "2025-01-01T00:00:00Z"))
    ]
    (episode,) = episodes(run("a"), *late)
    assert episode.outcome == Success(1.0), "of one key given twice, the later counts"


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(["runs", "refused"]))
def test_broken_runs_are_refused_and_never_crash(tmp_path_factory, seed, name):
    source = Path(__file__).parents[1] / "fixtures" / "langsmith" / f"{name}.jsonl"
    path = tmp_path_factory.mktemp("fuzz") / "x.jsonl"
    path.write_bytes(mutate(source.read_bytes(), seed))
    try:
        entries = read(path)
    except ImportFailed:
        return
    assert all(isinstance(entry, Episode | Refusal) for entry in entries)
