"""The picture in the documents is the picture in the code: who may import whom, and what loads when."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "loraloop"

LAYERS = [
    {"errors", "ids", "files", "guard", "log_file", "lease", "episode", "training_data", "training_record", "svg"},
    {"plugins", "chat", "base_model"},
    {"store"},
    {"importers", "label", "learn", "dataset", "data_report", "lora", "train", "evaluate", "serve"},
    {"pipeline", "retention", "evaluation", "trigger", "serving", "judgement"},
    {"settings"},
    {"daemon"},
    {"project"},
    {"doctor"},
    {"cli"},
]
"""From the bottom up. A module imports from the layers below its own, and from its own part; the lowest layer also from itself."""
ANYWHERE = {"__init__", "__main__", "testing"}
DEFERRED = {
    "alembic",
    "detect_secrets",
    "torch",
    "transformers",
    "peft",
    "ray",
    "vllm",
    "matplotlib",
    "scipy",
    "huggingface_hub",
    "psutil",
    "starlette",
    "uvicorn",
    "httpx2",
    "xllamacpp",
}
"""What may be imported inside a function, besides our own modules in the command line."""
LATE = {"loraloop.train.run", "loraloop.train.dense", "loraloop.serve.service"}
"""Ours that stand on such a library from their first line."""


def part_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "loraloop" else [node.module or ""]
    return names


def level_of(part: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


def source_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    if part in ANYWHERE:
        return
    for name in imported_modules(ast.parse(path.read_text())):
        if not name.startswith("loraloop."):
            continue
        target = name.split(".")[1]
        if target == part or level_of(part) == level_of(target) == 0:
            continue
        if level_of(part) == level_of(target) == 1 and target in {"plugins", "chat", "base_model"}:
            continue
        assert level_of(target) < level_of(part), f"{part} imports {target}, which is not below it"


def test_every_module_has_a_layer() -> None:
    known = set().union(*LAYERS) | ANYWHERE
    assert {part_of(path) for path in source_files()} <= known


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_heavy_imports_are_deferred(path: Path) -> None:
    if part_of(path) in {"cli", "__init__"}:
        return  # a command imports what it needs when it runs, so that --help is quick
    tree = ast.parse(path.read_text())
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for name in imported_modules(function):
            root = name.split(".")[0]
            allowed = root in DEFERRED or root in sys.stdlib_module_names or name in LATE
            assert allowed, f"{function.name} imports {name} late"


@pytest.mark.parametrize("statement", ["import loraloop", "import loraloop.cli.main", "import loraloop.project"])
def test_heavy_libraries_are_not_loaded(statement: str) -> None:
    heavy = sorted(DEFERRED)
    code = f"{statement}; import sys; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_import_loraloop_loads_no_database_library() -> None:
    code = "import loraloop.cli.main, sys; print('sqlalchemy' in sys.modules); loraloop.SqlEpisodeStore; print('sqlalchemy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["False", "True"]
