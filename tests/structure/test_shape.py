"""Sizes, names and documents hold what they promise."""

import ast
import re
from pathlib import Path

import loraloop
from loraloop import errors

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "loraloop"
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc", "manager", "handler"}

PUBLIC = [
    "LoraTrainer",
    "LoraTrainerConfig",
    "LoraModelId",
    "TrainedModel",
    "TrainingMetrics",
    "LoraLoopError",
    "LoraTrainerError",
    "EmptyData",
    "ScriptNotFound",
    "ProcessFailed",
    "StoreError",
    "Episode",
    "EpisodeId",
    "EpisodeMetadata",
    "EpisodeFilter",
    "Outcome",
    "Success",
    "Failure",
    "Timeout",
    "Unknown",
    "EpisodeStore",
    "InMemoryEpisodeStore",
    "SqlEpisodeStore",
    "LearnModel",
    "WorkerTaskLearn",
    "WorkerDecisionSequenceLearn",
    "DependencyGraphLearn",
    "ConversationLearn",
    "PreferenceLearn",
    "KtoLearn",
    "WeightedLearn",
    "TrainingData",
    "Conversation",
    "ConversationRole",
]


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_public_names_are_these_and_sorted() -> None:
    assert loraloop.__all__ == sorted(PUBLIC)
    assert dir(loraloop) == sorted(PUBLIC), "completion offers what is imported on first use too"
    for name in PUBLIC:
        assert getattr(loraloop, name) is not None


def test_files_and_functions_are_short() -> None:
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
        assert path.stem not in FORBIDDEN_NAMES, path
        for function in functions(path):
            first = function.body[0].lineno if path.parent.name == "cli" else function.lineno  # a command's parameters are options
            lines = (function.end_lineno or 0) - first + 1
            assert lines <= 60, f"{path.name}: {function.name} has {lines} lines"


def test_functions_take_few_positional_parameters() -> None:
    for path in SOURCE.rglob("*.py"):
        if path.parent.name == "cli":
            continue  # a command's parameters are options
        for function in functions(path):
            names = [argument.arg for argument in function.args.posonlyargs + function.args.args if argument.arg not in {"self", "cls"}]
            limit = 6 if function.name.startswith("_") else 5
            assert len(names) <= limit, f"{path.name}: {function.name}({', '.join(names)})"


def test_every_module_says_what_it_is() -> None:
    for path in SOURCE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_error_tree_is_drawn_as_it_is() -> None:
    drawn = re.findall(
        r"(\w+)(?: \((\w+)\))?", "\n".join(re.findall(r"^\s*[│ ]*[├└]── .*$|^    LoraLoopError$", errors.__doc__ or "", re.MULTILINE))
    )
    names = {name for name, _ in drawn if name[:1].isupper() and hasattr(errors, name)}
    real = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.LoraLoopError)}
    assert names == real
    assert len(real) <= 20


def test_no_machine_path_or_unfinished_mark_is_in_the_source() -> None:
    pattern = re.compile("TO" + "DO|FIX" + "ME|XX" + "X|/wo" + "rk/|/ro" + "ot/")
    for path in [*SOURCE.rglob("*.py"), *(ROOT / "demo").glob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]:
        assert not pattern.search(path.read_text()), path


def test_the_tested_versions_fit_the_ranges() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    lower = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(lower[requirement.name.lower().replace("_", "-")]), requirement
    assert pinned["torch"] == "2.13.0"
