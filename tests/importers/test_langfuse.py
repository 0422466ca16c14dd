from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloop.episode import Episode, Failure, Success, Unknown
from loraloop.errors import ImportFailed
from loraloop.importers.ingest import ingest_file, iter_files
from loraloop.importers.langfuse import LangfuseImporter
from loraloop.testing.mutations import mutate
from loraloop.training_data import Refusal


def read(path):
    return list(LangfuseImporter().read(path))


def turns(episode):
    return [(message.role, message.content, [call.function.arguments for call in message.tool_calls]) for message in episode.messages]


@pytest.fixture
def export(fixtures):
    return json.loads((fixtures / "langfuse" / "trace.json").read_text())


def test_a_trace_is_one_episode_with_its_task_and_outcome(fixtures):
    (episode,) = read(fixtures / "langfuse" / "trace.json")
    assert turns(episode) == [
        ("user", "Where is the egg?", []),
        ("assistant", None, ['{"a":  1}']),
        ("tool", "shelf", []),
        ("assistant", "On the shelf.", []),
    ]
    assert (episode.task_id, episode.group_id, episode.outcome) == ("egg", "egg", Success(1.0))
    assert (episode.metadata.started_at, episode.metadata.ended_at) == (1_735_689_600_000, 1_735_689_603_500)
    tags = episode.metadata.tags
    assert (tags["agent"], tags["model"], tags["session"], tags["score.toxicity"]) == ("a1", "m-1", "s1", "0")
    assert [tool["function"]["name"] for tool in episode.tools] == ["find"], "the tools of the first call, as none stand with the second"
    assert "score.output" not in tags
    assert "GROUND TRUTH" not in episode.model_dump_json(), "a correction is what somebody else would have said"


@pytest.mark.parametrize(
    ("score", "outcome"),
    [
        ({"name": "correctness", "value": 0.5, "dataType": "NUMERIC"}, Failure("correctness 0.5")),
        ({"name": "resolved", "value": 1, "dataType": "BOOLEAN"}, Success(1.0)),
        ({"name": "correctness", "value": 0, "stringValue": "Correct", "dataType": "CATEGORICAL"}, Success(1.0)),
        ({"name": "hallucination", "value": 1, "dataType": "NUMERIC"}, Unknown()),
        ({"name": "success", "value": 1, "dataType": "BOOLEAN", "observationId": "f1"}, Unknown()),
        ({"name": "success", "value": 1, "dataType": "BOOLEAN", "observationId": "g2"}, Success(1.0)),
        ({"name": "success", "value": 1, "dataType": "BOOLEAN", "observationId": "g1"}, Unknown()),
    ],
)
def test_scores_are_taken_by_name_and_by_what_they_are_of(write, export, score, outcome):
    export["trace"]["scores"] = [score]
    (episode,) = read(write(json.dumps(export)))
    assert episode.outcome == outcome


def test_a_trace_may_be_told_in_other_shapes(write, export, fixtures):
    (expected,) = read(fixtures / "langfuse" / "trace.json")
    inside = {**export["trace"], "observations": export["observations"], "latency": 1}
    for told in (inside, [export], {"trace": inside, "observations": export["observations"]}):
        text = json.dumps(told)
        path = write(text)
        assert LangfuseImporter().detect(path, text)
        assert [entry.id for entry in read(path)] == [expected.id]


def test_a_trace_longer_than_the_head_is_recognised(write, export):
    export["trace"]["metadata"] = "x" * 100_000
    text = json.dumps(export)
    assert LangfuseImporter().detect(write(text), text[: 64 * 1024])


def test_rows_of_a_blob_export_find_their_scores_beside_them(tmp_path, fixtures):
    rows = (fixtures / "langfuse" / "observations.jsonl").read_text().splitlines()
    for folder, lines in {"observations_v2": [rows[2], rows[0]], "scores": [rows[1]]}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.jsonl").write_text("\n".join(lines))
    told, scored = read(tmp_path / "observations_v2" / "1.jsonl")
    assert (scored.outcome, scored.metadata.tags["finish_reason"]) == (Failure("success false"), "stop")
    assert scored.id == read(fixtures / "langfuse" / "observations.jsonl")[0].id
    assert told.metadata.tags["text"] == "rebuilt", "a telling in one text was cut at its speakers"
    assert turns(told) == [("system", "Be brief.", []), ("user", "Hello", []), ("assistant", "Hi", [])]


def test_tools_are_found_where_instrumentations_leave_them(write, export):
    schema = {"type": "object", "properties": {}}
    tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
    pydantic_ai = {"function_tools": [{"name": "look", "parameters_json_schema": schema}]}
    for left in (
        {"toolDefinitions": {"look": json.dumps({"name": "look", "parameters": schema})}},
        {"modelParameters": {"tools": [tool]}},
        {"metadata": json.dumps({"attributes": json.dumps({"model_request_parameters": json.dumps(pydantic_ai)})})},
    ):
        observations = [{**row, **left} if row["id"] == "g2" else row for row in export["observations"]]
        (episode,) = read(write(json.dumps({**export, "observations": observations})))
        assert episode.tools == (tool,)


def test_real_traces_are_read_or_refused_by_name(shared_data, store):
    reports = [ingest_file(store, path) for path in iter_files([shared_data / "langfuse"]) if path.name.endswith(".trace.json")]
    assert [report.format for report in reports] == ["langfuse"] * 14
    assert sum(report.read for report in reports) == 15, "one trace has a second agent, which evaluates"
    refused = {Path(report.path).name: report.refused for report in reports if report.refused}
    assert refused == {"claude-agent-2025-12-22.trace.json": {"bad_shape": 1}}, "its instrumentation wrote a placeholder for the input"
    episodes = store.query()
    assert {episode.outcome for episode in episodes} == {Unknown()}, "toxicity and hallucination say nothing about success"
    assert {episode.metadata.tags.get("score.toxicity") for episode in episodes} == {None, "0", "0.8"}
    named = {episode.metadata.tags["agent"] for episode in episodes if "joke-generator" in episode.metadata.tags.get("trace_name", "")}
    assert named == {"joke_agent", "evaluator_agent"}


def test_real_answers_are_those_that_langfuse_shows(shared_data):
    n_checked = 0
    for path in iter_files([shared_data / "langfuse"]):
        if not path.name.endswith(".trace.json") or "claude" in path.name:
            continue
        said = {message.content for entry in read(path) for message in entry.messages if message.is_agent and message.content}
        shown = json.loads(path.with_name(path.name.replace(".trace.", ".chatml.")).read_text())
        generations = {row["id"] for row in json.loads(path.read_text())["observations"] if row["type"] == "GENERATION" and row["model"]}
        for name in generations & shown.keys():
            output = shown[name].get("output") or {}
            words = (
                [message.get("content") for message in output.get("data", []) if message.get("role") == "assistant"]
                if output.get("success")
                else []
            )
            plain = [word for word in words if isinstance(word, str) and word and not word.startswith('[{"function"')]
            assert set(plain) <= said, (path.name, name)
            n_checked += len(plain)
    assert n_checked == 7


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(["trace.json", "observations.jsonl", "refused.jsonl"]))
def test_broken_exports_are_refused_and_never_crash(tmp_path_factory, seed, name):
    source = Path(__file__).parents[1] / "fixtures" / "langfuse" / name
    path = tmp_path_factory.mktemp("fuzz") / "x.jsonl"
    path.write_bytes(mutate(source.read_bytes(), seed))
    try:
        entries = read(path)
    except ImportFailed:
        return
    assert all(isinstance(entry, Episode | Refusal) for entry in entries)
