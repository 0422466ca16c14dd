from __future__ import annotations

import base64
import json
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from otel_spans import TRACE, agent, any_value, calls, chat, lines, request, result, span, text, tool

from loraloop.episode import Episode, Failure, Success, Unknown
from loraloop.errors import ImportFailed
from loraloop.importers.ingest import ingest_file
from loraloop.importers.otlp import OtlpImporter
from loraloop.learn.conversation import ConversationLearn
from loraloop.testing.mutations import mutate
from loraloop.training_data import Refusal

SYSTEM, USER = text("system", "Cook."), text("user", "Where is the egg?")
ASKED = calls(("c1", "find", {"where": "shelf", "a": 1}), ("c2", "clock", '{"zone":  "UTC"}'))
TOLD = [result("c1", {"egg": 1}), result("c2", "12:00")]
ANSWER = text("assistant", "On the shelf.")


def read(path):
    return list(OtlpImporter().read(path))


@pytest.fixture
def episodes(write):
    """What is read from requests, or from the spans of one."""

    def from_requests(*made):
        return read(write(lines(*(made if "resourceSpans" in made[0] else [request(*made)]))))

    return from_requests


def trained(episode):
    return [message.content or message.tool_calls[0].function.name for message in episode.messages if message.is_agent and message.weight]


