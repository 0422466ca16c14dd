"""Which tasks are held out: whole clusters of near-equal tasks, and for good.

Two samples are on the same side when they have a task, a group, an episode or a first request of the user in common, or when their
requests or conversations are near-equal, directly or over others. Which side follows from a hash of the cluster's first key, so it is
the same in every new project. The ledger keeps what was once held out: it stays so in every later build, whatever its fraction,
method or filter, together with all that has joined its cluster since.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraloop.dataset.similar import Shingles, SimilarTexts, shingle, without_boilerplate
from loraloop.episode import Episode, LlmCallRecord, Message
from loraloop.errors import DatasetError
from loraloop.files import content_hash, locked_directory, write_json
from loraloop.training_data import TrainingData, is_held_out

LEDGER_FILE = "split.json"
TASK_SIMILARITY = 0.7
"""From here on two requests are one task: of 20 words one may differ. A constant, so that no setting can open a leak."""


class Clusters:
    """Keys that belong together, directly or over others."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, key: str) -> str:
        """The least key of the cluster of `key`: the same whatever the order in which it grew."""
        root = key
        while (parent := self._parent.setdefault(root, root)) != root:
            root = parent
        while self._parent[key] != root:  # shortens the way for the next
            self._parent[key], key = root, self._parent[key]
        return root

    def join(self, *keys: str) -> None:
        """Make one cluster of those of `keys`."""
        roots = sorted({self.find(key) for key in keys})
        for other in roots[1:]:
            self._parent[other] = roots[0]

    def members(self) -> dict[str, list[str]]:
        """Every key by the least of its cluster."""
        found: dict[str, list[str]] = {}
        for key in self._parent:
            found.setdefault(self.find(key), []).append(key)
        return found


@dataclass(frozen=True)
class TaskText:
    """What the split knows of an episode that may not be at hand any more: its keys and the user's first request."""

    task: str
    group: str | None
    request: str

    @classmethod
    def of(cls, episode: Episode) -> TaskText:
        """What `episode` says."""
        scenario = episode.metadata.scenario or ""
        group = None if episode.group_id is None else f"{scenario}/{episode.group_id}"
        task = f"{scenario}/{episode.task_id}" if episode.task_id is not None else group
        request = first_request(episode)
        return cls(task or request or str(episode.id), group, request)


@dataclass(frozen=True)
class Split:
    """Which samples are held out."""

    held_out: list[bool]
    tasks: list[str]
    """The task of each sample: the least of its cluster."""
    ledger: set[str]
    """The digests of all keys that are held out from now on, those of earlier builds with them."""


class Ledger:
    """What earlier builds held out, as digests of keys: no text of a task gets in."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.held_out = _read_ledger(path)

    def keep(self, held_out: set[str]) -> None:
        """Hold these out from now on, too."""
        if not held_out <= self.held_out:
            self.held_out |= held_out
            write_json(self._path, {"schema_version": 1, "held_out": sorted(self.held_out)})


@contextmanager
def open_ledger(directory: Path) -> Iterator[Ledger]:
    """The ledger of the datasets under `directory`, alone: no other build decides meanwhile. Raises DatasetError when it is damaged."""
    with locked_directory(directory):
        yield Ledger(directory / LEDGER_FILE)


def first_request(episode: Episode) -> str:
    """The text of the user's first turn that is no demonstration, "" without one."""
    told: Iterable[Message] = episode.messages
    if not episode.messages:
        told = next((record.messages for record in episode.records if isinstance(record, LlmCallRecord)), ())
    return next((message.content for message in told if message.role == "user" and message.content and not message.is_demo), "")


def cluster_tasks(texts: Iterable[TaskText]) -> Clusters:
    """The clusters of tasks that share a group or have near-equal requests; each key of the ledger is a key here."""
    clusters = Clusters()
    distinct = sorted(set(texts), key=lambda text: (text.task, text.group or "", text.request))
    requests: list[tuple[str, Shingles]] = []
    for text in distinct:
        clusters.join(task_key(text.task), *([_key("group", text.group)] if text.group is not None else []))
        requests.append((text.task, shingle(text.request)))
    told = without_boilerplate([request for _, request in requests], [task for task, _ in requests])
    similar = SimilarTexts.of(set(told), TASK_SIMILARITY)
    first: dict[Shingles, str] = {}
    added: list[str] = []
    for (task, whole), request in zip(requests, told, strict=True):
        if not request:
            continue  # nothing but what most tasks begin with
        key = _key("request", content_hash(sorted(whole)))  # of the whole, so that a task is known again among other tasks
        if request not in first:
            first[request] = key
            clusters.join(key, *(added[number] for number in similar.find(request)))
            added.append(key)
            similar.add(request)
        clusters.join(task_key(task), key, first[request])
    return clusters


def split(keys: Sequence[str], clusters: Clusters, ledger: set[str], *, fraction: float, min_tasks: int) -> Split:
    """Divide samples, whose own keys are `keys`, by cluster.

    What the ledger has stays held out. No other is held out below `min_tasks` clusters, nor when nothing would be left to train on.
    """
    roots = [clusters.find(key) for key in keys]
    members = clusters.members()
    frozen = {root for root in set(roots) if any(_digest(key) in ledger for key in members[root])}
    chosen: set[str] = set()
    if len(set(roots)) >= min_tasks:
        chosen = {root for root in set(roots) - frozen if is_held_out(_first_task(members[root]), fraction)}
    if len(chosen | frozen) == len(set(roots)):
        chosen = set()
    held = chosen | frozen
    kept = {_digest(key) for root in held for key in members[root]}
    return Split([root in held for root in roots], [_first_task(members[root]) for root in roots], ledger | kept)


def join_sample(clusters: Clusters, sample: TrainingData, texts: Sequence[TaskText]) -> str:
    """Join the tasks of the episodes that `sample` was made from, which `texts` tells; gives the sample's own key."""
    keys = [task_key(text.task) for text in texts]
    own = _key("sample", sample.split_key) if sample.split_key is not None else keys[0]
    clusters.join(own, *keys)
    return own


def task_key(task: str) -> str:
    """The key of a task."""
    return _key("task", task)


def _read_ledger(path: Path) -> set[str]:
    try:
        value = json.loads(path.read_bytes())
        return {str(digest) for digest in value["held_out"]}
    except FileNotFoundError:
        return set()
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path} cannot be read ({type(error).__name__}); it says which tasks are held out, so restore it from a backup. "
            "Once it is removed, tasks that models were measured on may be trained on"
        ) from error


def _key(kind: str, value: str) -> str:
    return f"{kind}:{value}"


def _first_task(members: Sequence[str]) -> str:
    """The least task of a cluster; its hash decides, the same for every method, whatever the keys of its samples."""
    return min(member.removeprefix("task:") for member in members if member.startswith("task:"))


def _digest(key: str) -> str:
    """No text of a task gets into the ledger."""
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
