"""LangSmith run exports: JSON Lines or a list of runs, {runs: [...]}, or runs with their `child_runs` inside.

A run is a span: `llm` the call of a model, `tool` a tool's; runs of one `trace_id` are one trace, wherever in the file they are.
Messages are taken in the shape that LangChain serialises them, or as a provider's own request and response. Feedback decides the outcome
where its key means success, whether it stands in the run (`feedback_stats`, `feedback`) or as rows {run_id, key, score} of the same
file; a `correction` is what somebody else would have said and is not stored. `reference_example_id` is the task.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from loraloop.chat.refused_entry import EntryRefused, show
from loraloop.episode import Episode
from loraloop.importers.entry import require_clean
from loraloop.importers.json_input import opening_keys
from loraloop.importers.model_io import ModelCall, as_finish, read_request, read_response, to_tools
from loraloop.importers.span_tree import Score, Span, SpanKind, Trace, try_call
from loraloop.importers.trace_episodes import convert_traces
from loraloop.importers.trace_files import Gathered, gather, to_ms
from loraloop.training_data import Refusal

Run = dict[str, object]

CAPTURE_ADVICE = "unset LANGSMITH_HIDE_INPUTS and LANGSMITH_HIDE_OUTPUTS, export runs with inputs and outputs, and record them anew"
_KINDS: dict[object, SpanKind] = {"llm": "model", "chat_model": "model", "tool": "tool"}
_SESSION_KEYS = ("thread_id", "session_id", "conversation_id")
_EXAMPLE = "a run, {id, trace_id, run_type, inputs, outputs}"


class LangSmithImporter:
    """Reads LangSmith runs. Attempts at one task have the same reference example, else begin with the same prompt."""

    name: ClassVar[str] = "langsmith"
    description: ClassVar[str] = 'LangSmith run export: JSON Lines or a list of {"id", "trace_id", "run_type", "inputs", "outputs"}'

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True for objects with `run_type`, or {runs: [...]} that holds some."""
        return any("run_type" in keys or ("runs" in keys and '"run_type"' in head) for keys in opening_keys(head))

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """None: a trace is many runs."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """The episodes of each trace, in the order in which traces end. Raises ImportFailed for a file that is no JSON."""
        return convert_traces(path, self.name, map(_to_trace, gather(path, _iter_runs, _trace_ids)), CAPTURE_ADVICE)


def _iter_runs(value: object) -> Iterator[tuple[str, Run | EntryRefused]]:
    for run in _flat(value):
        trace_id = _trace_id(run)
        if trace_id is None or not ("run_type" in run or "key" in run):
            advice = "export it again with these fields"
            yield "", EntryRefused("bad_shape", f"keys {show(sorted(map(str, run)))}", _EXAMPLE, advice)
        else:
            yield trace_id, run


def _trace_ids(value: object) -> Iterator[str]:
    try:
        yield from (found for run in _flat(value) if (found := _trace_id(run)) is not None)
    except EntryRefused:
        return


def _flat(value: object) -> Iterator[Run]:
    """The run, those in `runs`, and all children inside, each before its children."""
    waiting = [value]
    while waiting:
        run = waiting.pop()
        if not isinstance(run, dict):
            raise EntryRefused("bad_shape", show(run), _EXAMPLE, "export the runs again, or leave it out")
        listed = run.get("runs")
        if isinstance(listed, list) and "run_type" not in run:
            waiting += reversed(listed)
            continue
        children = run.get("child_runs")
        if isinstance(children, list):
            trace_id = _trace_id(run)
            above = {"trace_id": trace_id, "parent_run_id": _run_id(run)}
            waiting += reversed([{**above, **_said(child)} if isinstance(child, dict) else child for child in children])
        yield run


def _said(run: Run) -> Run:
    return {key: part for key, part in run.items() if part is not None}


def _run_id(run: Run) -> str | None:
    found = run.get("id", run.get("run_id"))
    return found if isinstance(found, str) and found else None


def _trace_id(run: Run) -> str | None:
    """The trace; of a run that names none, the first run of `dotted_order`, else, when it has no parent, the run itself."""
    named = run.get("trace_id")
    if isinstance(named, str) and named:
        return named
    if "run_type" not in run and "key" in run:
        return _text(run, "run_id")
    path = _dotted(run)
    return path[0] if path else None if run.get("parent_run_id") else _run_id(run)


def _dotted(run: Run) -> list[str]:
    """The ids from the first run down to this one: each part of `dotted_order` is a time that ends in Z, and an id."""
    order = run.get("dotted_order")
    return [part.partition("Z")[2] for part in order.split(".")] if isinstance(order, str) and "Z" in order else []


def _to_trace(gathered: Gathered[Run]) -> Trace:
    place = f"{gathered.place}, trace {show(gathered.id)}" if gathered.id else gathered.place
    trace = Trace(gathered.id, place, problem=gathered.problem)
    rows = [run for run in gathered.parts if "run_type" not in run]
    try:
        require_clean(gathered.id)
        _require_runs(gathered.parts, rows)
        for order, run in enumerate(run for run in gathered.parts if "run_type" in run):
            _add_run(trace, run, rows, order)
    except EntryRefused as error:
        trace.problem = trace.problem or error
    known = {span.id for span in trace.spans}
    trace.scores += [_score(row) for row in rows if _text(row, "run_id") not in known]
    return trace


def _require_runs(parts: list[Run], rows: list[Run]) -> None:
    if rows and len(rows) == len(parts):
        found = f"feedback on run {show(rows[0].get('run_id'))} alone"
        raise EntryRefused("bad_shape", found, "the run in the same file", "export runs and feedback together, each with its trace_id")


def _add_run(trace: Trace, run: Run, rows: list[Run], order: int) -> None:
    trace.spans.append(_to_span(run, rows, order))
    trace.task_id = trace.task_id or _text(run, "reference_example_id")
    metadata = _metadata(run)
    tags: dict[str, object] = {
        "project": _text(run, "session_name") or _text(run, "session_id"),
        "session": next((found for key in _SESSION_KEYS if (found := _text(metadata, key))), None),
    }
    trace.tags = tags | {key: part for key, part in trace.tags.items() if part}


def _to_span(run: Run, rows: list[Run], order: int) -> Span:
    run_id = _run_id(run)
    if run_id is None:
        raise EntryRefused("bad_shape", f"a run with id {show(run.get('id'))}", "an id", "export it again with its id")
    require_clean([run_id, run.get("name"), run.get("error")])
    kind = _KINDS.get(run.get("run_type") if isinstance(run.get("run_type"), str) else None, "other")
    call, problem = try_call(lambda: _to_call(run, f"run {show(run_id)}")) if kind == "model" else (None, None)
    error, path = run.get("error"), _dotted(run)
    parent = _text(run, "parent_run_id") or (path[-2] if len(path) > 1 else None)
    return Span(
        id=run_id,
        parent=parent,
        name=_text(run, "name") or "",
        kind=kind,
        start_ms=to_ms(run.get("start_time")),
        end_ms=to_ms(run.get("end_time")),
        error=(error if isinstance(error, str) else show(error)) if error else None,
        agent=_text(_metadata(run), "lc_agent_name"),
        call=call,
        problem=problem,
        scores=[*_own_scores(run), *(_score(row) for row in rows if row.get("run_id") == run_id)],
        order=order,
    )


def _to_call(run: Run, place: str) -> ModelCall:
    _require_messages(run, place)
    messages, tools = read_request(run.get("inputs"), f"{place}, inputs")
    response, finish = read_response(run.get("outputs"), f"{place}, outputs") if run.get("error") is None else (None, None)
    extra = run.get("extra")
    settings = extra.get("invocation_params") if isinstance(extra, dict) else None
    asked: Run = settings if isinstance(settings, dict) else {}
    given = run.get("inputs")
    settings_of_all: list[Run] = [asked, given if isinstance(given, dict) else {}]
    named = [_text(one, key) for one in settings_of_all for key in ("model", "model_name")]
    model = _text(_metadata(run), "ls_model_name") or next(filter(None, named), None)
    offered = to_tools(asked.get("tools") or asked.get("functions")) or tools
    return ModelCall(messages, response, offered, model, as_finish(finish))


def _require_messages(run: Run, place: str) -> None:
    """Refuse a chat that a tracer wrote down as one text, `System: …` and `Human: …`: nobody can tell where its turns begin."""
    given, said = run.get("inputs"), run.get("outputs")
    listed = said.get("generations") if isinstance(said, dict) else None
    first = listed[0] if isinstance(listed, list) and listed else None
    is_chat = isinstance(first, list) and any(isinstance(one, dict) and one.get("message") for one in first)
    if is_chat and isinstance(given, dict) and "prompts" in given:
        found = f"{place}: the prompt of a chat as one text, {show(given['prompts'])}"
        raise EntryRefused("bad_shape", found, "the messages that the model was given", "trace with LangChainTracer, which keeps them")


def _own_scores(run: Run) -> Iterator[Score]:
    given = run.get("feedback")
    for row in given if isinstance(given, list) else []:
        if isinstance(row, dict) and isinstance(row.get("key"), str):
            yield _score(row)
    summed = run.get("feedback_stats")
    for key, stats in summed.items() if isinstance(summed, dict) else []:
        if isinstance(stats, dict) and stats.get("avg") is not None:
            yield Score(str(key), stats["avg"])


def _score(row: Run) -> Score:
    value, label = row.get("score"), row.get("value")
    return Score(str(row.get("key")), value, label if isinstance(label, str) else None, to_ms(row.get("created_at")))


def _metadata(run: Run) -> Run:
    extra = run.get("extra")
    found = extra.get("metadata") if isinstance(extra, dict) else run.get("metadata")
    return found if isinstance(found, dict) else {}


def _text(row: Run, key: str) -> str | None:
    value = row.get(key)
    return value if isinstance(value, str) and value else None