def test_one_episode_is_made_of_many_spans(episodes):
    (episode,) = episodes(
        span(1, agent("cook")),
        span(2, chat([SYSTEM, USER], ASKED), 1),
        span(3, tool("find"), 1),
        span(4, chat([SYSTEM, USER, ASKED, *TOLD], ANSWER), 1),
    )
    assert [message.role for message in episode.messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert [(call.id, call.function.arguments) for call in episode.messages[2].tool_calls] == [
        ("c1", '{"where":"shelf","a":1}'),
        ("c2", '{"zone":  "UTC"}'),
    ], "the order of keys and the text of arguments are the agent's"
    assert [message.content for message in episode.messages[3:5]] == ['{"egg":1}', "12:00"]
    assert trained(episode) == ["find", "On the shelf."]
    assert (episode.records, episode.outcome) == ((), Unknown())
    assert episode.metadata.started_at == 1_700_000_001_000
    assert episode.metadata.ended_at == 1_700_000_005_000
    tags = episode.metadata.tags
    assert (tags["agent"], tags["model"], tags["trace_id"], tags["span_id"]) == ("cook", "m-1", TRACE, f"{1:016x}")


def test_sub_agents_are_linked_episodes_of_the_same_task(episodes):
    main, sub, again = episodes(
        span(1, agent("cook")),
        span(2, chat([USER], ASKED), 1),
        span(3, tool("find"), 1),
        span(4, agent("finder"), 3),
        span(5, chat([text("user", "find it")], text("assistant", "here")), 4),
        span(6, agent("finder"), 3),
        span(7, chat([text("user", "find it")], text("assistant", "there")), 6),
        span(8, chat([USER, ASKED, *TOLD], ANSWER), 1),
    )
    assert trained(main) == ["find", "On the shelf."]
    assert json.loads(main.metadata.tags["linked_spans"]) == [sub.metadata.tags["span_id"], again.metadata.tags["span_id"]]
    assert (trained(sub), trained(again)) == (["here"], ["there"])
    assert {one.metadata.tags["parent_span_id"] for one in (sub, again)} == {main.metadata.tags["span_id"]}
    assert {one.task_id for one in (main, sub, again)} == {main.task_id}, "they fall on one side of a split"
    assert (main.group_id, sub.group_id) == (main.task_id, f"{main.task_id}/finder"), "and are compared with their like only"


def test_a_model_called_by_a_tool_is_a_side_thread(episodes):
    main, side = episodes(
        span(1, agent("cook")),
        span(2, chat([USER], ASKED), 1),
        span(3, tool("find"), 1),
        span(4, chat([USER], text("assistant", "inside the tool")), 3),
    )
    assert (trained(main), trained(side)) == (["find"], ["inside the tool"])


def test_a_title_that_another_prompt_asked_for_is_no_turn_of_the_agent(episodes):
    title = chat([text("system", "Name this conversation."), USER], text("assistant", "Eggs"))
    main, side = episodes(
        span(1, agent("cook", **{"annotations.0.annotation.name": "success", "annotations.0.annotation.score": 1.0})),
        span(2, title, 1),
        span(3, chat([SYSTEM, USER], ASKED), 1),
        span(4, chat([SYSTEM, USER, ASKED, *TOLD], ANSWER), 1),
    )
    assert trained(main) == ["find", "On the shelf."]
    assert trained(side) == ["Eggs"]
    assert (main.outcome, side.outcome) == (Success(1.0), Unknown()), "what was said of the run is not said of the title"
    assert side.metadata.tags["span_id"] == f"{2:016x}"
    assert side.metadata.tags["parent_span_id"] == main.metadata.tags["span_id"]


def test_turns_that_no_call_answered_are_context(episodes):
    shown = [text("user", "1+1?"), text("assistant", "2")]
    (episode,) = episodes(span(1, chat([SYSTEM, *shown, USER], ASKED)), span(2, chat([SYSTEM, *shown, USER, ASKED, *TOLD], ANSWER)))
    assert trained(episode) == ["find", "On the shelf."]
    assert episode.metadata.tags["context_turns"] == "1"


def test_of_a_call_that_was_tried_again_the_last_answer_counts(episodes):
    (episode,) = episodes(
        span(1, {"gen_ai.operation.name": "chat", "gen_ai.input.messages": json.dumps([USER])}, status={"code": "STATUS_CODE_ERROR"}),
        span(2, chat([USER], text("assistant", "hm"))),
        span(3, chat([USER], ASKED)),
        span(4, chat([USER, ASKED, *TOLD], ANSWER)),
    )
    assert trained(episode) == ["find", "On the shelf."]
    assert (episode.records, episode.metadata.tags["failed_calls"]) == ((), "1")
    (episode,) = episodes(span(1, chat([USER], text("assistant", "hm"))), span(2, chat([USER], ANSWER)))
    assert trained(episode) == ["On the shelf."]


def test_where_history_was_rewritten_each_call_is_learned_by_itself(episodes):
    short = [SYSTEM, text("user", "Summary: the egg is asked for.")]
    (episode,) = episodes(span(1, chat([SYSTEM, USER], ASKED)), span(2, chat(short, ANSWER)))
    assert episode.metadata.tags["history"] == "rewritten"
    assert [record.timestamp_ms for record in episode.records] == [1_700_000_001_000, 1_700_000_002_000]
    samples = ConversationLearn().convert_group([episode.model_copy(update={"outcome": Success()})])
    own = [[message.content for message in sample.messages if message.is_agent and message.weight] for sample in samples]
    assert own == [[None], ["On the shelf."]]


def test_a_second_run_that_goes_on_with_the_history_is_the_same_conversation(episodes):
    more = text("user", "And the salt?")
    (episode,) = episodes(
        span(1, agent("cook")),
        span(2, chat([USER], ANSWER), 1),
        span(3, agent("cook")),
        span(4, chat([USER, ANSWER, more], text("assistant", "Too.")), 3),
    )
    assert trained(episode) == ["On the shelf.", "Too."]


def test_a_call_recorded_twice_one_within_the_other_is_one(episodes):
    (episode,) = episodes(span(1, chat([USER], ANSWER)), span(2, chat([USER], text("assistant", "another wording")), 1))
    assert trained(episode) == ["On the shelf."]


def test_a_history_that_begins_with_the_results_of_tools_goes_on_where_the_provider_kept_the_rest(episodes):
    (episode,) = episodes(span(1, agent("cook")), span(2, chat([SYSTEM, USER], ASKED), 1), span(3, chat(TOLD, ANSWER), 1))
    assert [message.role for message in episode.messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert trained(episode) == ["find", "On the shelf."]


def test_a_call_copied_from_another_run_is_context(episodes):
    copied = chat([USER], ASKED, **{"agentpile.step.is_copied_context": "true"})
    (episode,) = episodes(span(1, copied), span(2, chat([USER, ASKED, *TOLD], ANSWER)))
    assert trained(episode) == ["On the shelf."]


def test_the_agent_with_tools_is_the_main_one_among_equals(episodes):
    offered = {"gen_ai.tool.definitions": json.dumps([{"type": "function", "name": "find"}])}
    simulated = [chat([text("system", "You are a customer."), *told], text("assistant", "Egg?")) for told in ([], [ANSWER])]
    main, side = episodes(span(1, simulated[0]), span(2, chat([SYSTEM, USER], ANSWER, **offered)), span(3, simulated[1]))
    assert (main.messages[0].content, side.messages[0].content) == ("Cook.", "You are a customer.")


def test_a_picture_that_a_tool_showed_is_refused_by_name(episodes):
    shown = result("c1", [{"type": "image", "data": "AAAA"}])
    (refusal,) = episodes(span(1, chat([USER, calls(("c1", "look", {})), shown], ANSWER)))
    assert (refusal.reason, '"image"' in refusal.detail) == ("unsupported_content", True)


def test_what_the_model_thought_is_apart(episodes):
    said = {"role": "assistant", "parts": [{"type": "reasoning", "content": "I look."}, {"type": "text", "content": "Here."}]}
    (episode,) = episodes(span(1, chat([USER], said)))
    assert episode.messages[1].content == "Here."
    assert [message.reasoning for message in episode.messages] == [None, "I look."]


def test_tools_are_kept_in_the_shape_of_openai(episodes):
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
    flat = {"type": "function", "name": "find", "description": "Finds.", "parameters": schema}
    (episode,) = episodes(span(1, chat([USER], ANSWER, **{"gen_ai.tool.definitions": json.dumps([flat])})))
    (kept,) = episode.tools
    assert kept == {"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": schema}}
    assert list(kept["function"]["parameters"]["properties"]) == ["b", "a"]


def test_system_instructions_come_first_and_once(episodes):
    told = json.dumps([{"type": "text", "content": "Cook."}])
    apart, both = (chat(given, ANSWER, **{"gen_ai.system_instructions": told}) for given in ([USER], [SYSTEM, USER]))
    first = episodes(span(1, apart))[0].messages
    assert first == episodes(span(1, both))[0].messages
    assert [message.role for message in first] == ["system", "user", "assistant"]


def test_messages_of_before_1_37_are_events_of_the_span(episodes):
    asked = [{"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"a":  1}'}}]
    events = [
        ("gen_ai.system.message", {"content": "Cook."}),
        ("gen_ai.user.message", {"content": "Egg?"}),
        ("gen_ai.assistant.message", {"role": "assistant", "tool_calls": json.dumps(asked)}),
        ("gen_ai.tool.message", {"id": "c1", "content": "shelf"}),
        ("gen_ai.choice", {"index": 0, "finish_reason": "length", "message": json.dumps({"content": "On the"})}),
    ]
    first = span(
        1, {"gen_ai.operation.name": "chat"}, events=[*events[:2], ("gen_ai.choice", {"message": json.dumps({"tool_calls": asked})})]
    )
    (episode,) = episodes(first, span(2, {"gen_ai.operation.name": "chat"}, events=events))
    assert [message.content for message in episode.messages] == ["Cook.", "Egg?", None, "shelf", "On the"]
    assert episode.messages[2].tool_calls[0].function.arguments == '{"a":  1}'
    assert trained(episode) == ["find", "On the"]
    assert episode.metadata.tags["finish_reason"] == "length"


def test_messages_of_before_1_37_may_be_log_records(write):
    def log(name, body):
        return {"traceId": TRACE, "spanId": f"{1:016x}", "eventName": name, "body": any_value(body), "timeUnixNano": "5"}

    logs = {
        "resourceLogs": [
            {
                "scopeLogs": [
                    {
                        "logRecords": [
                            log("gen_ai.user.message", {"content": "Egg?"}),
                            log("gen_ai.choice", {"message": {"content": "Here."}}),
                        ]
                    }
                ]
            }
        ]
    }
    spans = request(span(1, {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m-1"}))
    for requests in ([logs, spans], [spans, logs], [logs]):
        (episode,) = read(write(lines(*requests)))
        assert [message.content for message in episode.messages] == ["Egg?", "Here."]


def test_openinference_lies_flat(episodes):
    flat = {
        "openinference.span.kind": "LLM",
        "llm.input_messages.10.message.role": "tool",
        "llm.input_messages.10.message.content": "second",
        "llm.input_messages.10.message.tool_call_id": "b",
        "llm.input_messages.9.message.role": "tool",
        "llm.input_messages.9.message.content": "first",
        "llm.input_messages.9.message.tool_call_id": "a",
        "llm.output_messages.0.message.role": "assistant",
        "llm.output_messages.0.message.content": "Done.",
        "llm.tools.0.tool.json_schema": '{"type": "function", "function": {"name": "find"}}',
    }
    for at in range(8):
        flat |= {
            f"llm.input_messages.{at}.message.role": ("user", "assistant")[at % 2],
            f"llm.input_messages.{at}.message.content": str(at),
        }
    flat["llm.input_messages.0.message.content"] = ""
    flat["llm.input_messages.0.message.contents.0.message_content.type"] = "text"
    flat["llm.input_messages.0.message.contents.0.message_content.text"] = "0"
    flat["llm.input_messages.8.message.role"] = "assistant"
    for at, name in enumerate("ab"):
        prefix = f"llm.input_messages.8.message.tool_calls.{at}.tool_call"
        flat |= {f"{prefix}.id": name, f"{prefix}.function.name": name, f"{prefix}.function.arguments": '{"x":  1}'}
    (episode,) = episodes(span(1, flat))
    assert [message.content for message in episode.messages] == [*"01234567", None, "first", "second", "Done."]
    assert [call.function.arguments for call in episode.messages[8].tool_calls] == ['{"x":  1}'] * 2
    assert (trained(episode), episode.metadata.tags["context_turns"]) == (["Done."], "5")
    assert episode.tools == ({"type": "function", "function": {"name": "find"}},)


def openinference(given, said):
    flat = {
        "openinference.span.kind": "LLM",
        "llm.output_messages.0.message.role": "assistant",
        "llm.output_messages.0.message.content": said,
    }
    for at, (role, content) in given.items():
        flat |= {f"llm.input_messages.{at}.message.role": role, f"llm.input_messages.{at}.message.content": content}
    return flat


def test_a_turn_left_out_of_a_history_is_filled_from_the_call_that_gave_it(episodes):
    (episode,) = episodes(
        span(1, openinference({0: ("user", "a")}, "b")), span(2, openinference({0: ("user", "a"), 2: ("user", "c")}, "d"))
    )
    assert [message.content for message in episode.messages] == ["a", "b", "c", "d"]
    (refusal,) = episodes(span(2, openinference({0: ("user", "a"), 2: ("user", "c")}, "d")))
    assert refusal.reason == "truncated_content"
    (refusal,) = episodes(span(2, openinference({0: ("user", "a"), 5: ("user", "c")}, "d")))
    assert refusal.reason == "truncated_content"


def test_attributes_that_the_exporter_dropped_are_told(episodes):
    (refusal,) = episodes(span(1, openinference({0: ("user", "a")}, "b"), droppedAttributesCount=3))
    assert (refusal.reason, "3 attributes" in refusal.detail) == ("truncated_content", True)


def test_openllmetry_is_read(episodes):
    flat = {
        "traceloop.span.kind": "",
        "llm.request.type": "chat",
        "gen_ai.prompt.0.role": "user",
        "gen_ai.prompt.0.content": "Egg?",
        "gen_ai.completion.0.role": "assistant",
        "gen_ai.completion.0.finish_reason": "tool_calls",
        "gen_ai.completion.0.tool_calls.0.id": "c1",
        "gen_ai.completion.0.tool_calls.0.name": "find",
        "gen_ai.completion.0.tool_calls.0.arguments": '{"a": 1}',
        "llm.request.functions.0.name": "find",
        "llm.request.functions.0.parameters": '{"type": "object"}',
    }
    (episode,) = episodes(span(1, flat))
    assert episode.messages[1].tool_calls[0].function.arguments == '{"a": 1}'
    assert episode.metadata.tags["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "hidden",
    [
        {},
        {"input.value": "__REDACTED__", "output.value": "__REDACTED__"},
        openinference({0: ("user", "__REDACTED__")}, "__REDACTED__"),
        chat([{"role": "user", "parts": [{"type": "text"}]}], ANSWER),
    ],
)
def test_a_trace_without_content_is_refused_plainly(episodes, hidden):
    (refusal,) = episodes(span(1, {"openinference.span.kind": "LLM", **hidden}), span(2, agent("cook")))
    assert refusal.reason == "no_content"
    assert "no content recorded (calls of a model: 1; the first is span" in refusal.detail
    assert "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=true" in refusal.detail


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ({"name": "reward", "score.value": 1.0}, Success(1.0)),
        ({"name": "Task Success", "score.label": "pass"}, Success(1.0)),
        ({"name": "correctness", "score.value": 0.8}, Failure("correctness 0.8")),
        ({"name": "correctness", "score.label": "incorrect"}, Failure("correctness incorrect")),
        ({"name": "reward", "score.value": 3.5}, Success(3.5)),
        ({"name": "correctness", "score.label": "who knows"}, Unknown()),
        ({"name": "toxicity", "score.value": 1.0}, Unknown()),
    ],
)
def test_an_evaluation_decides_where_its_name_means_success(episodes, said, outcome):
    event = ("gen_ai.evaluation.result", {f"gen_ai.evaluation.{key}": value for key, value in said.items()})
    (episode,) = episodes(span(1, agent("cook"), events=[event]), span(2, chat([USER], ANSWER), 1))
    assert episode.outcome == outcome
    assert f"score.{said['name']}" in episode.metadata.tags
    assert ("outcome_from" in episode.metadata.tags) == (not outcome.is_unknown)


def test_what_is_said_of_a_sub_agent_is_its_own_and_not_the_traces(episodes):
    def said(name, score):
        return {f"{name}.0.annotation.name": "correct", f"{name}.0.annotation.score": score}

    spans = [
        span(2, chat([USER], ASKED), 1),
        span(3, tool("find"), 1),
        span(4, agent("finder", **said("annotations", 1.0)), 3),
        span(5, chat([USER], ANSWER), 4),
    ]
    main, sub = episodes(span(1, agent("cook", **said("annotations", 0.5))), *spans)
    assert (main.outcome, sub.outcome) == (Failure("correct 0.5"), Success(1.0))
    main, sub = episodes(span(1, agent("cook", **said("trace.annotations", 0.25))), *spans)
    assert (main.outcome, sub.outcome) == (Failure("correct 0.25"), Success(1.0))


def test_a_run_that_ended_in_an_error_says_so_and_is_not_a_failure(episodes):
    broken = {"status": {"code": 2, "message": "connection lost"}}
    (episode,) = episodes(span(1, agent("cook"), **broken), span(2, chat([USER], ANSWER), 1))
    assert (episode.outcome, episode.metadata.tags["run_error"]) == (Unknown(), "connection lost")


def test_spans_come_in_any_order_over_any_lines_and_twice(episodes):
    made = [span(1, agent("cook")), span(2, chat([SYSTEM, USER], ASKED), 1), span(3, chat([SYSTEM, USER, ASKED, *TOLD], ANSWER), 1)]
    (expected,) = episodes(*made)
    other = span(1, chat([USER], ANSWER), trace="1" * 32)
    first, second = episodes(request(made[2]), request(other), request(made[0], made[1]), request(made[1]))
    assert first.metadata.tags["trace_id"] == "1" * 32, "it ended first"
    assert second.id == expected.id


def test_ids_may_be_base64_and_names_snake_case(write, episodes):
    (expected,) = episodes(span(1, agent("cook")), span(2, chat([USER], ANSWER), 1))
    made = json.dumps(request(span(1, agent("cook")), span(2, chat([USER], ANSWER), 1)))
    for number in (1, 2):
        made = made.replace(f'"{number:016x}"', json.dumps(base64.b64encode(bytes.fromhex(f"{number:016x}")).decode()))
    made = made.replace(f'"{TRACE}"', json.dumps(base64.b64encode(bytes.fromhex(TRACE)).decode()))
    for name, snake in {
        "resourceSpans": "resource_spans",
        "scopeSpans": "scope_spans",
        "parentSpanId": "parent_span_id",
        "stringValue": "string_value",
        "startTimeUnixNano": "start_time_unix_nano",
    }.items():
        made = made.replace(f'"{name}"', f'"{snake}"')
    path = write(made)
    assert OtlpImporter().detect(path, made)
    (episode,) = read(path)
    assert (episode.id, episode.metadata.started_at) == (expected.id, expected.metadata.started_at)


def test_a_parent_that_is_not_there_is_counted(episodes):
    (episode,) = episodes(span(2, chat([USER], ANSWER), 1))
    assert episode.metadata.tags["missing_parents"] == "1"


def test_one_id_for_two_spans_is_refused(episodes):
    (refusal,) = episodes(span(1, agent("cook")), span(1, chat([USER], ANSWER)))
    assert refusal.reason == "duplicate_spans"


def test_a_bad_trace_spoils_itself_only(episodes):
    bad = span(1, chat([USER], ANSWER), 1, trace="1" * 32)
    refusal, episode = episodes(span(1, chat([USER], ANSWER)), bad)[::-1]
    assert (refusal.reason, type(episode)) == ("cyclic_spans", Episode)
    assert "line 1, trace 1111" in refusal.detail


def test_long_traces_take_little_time_and_bottomless_ones_are_refused(episodes):
    started = time.monotonic()
    (refusal,) = episodes(*(span(n, chat([USER], ANSWER), n - 1) for n in range(1, 3000)))
    assert (refusal.reason, "nested deeper" in refusal.detail) == ("bad_shape", True)
    told = episodes(*(span(n, chat([text("system", str(n)), USER], ANSWER)) for n in range(1, 1500)))
    assert len(told) == 1499
    assert time.monotonic() - started < 5


def test_attempts_at_one_task_begin_with_the_same_prompt_or_name_it(episodes):
    first, second, other = episodes(
        *(
            request(span(1, chat([SYSTEM, asked], said), trace=str(n) * 32))
            for n, asked, said in ((1, USER, ANSWER), (2, USER, ASKED), (3, text("user", "?"), ANSWER))
        )
    )
    assert first.task_id == second.task_id == first.group_id != other.task_id
    (named,) = episodes(span(1, chat([USER], ANSWER, **{"task.id": "egg-1"})))
    assert (named.task_id, named.group_id) == ("egg-1", "egg-1")


def test_memory_holds_the_traces_that_have_begun_and_not_ended(write):
    long = text("user", "x" * 20_000)
    path = write(lines(*(request(span(1, chat([long], ANSWER), trace=f"{n:032x}")) for n in range(1, 201))))
    tracemalloc.start()
    try:
        assert sum(1 for _ in OtlpImporter().read(path)) == 200
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 4
    finally:
        tracemalloc.stop()


def test_real_traces_are_taken_over_whole(shared_data, store):
    path = shared_data / "otlp" / "tau_airline.jsonl"
    report = ingest_file(store, path)
    assert (report.format, report.read, report.stored) == ("otlp", 16, 16)
    episodes = store.query()
    assert Counter(episode.outcome.kind for episode in episodes) == {"success": 3, "failure": 13}
    assert all(episode.metadata.started_at is None for episode in episodes), "the converter made the times up"
    assert not any(episode.records or "context_turns" in episode.metadata.tags for episode in episodes)


def test_real_traces_say_what_their_atif_says(shared_data):
    episodes = {episode.metadata.tags["session"]: episode for episode in read(shared_data / "otlp" / "tau_airline.jsonl")}
    for path in sorted((shared_data / "atif" / "tau_airline").iterdir()):
        run = json.loads(path.read_text())
        said = []
        for step in run["steps"]:
            named = [(call["tool_call_id"], call["function_name"], call["arguments"]) for call in step.get("tool_calls") or []]
            said.append(({"agent": "assistant"}.get(step["source"], step["source"]), step["message"] or "", named))
            said += [("tool", answer["content"], []) for answer in (step.get("observation") or {}).get("results", [])]
        told = [
            (
                message.role,
                message.content or "",
                [(call.id, call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls],
            )
            for message in episodes[run["session_id"]].messages
        ]
        assert told == said[: len(told)]
        assert all(role != "assistant" for role, _, _ in said[len(told) :]), "what follows the last answer of the model is not in the spans"


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(["agents", "traces", "refused"]))
def test_broken_traces_are_refused_and_never_crash(tmp_path_factory, seed, name):
    source = Path(__file__).parents[1] / "fixtures" / "otlp" / f"{name}.jsonl"
    path = tmp_path_factory.mktemp("fuzz") / "x.jsonl"
    path.write_bytes(mutate(source.read_bytes(), seed))
    try:
        entries = list(OtlpImporter().read(path))
    except ImportFailed:
        return
    assert all(isinstance(entry, Episode | Refusal) for entry in entries)
