from __future__ import annotations

import contextlib
import gc
import json
import shutil

import pytest

from loraloop.errors import ImportFailed, SettingsError
from loraloop.importers.ingest import BATCH_BYTES, HEAD_BYTES, detect, ingest_file, iter_files
from loraloop.plugins import find, list_names


def rows(n, bad=()):
    good = '{"messages": [{"role": "user", "content": "%d"}, {"role": "assistant", "content": "b"}]}'
    return "\n".join("broken" if number in bad else good % number for number in range(n))


def test_an_account_of_every_entry_is_given(store, fixtures):
    report = ingest_file(store, fixtures / "tau_bench" / "refused.json")
    assert report.to_json() == {
        "path": str(fixtures / "tau_bench" / "refused.json"),
        "format": "tau-bench",
        "read": 15,
        "stored": 0,
        "duplicates": 0,
        "relicensed": 0,
        "refused": {
            "bad_encoding": 1,
            "bad_reward": 3,
            "bad_shape": 6,
            "no_agent_turn": 1,
            "run_error": 2,
            "unanswered_tool_call": 1,
            "unpaired_tool_result": 1,
        },
        "scores": "",
    }
    assert list(report.refused) == sorted(report.refused)
    assert json.loads(report.model_dump_json())["refusals"][0]["reason"] == "run_error"


def test_a_second_ingest_from_any_path_stores_nothing(store, fixtures, tmp_path):
    path = fixtures / "openai" / "accepted.jsonl"
    assert ingest_file(store, path).stored == 6
    (tmp_path / "deep").mkdir()
    again = ingest_file(store, shutil.copy(path, tmp_path / "deep" / "other name.json"))
    assert (again.stored, again.duplicates) == (0, 6)
    assert store.count() == 6


def test_a_row_that_is_there_twice_is_stored_once(store, write):
    report = ingest_file(store, write(rows(2) + "\n" + rows(3)))
    assert (report.read, report.stored, report.duplicates) == (5, 3, 2)


def test_terms_that_are_given_later_are_a_label(store, write):
    path = write(rows(3))
    one, other = (ingest_file(store, path).stored, ingest_file(store, path, license_name="MIT"))
    assert (one, other.stored, other.duplicates, other.relicensed, store.count()) == (3, 0, 3, 3, 3)
    assert [dto.metadata.tags["license"] for dto in store.list_meta()] == ["MIT"] * 3
    assert [ingest_file(store, path, license_name=name).relicensed for name in ("MIT", None, "own", "own")] == [0, 0, 3, 0]
    labels = store.get_labels(store.list_meta()[0].id)
    assert [(label.license, label.source) for label in labels] == [(None, "recorded"), ("MIT", "ingest"), ("own", "ingest")]


def test_terms_that_entries_name_themselves_stay(store, write):
    row = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "license": "%s"}'
    files = [write(row % name, f"{name}.jsonl") for name in ("MIT", "BSD")]
    reports = [ingest_file(store, path, license_name="own") for path in files * 2]
    assert [(report.stored, report.relicensed) for report in reports] == [(1, 0), (0, 0), (0, 0), (0, 0)]
    assert store.list_meta()[0].metadata.tags["license"] == "MIT"


def test_batches_and_progress_cover_everything(store, write):
    steps = []
    report = ingest_file(store, write(rows(450, bad={0, 449})), on_progress=lambda *step: steps.append(step))
    assert steps == [(200, 450), (400, 450), (450, 450)]
    assert (report.stored, report.refused) == (448, {"bad_json": 2})
    assert store.count() == 448


@pytest.mark.parametrize("where", ["content", "arguments", "tools"])
def test_long_episodes_are_stored_a_few_at_a_time(store, write, where):
    steps = []

    def row(number):
        text = str(number) * (BATCH_BYTES // 2)
        call = {"id": "a", "function": {"name": "f", "arguments": text if where == "arguments" else "{}"}}
        agent = {"role": "assistant", "content": text if where == "content" else None, "tool_calls": [call]}
        tools = [{"type": "function", "function": {"name": "f", "description": text if where == "tools" else ""}}]
        return json.dumps({"messages": [{"role": "user", "content": "a"}, agent], "tools": tools})

    report = ingest_file(store, write("\n".join(map(row, range(3)))), on_progress=lambda *step: steps.append(step))
    assert (report.stored, steps) == (3, [(2, 3), (3, 3)])


def test_all_refusals_are_counted_and_the_first_kept(store, write):
    report = ingest_file(store, write(rows(300, bad=set(range(1, 300)))))
    assert report.refused == {"bad_json": 299}
    assert [refusal.detail.partition(": ")[0].partition(", ")[2] for refusal in report.refusals] == [f"line {n}" for n in range(2, 22)]


def test_an_empty_file_has_no_entries(store, write):
    report = ingest_file(store, write(""))
    assert (report.format, report.read) == ("openai", 0)


def test_the_format_can_be_said(store, write):
    assert ingest_file(store, write("not json"), format_name="openai").refused == {"bad_json": 1}
    with pytest.raises(SettingsError, match=r"no importer named 'tau_bench'; known: alpaca, .*openai, .*Did you mean tau-bench"):
        ingest_file(store, write("[]"), format_name="tau_bench")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", rows(1), "openai"),
        ("a.txt", f"broken\n{rows(1)}", "openai"),
        ("a.json", f"\ufeff[\n{rows(1)}]", "openai"),
        ("a.jsonl", '{"long": "' + "x" * HEAD_BYTES, None),
        ("a.json", '[{"task_id": 1, "reward": 0, "info": {"x": "' + "x" * HEAD_BYTES, "tau-bench"),
        ("a.json", '[{"traj": [{"content": "' + "ü" * HEAD_BYTES, "tau-bench"),
        ("a.json", '[{"traj": [{"content": " ' + "ü" * HEAD_BYTES, "tau-bench"),  # the head ends inside a character
        ("a.json", '{"task_id": 1, "reward": 0, "info": {}, "traj": []}', None),
        ("a.json", '{"messages": [], "trajectory_format": "mini-swe-agent-1", "info": {}}', "mini-swe-agent"),
        ("a.json", '[{"role": "user", "content": "messages"}]', None),
        ("a.json", "", None),
        ("a.jsonl", "", "openai"),
    ],
)
def test_the_format_is_told_from_the_beginning(write, name, content, expected):
    path = write(content, name)
    if expected:
        assert detect(path).name == expected
    else:
        with pytest.raises(ImportFailed, match="no known format fits"):
            detect(path)


