from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloop.episode import Episode, Failure, Success, Unknown
from loraloop.errors import ImportFailed
from loraloop.importers.mlflow_trace import MlflowImporter
from loraloop.testing.mutations import mutate
from loraloop.training_data import Refusal


def read(path):
    return list(MlflowImporter().read(path))


def turns(episode):
    return [(message.role, message.content, [call.function.arguments for call in message.tool_calls]) for message in episode.messages]


def span(number, kind, given=None, said=None, parent=None, **attributes):
    told = {"mlflow.spanType": kind, "mlflow.spanInputs": given, "mlflow.spanOutputs": said, **attributes}
    return {
        "span_id": f"{number:016x}",
        "parent_span_id": None if parent is None else f"{parent:016x}",
        "name": f"span {number}",
        "attributes": {key: json.dumps(value) for key, value in told.items() if value is not None},
    }


@pytest.fixture
def traced(write):
    def from_spans(*spans, **info):
        return read(write(json.dumps({"info": {"trace_id": "tr-1", **info}, "data": {"spans": list(spans)}})))

    return from_spans


ASKED = {"messages": [{"role": "user", "content": "Hi"}]}


def test_a_trace_is_one_episode_with_its_task_and_outcome(fixtures):
    episode, failed = read(fixtures / "mlflow" / "traces.jsonl")
    assert turns(episode) == [
        ("user", "Where is the egg?", []),
        ("assistant", None, ['{"a":  1}']),
        ("tool", "shelf", []),
        ("assistant", "On the shelf.", []),
    ]
    assert (episode.task_id, episode.group_id) == ("egg", "egg")
    assert episode.outcome == Success(1.0), "the second judgement took the place of the first"
    assert (episode.metadata.started_at, episode.metadata.ended_at) == (1_735_689_601_000, 1_735_689_604_500)
    assert [tool["function"]["name"] for tool in episode.tools] == ["find"]
    tags = episode.metadata.tags
    assert (tags["model"], tags["session"], tags["trace_id"], tags["score.correctness"]) == ("m-1", "s1", "tr-1", "yes")
    assert "GROUND TRUTH" not in episode.model_dump_json(), "an expectation is the right answer"
    assert (failed.outcome, failed.metadata.tags["run_error"], failed.metadata.tags["state"]) == (Unknown(), "tool broke", "ERROR")


def test_the_shape_of_mlflow_2_and_the_artifact_alone_are_read(fixtures, write):
    _, old = [json.loads(line) for line in (fixtures / "mlflow" / "traces.jsonl").read_text().splitlines()]
    assert turns(read(fixtures / "mlflow" / "traces.jsonl")[1]) == [("user", "Hello", []), ("assistant", "Hi", [])]
    text = json.dumps(old["data"])
    path = write(text)
    assert MlflowImporter().detect(path, text)
    (episode,) = read(path)
    assert (turns(episode), episode.metadata.tags["trace_id"]) == ([("user", "Hello", []), ("assistant", "Hi", [])], "0x2")


def test_a_list_of_traces_over_several_lines_is_read(fixtures, write):
    rows = [json.loads(line) for line in (fixtures / "mlflow" / "traces.jsonl").read_text().splitlines()]
    told = read(write(json.dumps(rows, indent=1)))
    assert [episode.id for episode in told] == [episode.id for episode in read(fixtures / "mlflow" / "traces.jsonl")]


def test_sub_agents_are_linked_episodes(traced):
    main, sub = traced(
        span(1, "AGENT"),
        span(2, "CHAT_MODEL", ASKED, {"content": "I ask."}, 1),
        span(3, "TOOL", parent=1),
        span(4, "AGENT", parent=3),
        span(5, "CHAT_MODEL", {"messages": [{"role": "user", "content": "?"}]}, {"content": "here"}, 4),
    )
    assert (turns(main)[-1][1], turns(sub)[-1][1]) == ("I ask.", "here")
    assert (sub.metadata.tags["agent"], sub.metadata.tags["parent_span_id"]) == ("span 4", main.metadata.tags["span_id"])


def test_a_call_that_no_one_can_read_is_told_by_the_one_within_it(traced):
    (episode,) = traced(span(1, "LLM", {"question": "Hi"}, "Yes"), span(2, "CHAT_MODEL", ASKED, "Yes", 1))
    assert turns(episode) == [("user", "Hi", []), ("assistant", "Yes", [])]
    (refusal,) = traced(span(1, "LLM", {"question": "Hi"}, "Yes"), span(2, "CHAT_MODEL", ASKED, "Yes"))
    assert refusal.reason == "bad_shape"


def test_messages_kept_for_the_chat_view_and_genai_attributes_are_read(traced):
    told = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    genai = [json.dumps([{"role": message["role"], "parts": [{"type": "text", "content": message["content"]}]}]) for message in told]
    for attributes in ({"mlflow.chat.messages": told}, {"gen_ai.input.messages": genai[0], "gen_ai.output.messages": genai[1]}):
        (episode,) = traced(span(1, "CHAT_MODEL", **attributes))
        assert turns(episode) == [("user", "Hi", []), ("assistant", "Yes", [])]
    attributes = {"gen_ai.operation.name": "chat", "gen_ai.input.messages": genai[0], "gen_ai.output.messages": genai[1]}
    (episode,) = traced(span(1, None, **attributes))
    assert turns(episode) == [("user", "Hi", []), ("assistant", "Yes", [])], "without a type, the conventions say what it is"


@pytest.mark.parametrize(
    ("assessment", "outcome"),
    [
        ({"assessment_name": "correctness", "feedback": {"value": "no"}}, Failure("correctness no")),
        ({"name": "reward", "feedback": {"value": 0.4}}, Failure("reward 0.4")),
        ({"name": "success", "feedback": {"value": False}}, Failure("success false")),
        ({"name": "success", "feedback": {"value": True}, "valid": False}, Unknown()),
        ({"name": "success", "feedback": {"value": None, "error": {"error_code": "X"}}}, Unknown()),
        ({"name": "success", "expectation": {"value": True}}, Unknown()),
        ({"name": "relevance", "feedback": {"value": "yes"}}, Unknown()),
    ],
)
def test_feedback_decides_by_its_name(traced, assessment, outcome):
    (episode,) = traced(span(1, "CHAT_MODEL", ASKED, "Yes"), assessments=[assessment])
    assert episode.outcome == outcome


def test_previews_are_never_read(traced):
    (refusal,) = traced(span(1, "CHAT_MODEL"), request_preview='{"messages": [{"role": "user", "content": "Hi"}]}', response_preview="Yes")
    assert refusal.reason == "no_content"


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(["traces", "refused"]))
def test_broken_traces_are_refused_and_never_crash(tmp_path_factory, seed, name):
    source = Path(__file__).parents[1] / "fixtures" / "mlflow" / f"{name}.jsonl"
    path = tmp_path_factory.mktemp("fuzz") / "x.jsonl"
    path.write_bytes(mutate(source.read_bytes(), seed))
    try:
        entries = read(path)
    except ImportFailed:
        return
    assert all(isinstance(entry, Episode | Refusal) for entry in entries)
