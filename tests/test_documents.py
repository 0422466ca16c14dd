"""The documents are true: reference pages are what the code says, snippets run, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import tiny

from loraloop.plugins import list_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_reference_pages_are_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for path, text in generate.pages().items():
        assert path.read_text() == text, f"{path.name} is out of date; run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_python_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.make_model("llama", tmp_path / "path" / "to" / "model")
    monkeypatch.chdir(tmp_path)
    [snippet] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(snippet.strip().splitlines()) <= 14
    exec(compile(snippet, "README.md", "exec"), {})
    assert "lora/adapters/lora-" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "lora")


def test_the_readme_is_one_page_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 75
    assert re.search(r"^make demo", text, re.MULTILINE)
    assert re.search(r"^make test", text, re.MULTILINE)
    assert "![" in text


def test_every_refusal_code_of_build_and_train_is_documented() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text()
    sources = [path for part in ("learn", "chat", "dataset") for path in (ROOT / "src/loraloop" / part).glob("*.py")]
    found = r'(?:reason=|(?:Fault|NoPair|LeftOut)\(|refuse\(\w+(?:\.\w+)?(?:\[0\])?, )"(\w+)"'
    codes = {code for path in sources for code in re.findall(found, path.read_text())}
    codes |= {code for path in sources for code in re.findall(r'\("((?:near_)?duplicate|cap_\w+)"', path.read_text())}
    assert len(codes) >= 32
    assert {code for code in codes if f"`{code}`" not in text} == set()


def test_every_format_tag_and_refusal_code_of_ingest_is_documented() -> None:
    text = (ROOT / "docs" / "formats.md").read_text()
    sources = [path.read_text() for path in (ROOT / "src/loraloop/importers").glob("*.py")]
    codes = {code for source in sources for code in re.findall(r'(?:EntryRefused\(|reason=)"(\w+)"', source)}
    tags = {
        "padded_keys_removed",
        "decoded_arguments",
        "invented_observations",
        "demonstration",
        "score_scale",
        "ignored_keys",
        "outcome_from",
        "copied_context",
        "custom_calls",
        "skipped_lines",
        "parent_session",
        "elided_history",
        "simulated_user_calls",
        "system_prompt",
        "parent_trajectory",
    }
    assert len(codes) >= 15
    assert {name for name in codes | tags | set(list_names("importers")) if f"`{name}`" not in text} == set()


def test_every_plugin_that_is_listed_loads() -> None:
    from loraloop.plugins import find

    names = ["conversation", "dependency_graph", "kto", "preference", "weighted", "worker_decision", "worker_task"]
    assert list_names("learn_models") == names
    assert list_names("importers") == [
        "alpaca",
        "anthropic",
        "atif",
        "claude-code",
        "codex",
        "inspect",
        "intercode",
        "langfuse",
        "langsmith",
        "mini-swe-agent",
        "mlflow",
        "openai",
        "openai-calls",
        "openhands",
        "otlp",
        "sharegpt",
        "swe-agent",
        "tau-bench",
        "tau2",
        "verifiers",
        "who-and-when",
    ]
    for kind in ("importers", "learn_models"):
        for name in list_names(kind):
            assert find(kind, name)() is not None
