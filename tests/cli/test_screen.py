"""What the commands show: recorded text as it is, whatever events a script sends, and a next command that can be typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraloop.cli.screen import DEFAULT_PROJECT, TrainingScreen, show_next, show_table, write_text
from loraloop.training_record import TrainingEvent


@pytest.mark.parametrize("text", ["[/red]", "[bold]big[/bold]", "runs[1].jsonl", "a [link=x]"])
def test_a_cell_shows_recorded_text_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_table("", ["task"], [[text]])
    assert text in capsys.readouterr().out


@pytest.mark.parametrize("text", ["\x1b[31mred", "\x07", "\x9b1m", "right\u202eleft", "\ud83d"])
def test_what_a_terminal_would_act_on_is_a_sign_in_cells_and_in_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_table("", ["task"], [[f"a{text}b"]])
    write_text(f"a{text}b\nc")
    shown = capsys.readouterr().out
    assert text not in shown
    assert shown.endswith("b\nc\n")


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        ({"step": 5, "steps": 10}, "step 5/10\n"),
        ({"step": 5, "steps": 10, "loss": 1.5}, "step 5/10  loss 1.5000\n"),
        ({"step": 5, "steps": 10, "loss": 1.5, "tokens_per_s": 80, "eta_s": 3}, "step 5/10  loss 1.5000  80 tokens/s  3 s left\n"),
        ({"step": 1, "steps": 0}, "step 1/0\n"),
    ],
)
def test_a_step_is_shown_with_as_much_as_the_script_tells(event: dict[str, float], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingScreen() as screen:
        screen.show(TrainingEvent.model_validate({"event": "step", **event}))
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize(
    ("project", "variable", "named"),
    [
        (DEFAULT_PROJECT, None, ""),
        (Path("other"), None, " --project other"),
        (Path("my runs"), None, " --project 'my runs'"),
        (Path("other"), "other", ""),
        (Path("third"), "other", " --project third"),
        (DEFAULT_PROJECT, "other", f" --project {DEFAULT_PROJECT}"),
    ],
)
def test_the_next_command_is_for_the_same_project(
    project: Path, variable: str | None, named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORALOOP_PROJECT", raising=False)
    if variable is not None:
        monkeypatch.setenv("LORALOOP_PROJECT", variable)
    show_next("loraloop build", project)
    assert capsys.readouterr().err == f"Next: loraloop build{named}\n"
