"""`loraloop build --base MODEL --show N --html FILE`: the report in the terminal and as a page."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import tiny
from test_commands import run

from loraloop.chat.template import ChatTemplate
from loraloop.cli.build import show_built
from loraloop.cli.report import check_report_options, show_findings
from loraloop.data_report.findings import ReportOptions, Subject, inspect
from loraloop.dataset import DatasetSettings, freeze, open_dataset
from loraloop.episode import EpisodeId, Failure, Message, Success
from loraloop.errors import SettingsError
from loraloop.learn.conversation import ConversationLearn
from loraloop.learn.preference import PreferenceLearn
from loraloop.pipeline import report
from loraloop.testing import make_episode
from loraloop.training_data import TrainingData

PLANTED = "AKIA" + "QYLPMN5HHHFPZAM2"
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}}
ALLOW = {"LORALOOP_UNKNOWN_LICENSE": "allow"}


def line(number: int, question: str) -> str:
    call = {"id": f"call{number}", "type": "function", "function": {"name": "look", "arguments": f'{{"box":{number}}}'}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": f"call{number}", "content": f"<script>ball {number}</script> \x1b[31m"},
        {"role": "assistant", "content": f"A ball, number {number}."},
    ]
    return json.dumps({"messages": turns, "tools": [TOOL]})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a project and a tiny base model; one of its episodes holds a key."""
    folder = tmp_path_factory.mktemp("place")
    words = ["red", "green", "blue", "old", "new", "tall", "wide", "far", "near", "deep"]
    lines = [line(number, f"What is in the {word} box on shelf {number}, please?") for number, word in enumerate(words)]
    (folder / "chats.jsonl").write_text("\n".join([*lines, line(99, f"My key is {PLANTED}, what is in it?")]) + "\n")
    tiny.make_model("llama", folder / "model")
    run("ingest", "chats.jsonl", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def shown(place: Path) -> subprocess.CompletedProcess[str]:
    """A build that shows every sample, with a page in page.html."""
    return run("build", "--base", "model", "--show", "20", "--html", "page.html", cwd=place, **ALLOW)


def test_samples_can_be_read_without_colour_with_author_and_weight(shown: subprocess.CompletedProcess[str]) -> None:
    done = shown
    assert "\x1b" not in done.stdout
    assert re.search(r"^assistant +w 1 ┃ <tool_call>.*</tool_call><\|im_end\|>$", done.stdout, re.MULTILINE)
    assert re.search(r"^tool +│ <script>ball \d</script> ␛\[31m$", done.stdout, re.MULTILINE)
    assert re.search(r"^system +│ Be brief\.", done.stdout, re.MULTILINE)
    assert len(re.findall(r"^Sample \d+, from ep-", done.stdout, re.MULTILINE)) > 5
    for told in ("stop token trained", "yes (", "tools in the prompt", "by the fallback", "not recorded, so not compared"):
        assert told in done.stdout
    assert "Next: loraloop train --base model" in done.stderr


def test_colour_says_who_wrote_what_where_the_terminal_has_it(place: Path) -> None:
    done = run("build", "--show", "1", cwd=place, **ALLOW, FORCE_COLOR="1", COLUMNS="120")
    assert "\x1b[1;32m" in done.stdout
    assert "\x1b[31m\n" not in done.stdout


def test_the_page_stands_beside_the_dataset_which_stays_as_it_is(place: Path) -> None:
    built = json.loads(run("build", "--base", "model", "--json", cwd=place, **ALLOW).stdout)
    page = Path(built["page"])
    assert page == Path(built["path"]).with_suffix(".html")
    html = (place / page).read_text()
    assert "&lt;script&gt;ball" in html
    assert "<script" not in html
    assert open_dataset(place / built["path"]).id == built["dataset"]
    assert built["report"]["data"]["n_supervised_tokens"] == sum(share["trained"] for share in built["report"]["shares"])
    assert "shown" not in built["report"]


def test_no_secret_is_in_what_is_shown(place: Path, shown: subprocess.CompletedProcess[str]) -> None:
    assert "secret_found" in shown.stdout
    for text in (shown.stdout, shown.stderr, (place / "page.html").read_text()):
        assert PLANTED not in text
        assert "ball 99" not in text


def test_data_that_a_training_would_stop_on_is_an_error_after_the_report(place: Path) -> None:
    done = run("build", "--base", "model", "--max-seq-length", "16", "--html", "stop.html", cwd=place, code=1, **ALLOW)
    assert "a training would stop on this data" in done.stderr
    assert "turn_too_long" in done.stderr
    assert "A training would stop at once" in (place / "stop.html").read_text()


@pytest.mark.parametrize(
    ("show", "max_seq_length", "long", "expected"),
    [(-1, 64, "window", "0 or more"), (None, 3, "window", "at least 16"), (3, 64, "cut", "window, elide, refuse")],
)
def test_options_out_of_range_are_refused(show: int | None, max_seq_length: int, long: str, expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        check_report_options(show, max_seq_length, long)


def test_a_reason_that_build_and_rendering_both_know_is_told_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    samples = tuple(TrainingData.sft_simple(f"q{weight}", "a").model_copy(update={"weight": weight}) for weight in (1.0, 0.0))
    subject = Subject(dataset="d0", method="sft", samples=samples, refused={"weight_zero": 7})
    show_findings(inspect(subject, ReportOptions(), ("tiny", ChatTemplate(tiny.make_tokenizer(tiny.CHATML)))))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "weight_zero" in line]
    assert [(row[1], row[5]) for row in rows] == [("build", "7"), ("rendering", "1")]


def test_names_of_tasks_are_shown_in_one_line_and_with_signs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tags = {"license": "own"}
    odd = make_episode(task_id="two\nlines \x1b[31mred", metadata={"tags": tags})
    show_built(freeze([odd], ConversationLearn(), tmp_path))
    assert "by task: /two lines ␛[31mred 1 (100%)" in capsys.readouterr().out


def test_a_directory_is_no_place_for_the_page_and_told_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"is a directory; .*report\.html"):
        check_report_options(None, 64, "window", tmp_path)


def test_samples_left_out_are_told_only_where_they_are_not_the_episodes_over_again(tmp_path: Path) -> None:
    own = {"tags": {"license": "own"}}
    twice = [make_episode(id=f"ep-{number}", metadata=own) for number in (1, 2)]
    found = report(freeze(twice, ConversationLearn(), tmp_path), tmp_path / "page.html")
    assert found.refused_by_build == {"duplicate": 1}
    attempts = [
        make_episode(id=f"ep-{name}", metadata=own, outcome=outcome, messages=[*make_episode().messages[:2], answer(name)])
        for name, outcome in (("good", Success()), ("bad", Failure()), ("worse", Failure()))
    ]
    attempts.append(attempts[0].model_copy(update={"id": EpisodeId("ep-fine"), "messages": (*attempts[0].messages[:2], answer("fine"))}))
    pairs = freeze(attempts, PreferenceLearn(allow_reuse=True), tmp_path, DatasetSettings(max_per_task=3))
    assert (pairs.manifest.samples, pairs.manifest.refused) == (3, {})
    assert report(pairs, tmp_path / "page.html").refused_by_build == {"cap_task (samples)": 1}


def answer(text: str) -> Message:
    return Message(role="assistant", content=text)
