"""Outcomes that were recorded elsewhere, joined to the episodes that they are about.

Read are CSV with a header, JSON Lines, a JSON list of objects or an object of names and verdicts, SWE-agent's and SWE-bench's lists of
resolved instances, and Harbor's `result.json` (one, or a job's folder of them). Every verdict is joined, known, unmatched, ambiguous or
refused; nothing is guessed: of several attempts at one task none gets a verdict that names the task only.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, JsonValue

from loraloop.episode import EpisodeDto, EpisodeFilter, Failure, Frozen, Label, Outcome, Success, Timeout
from loraloop.errors import ImportFailed
from loraloop.files import read_jsonl
from loraloop.plugins import EpisodeStore

MAX_SHOWN = 20
"""How many verdicts that were not joined a report names; all are counted."""
PAGE_EPISODES = 5_000
ID_KEYS = ("episode_id", "id")
TASK_KEYS = ("task_id", "instance_id", "task", "task_name")
NAME_KEYS = (*ID_KEYS, "trial_name", "name", *TASK_KEYS)
"""Where a row says what it is about, in the order they are tried: ids of episodes, then either, then tasks."""
VERDICT_KEYS = ("outcome", "success", "resolved", "passed", "solved", "correct", "score", "reward", "label")
"""Where it says how that ended."""
WORDS: Mapping[str, Outcome] = {
    **dict.fromkeys(("success", "true", "yes", "pass", "passed", "resolved", "solved", "correct", "c"), Success(1.0)),
    **dict.fromkeys(("failure", "false", "no", "fail", "failed", "unresolved", "unsolved", "incorrect", "i", "n"), Failure()),
    "p": Success(0.5),
    "timeout": Timeout(),
}
"""What words and letters (Inspect's C, I, P and N) mean, in any case."""
_SWE_LISTS: Mapping[str, Outcome | None] = {
    "resolved": Success(1.0),
    "resolved_ids": Success(1.0),
    "unresolved_ids": Failure("unresolved"),
    "empty_patch_ids": Failure("empty patch"),
    "no_generation": Failure("no patch"),
    "error_ids": None,
    "no_logs": None,
    "incomplete_ids": None,
    "generated": Failure("unresolved"),
}
"""SWE-agent's and SWE-bench's lists of instances; None where it was not found out how they ended. The first that has one counts."""


@dataclass(frozen=True)
class Verdict:
    """One outcome, and what it is about."""

    place: str
    names: Mapping[str, str]
    """By the key that had it, an empty one for a bare name; the first that is any episode's decides."""
    outcome: Outcome | None
    """None where there is none to join."""
    why: str = ""
    """Then why."""


class LabelReport(Frozen):
    """What became of the verdicts: `read` = `joined` + `known` + `unmatched` + `ambiguous` + the sum of `refused`."""

    path: str
    read: int = 0
    joined: int = 0
    known: int = 0
    """Those that the same source had said of the episode before, and nobody anything since."""
    unmatched: int = 0
    ambiguous: int = 0
    refused: dict[str, int] = Field(default_factory=dict)
    """Counts by reason."""
    details: tuple[str, ...] = ()
    """The first of those that were not joined, with place and advice."""

    def to_json(self) -> dict[str, JsonValue]:
        """The counts, for `--json`."""
        return self.model_dump(mode="json", exclude={"details"})


def label_from(store: EpisodeStore, path: Path, key: str | None = None) -> LabelReport:
    """Add a label for every verdict in `path` that is about exactly one episode.

    A verdict's name is an episode's id or task id; with `key`, `id`, `task_id` or a tag's name, it is that alone. Raises ImportFailed
    when `path` cannot be read as verdicts at all.
    """
    by_tag = None if key in (None, "task_id", *ID_KEYS) else _index(_iter_meta(store), str(key))
    counts, refused = Counter[str](), Counter[str]()
    labels: list[Label] = []
    details: list[str] = []
    for verdict in read_verdicts(path):
        if verdict.outcome is None:
            refused[verdict.why.partition(":")[0]] += 1
            details.append(f"{verdict.place}: {verdict.why}")
            continue
        found = _find(store, verdict.names, key, by_tag)
        if len(found) == 1:
            label = Label(episode_id=found[0], outcome=verdict.outcome, source=str(path))
            last = next(said for said in reversed(store.get_labels(found[0])) if said.license is None)
            is_known = (last.outcome, last.source) == (label.outcome, label.source)
            counts["known" if is_known else "joined"] += 1
            labels += [] if is_known else [label]
            continue
        counts["ambiguous" if found else "unmatched"] += 1
        named = " or ".join(map(repr, dict.fromkeys(verdict.names.values())))
        advice = "say --key with what tells them apart" if found else "say --key with the tag that has this name, or ingest it first"
        details.append(f"{verdict.place}: {named} is {'more than one episode' if found else 'no episode'} of the store; {advice}")
    store.add_labels(labels)
    read = sum(counts.values()) + refused.total()
    return LabelReport(path=str(path), read=read, **counts, refused=dict(sorted(refused.items())), details=tuple(details[:MAX_SHOWN]))


def read_verdicts(path: Path) -> Iterator[Verdict]:
    """Every verdict in a file or a job's folder, in order. Raises ImportFailed when it has none of the forms."""
    if path.is_dir():
        files = sorted(path.rglob("result.json"))
        trials = [(file, value) for file in files if isinstance(value := _read_json(file), dict) and "trial_name" in value]
        if not trials:
            raise ImportFailed(f"{path}: no result.json of a Harbor trial in it or below; name a file with verdicts")
        yield from (_harbor(str(file), value) for file, value in trials)
    elif path.suffix.lower() == ".csv":
        for number, row in enumerate(csv.DictReader(io.StringIO(_read_text(path))), 2):
            yield _row(f"{path}, line {number}", row)
    elif path.suffix.lower() in (".jsonl", ".ndjson"):
        try:
            for number, row in enumerate(read_jsonl(path), 1):
                yield _row(f"{path}, entry {number}", row)
        except (OSError, ValueError) as error:
            raise ImportFailed(f"{path}: cannot be read as JSON Lines ({error}); what came before it was not stored either") from error
    else:
        yield from _iter_json(path, _read_json(path))


def _iter_json(path: Path, value: object) -> Iterator[Verdict]:
    if isinstance(value, list):
        yield from (_row(f"{path}, entry {number}", row) for number, row in enumerate(value, 1))
    elif isinstance(value, dict) and ("trial_name" in value or "verifier_result" in value):
        yield _harbor(str(path), value)
    elif isinstance(value, dict) and any(isinstance(value.get(name), list) for name in ("resolved", "resolved_ids")):
        yield from _swe(str(path), value)
    elif isinstance(value, dict) and value and not any(isinstance(each, dict | list) for each in value.values()):
        yield from (_judge(f"{path}, {name!r}", {"": str(name)}, each, "") for name, each in value.items())
    else:
        raise ImportFailed(
            f"{path}: has none of the forms that verdicts come in; expected a list of objects with {NAME_KEYS[0]} or {NAME_KEYS[2]} and "
            f"{VERDICT_KEYS[0]} or score, an object of names and verdicts, resolved_ids of SWE-bench, or a Harbor result.json"
        )


def _row(place: str, row: object) -> Verdict:
    if not isinstance(row, dict):
        return Verdict(place, {}, None, f"not_an_object: found {type(row).__name__}; expected a name and a verdict")
    if "verifier_result" in row:
        return _harbor(place, row)
    names = {str(key): str(value) for key, value in row.items() if isinstance(value, str | int) and value != "" and key not in VERDICT_KEYS}
    names = {key: names[key] for key in (*NAME_KEYS, *names) if key in names}
    if not names:
        return Verdict(place, {}, None, f"no_name: it has none of {', '.join(NAME_KEYS)}; add one")
    for key in VERDICT_KEYS:
        if row.get(key) not in (None, ""):
            return _judge(place, names, row[key], str(row.get("reason") or ""))
    return Verdict(place, names, None, f"no_verdict: it has none of {', '.join(VERDICT_KEYS)}; add one")


def _judge(place: str, names: Mapping[str, str], said: object, reason: str) -> Verdict:
    """A number above 0 is a success with that score, any other a failure."""
    outcome: Outcome | None = None
    if isinstance(said, str):
        outcome = WORDS.get(said.strip().lower())
        try:
            said = float(said) if outcome is None else said
        except ValueError:
            return Verdict(place, names, None, f"unknown_verdict: found {said!r}; expected a number, or one of {', '.join(WORDS)}")
    if isinstance(said, bool | int | float):
        if not math.isfinite(said):
            return Verdict(place, names, None, f"unknown_verdict: found {said}; expected a finite number")
        outcome = Success(float(said)) if said > 0 else Failure("" if isinstance(said, bool) else f"score {said:g}")
    if outcome is None:
        return Verdict(place, names, None, f"unknown_verdict: found {type(said).__name__}; expected a number, true or false, or a word")
    return Verdict(place, names, Failure(reason) if reason and outcome.is_failure else outcome)


def _swe(place: str, lists: Mapping[str, object]) -> Iterator[Verdict]:
    seen: set[str] = set()
    for name, outcome in _SWE_LISTS.items():
        found = lists.get(name)
        for instance in map(str, found if isinstance(found, list) else []):
            if instance not in seen:
                seen.add(instance)
                yield Verdict(
                    f"{place}, {name}", {"": instance}, outcome, f"no_verdict: {instance} is in {name}: nobody found out how it ended"
                )


def _harbor(place: str, result: Mapping[str, object]) -> Verdict:
    """A reward counts unless an exception made it invalid; of one that ran out of time it is how far it had come."""
    names = {key: str(result[key]) for key in ("trial_name", "task_name") if result.get(key)}
    exception, verified = result.get("exception_info"), result.get("verifier_result")
    kind = str(exception.get("exception_type") or "an exception") if isinstance(exception, dict) else None
    rewards = verified.get("rewards") if isinstance(verified, dict) else None
    score = _one_reward(rewards)
    if kind == "AgentTimeoutError":
        return Verdict(place, names, Timeout(score))
    if kind is not None:
        return Verdict(place, names, None, f"exception: the trial ended by {kind}, so its reward does not count; run it again")
    if score is None:
        found = sorted(rewards) if isinstance(rewards, dict) else "none"
        return Verdict(place, names, None, f"no_verdict: expected one reward, or one named reward; found {found}")
    return _judge(place, names, score, "")


def _one_reward(rewards: object) -> float | None:
    if not isinstance(rewards, dict):
        return None
    value = rewards.get("reward") if "reward" in rewards else next(iter(rewards.values())) if len(rewards) == 1 else None
    return float(value) if isinstance(value, bool | int | float) and math.isfinite(value) else None


def _find(store: EpisodeStore, names: Mapping[str, str], key: str | None, by_tag: Mapping[str, list[str]] | None) -> list[str]:
    """The ids of the episodes that the first of `names` which is known is of; of a task's two at most."""
    tried = (
        {key: names[key]}
        if key is not None and key in names
        else {where: name for where, name in names.items() if where in ("", *NAME_KEYS)}
    )
    for where, name in tried.items():
        if by_tag is not None:
            found = by_tag.get(name, [])
        else:
            may_be_id = key in ID_KEYS or (key is None and where not in TASK_KEYS)
            may_be_task = key == "task_id" or (key is None and where not in ID_KEYS)
            found = [name] if may_be_id and store.find(name) else []
            if may_be_task and not found:
                found = [str(dto.id) for dto in store.list_meta(EpisodeFilter(task_id=name, limit=2))]
        if found:
            return found
    return []


def _index(metas: Iterable[EpisodeDto], key: str) -> dict[str, list[str]]:
    by_tag: dict[str, list[str]] = {}
    for dto in metas:
        if key in dto.metadata.tags:
            by_tag.setdefault(dto.metadata.tags[key], []).append(str(dto.id))
    return by_tag


def _iter_meta(store: EpisodeStore) -> Iterator[EpisodeDto]:
    offset = 0
    while page := store.list_meta(EpisodeFilter(offset=offset, limit=PAGE_EPISODES)):
        yield from page
        offset += len(page)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ImportFailed(f"{path}: cannot be read ({error}); give a file of UTF-8 text") from error


def _read_json(path: Path) -> object:
    try:
        value: object = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ImportFailed):
            raise
        raise ImportFailed(f"{path}: is not JSON ({error}); name it .jsonl or .csv if it is that") from error
    return value