def test_an_unknown_format_is_refused_with_all_known_ones(write):
    path = write(b"PK\x03\x04" + b"\x00" * 500, "log.bin")
    with pytest.raises(ImportFailed) as failed:
        detect(path)
    message = str(failed.value)
    assert str(path) in message
    assert r"starts with PK\x03\x04\x00" in message
    for name in list_names("importers"):
        assert f"  {name}: {find('importers', name).description}" in message
    assert len(message) < 4000


def test_files_that_cannot_be_opened_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(ImportFailed, match="cannot be opened"):
            detect(path)


def test_directories_are_searched_and_files_taken_as_given(tmp_path):
    for name in ("b.json", "a.jsonl", "sub/C.JSON", "notes.md", "sub/d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "dir.json").mkdir()
    assert iter_files([tmp_path]) == [tmp_path / name for name in ("a.jsonl", "b.json", "sub/C.JSON")]
    given = [tmp_path / "notes.md", tmp_path / "b.json", tmp_path]
    assert [path.name for path in iter_files(given)] == ["notes.md", "b.json", "a.jsonl", "C.JSON"]


def test_missing_paths_are_named_with_their_neighbours(tmp_path):
    (tmp_path / "airline.json").touch()
    with pytest.raises(ImportFailed, match=r"airlin\.json: not found; did you mean airline\.json\?"):
        iter_files([tmp_path / "airlin.json"])
    with pytest.raises(ImportFailed, match="look at what is in"):
        iter_files([tmp_path / "zzz"])
    with pytest.raises(ImportFailed, match="there is no directory"):
        iter_files([tmp_path / "no" / "x.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImportFailed, match=r"no file \*\.json or \*\.jsonl or \*\.traj or \*\.eval in it"):
        iter_files([tmp_path / "empty"])


def test_real_files_are_told_apart(shared_data):
    formats = {}
    for path in iter_files([shared_data]):
        try:
            formats[path.relative_to(shared_data).as_posix()] = detect(path).name
        except ImportFailed:
            continue
    by_format = {
        "alpaca": ["alpaca/fireact_hotpotqa.json"],
        "atif": [name for name in formats if name.startswith("atif/")],
        "claude-code": [name for name in formats if name.startswith("claude_code/")],
        "codex": ["codex/rollout-fixture.jsonl"],
        "inspect": [name for name in formats if name.startswith("inspect/")],
        "intercode": [name for name in formats if name.startswith("intercode/")],
        "langfuse": [name for name in formats if name.startswith("langfuse/") and name.endswith(".trace.json")],
        "mini-swe-agent": [name for name in formats if name.startswith("mini_swe_agent/")],
        "openai": ["openai_ft/fireact_hotpotqa.jsonl", "openai_ft/tau2_train_sft-v1-small.jsonl", "sharegpt/mllm_demo.json"],
        "openhands": [name for name in formats if name.startswith("openhands/")],
        "otlp": ["otlp/tau_airline.jsonl"],
        "sharegpt": ["sharegpt/glaive_toolcall_en_demo.json"],
        "swe-agent": [name for name in formats if name.startswith("swe_agent/")],
        "tau-bench": ["tau_bench/gpt-4o-airline.json"],
        "tau2": ["tau2/gpt-4.1_telecom_no-user_4trials_5tasks.json"],
        "verifiers": [name for name in formats if name.startswith("verifiers/")],
        "who-and-when": [name for name in formats if name.startswith("who_and_when/")],
    }
    assert {name: [path for path, found in formats.items() if found == name] for name in set(formats.values())} == by_format
    n_files = {
        "atif": 16,
        "claude-code": 3,
        "intercode": 4,
        "langfuse": 14,
        "mini-swe-agent": 2,
        "openhands": 5,
        "swe-agent": 22,
        "verifiers": 6,
        "who-and-when": 30,
    }
    assert {name: len(by_format[name]) for name in n_files} == n_files


@pytest.mark.parametrize("threshold", [(700, 10, 10), (90_000, 5, 5), (0, 10, 10)])
def test_cycles_are_looked_for_as_before_when_an_ingest_is_over(store, write, threshold):
    before, seen = gc.get_threshold(), []
    gc.set_threshold(*threshold)
    try:
        for path in (write(json.dumps({"messages": [{"role": "assistant", "content": "b"}]})), write("[1", "no.json")):
            with contextlib.suppress(ImportFailed):
                ingest_file(store, path, "openai", lambda *_: seen.append(gc.get_threshold()))
            assert gc.get_threshold() == threshold
    finally:
        gc.set_threshold(*before)
    assert seen[0][0] == (0 if threshold[0] == 0 else max(threshold[0], 50_000))
