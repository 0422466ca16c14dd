"""What a SWE-bench evaluation said of a run: its `results.json` lies beside the run's file, or one folder above.

The evaluation lists instances by how they fared. One that it does not list, or whose own machinery failed, stays Unknown.
"""

from __future__ import annotations

import re
from pathlib import Path

from loraloop.episode import AnyOutcome, Failure, Success, Unknown
from loraloop.errors import ImportFailed
from loraloop.importers.json_input import load_document

RESULTS_FILE = "results.json"

_INSTANCE = re.compile(r"(?:^|__)((?:(?!__)[\w.-])+__(?:(?!__)[\w.-])+-\d+)$")
"""`owner__repo-123`, the name of a SWE-bench instance, at the end of a file name that may say more before it."""
_RESOLVED = ("resolved", "resolved_ids")
_EMPTY = ("no_generation", "empty_patch_ids")
_TRIED = ("with_logs", "applied", "no_apply", "unresolved_ids")


def find_instance(stem: str) -> str | None:
    """The SWE-bench instance that a file's name, without its suffix, ends with; None when it ends with none."""
    found = _INSTANCE.search(stem)
    return found[1] if found else None


def find_verdict(path: Path, names: set[str]) -> AnyOutcome:
    """What the evaluation near the file `path` said of the instance, which it may call by any of `names`."""
    for folder in (path.parent, path.parent.parent):
        if not (folder / RESULTS_FILE).is_file():
            continue
        try:
            results = load_document(folder / RESULTS_FILE)
        except ImportFailed:
            continue
        if isinstance(results, dict) and any(key in results for key in _RESOLVED):
            return _outcome_in(results, names)
    return Unknown()


def _outcome_in(results: dict[str, object], names: set[str]) -> AnyOutcome:
    if _is_named(results, _RESOLVED, names):
        return Success(1.0)
    if _is_named(results, _EMPTY, names):
        return Failure("no_generation")
    return Failure("not resolved") if _is_named(results, _TRIED, names) else Unknown()


def _is_named(results: dict[str, object], keys: tuple[str, ...], names: set[str]) -> bool:
    lists = [results[key] for key in keys if isinstance(results.get(key), list)]
    return any(name in names for listed in lists if isinstance(listed, list) for name in listed if isinstance(name, str))
