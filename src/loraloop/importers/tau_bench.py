"""tau-bench results: a JSON list of {task_id, reward, info, traj, trial}, one run of a customer-service task each.

Taken over are `traj` (OpenAI messages, the policy as system prompt), `task_id`, `trial` and the reward. `info` holds the ground
truth (the user's instruction, the expected actions): only whether the run broke is read from it, and nothing of it is stored. The
file names neither tool schemas nor its domain; as every domain counts its tasks from 0, two domains belong in two stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from loraloop.chat.openai_messages import take_messages
from loraloop.chat.refused_entry import EntryRefused, find_finite, show
from loraloop.episode import AnyOutcome, Episode, EpisodeMetadata, Failure, Success, Unknown
from loraloop.importers.entry import convert_entries, find_id, ignored_tag, require_clean
from loraloop.importers.json_input import first_object_keys, iter_list
from loraloop.training_data import Refusal

SUCCESS_REWARD = 1 - 1e-6
"""From here on a run counts as solved, with tau-bench's own tolerance (its `run.py`, `is_successful`)."""

_KNOWN = {"task_id", "reward", "info", "traj", "trial"}


class TauBenchImporter:
    """Reads tau-bench results. Task and group of an episode are its `task_id`; its trial is a tag."""

    name: ClassVar[str] = "tau-bench"
    description: ClassVar[str] = 'tau-bench results: a JSON list of {"task_id", "reward", "info", "traj", "trial"}'

    def detect(self, path: Path, head: str) -> bool:  # noqa: ARG002 - the content tells, whatever the name
        """True for a list whose first object has `traj`, or where a long `info` hides that, task, reward and info."""
        keys = first_object_keys(head)
        return head.lstrip("\ufeff \t\r\n").startswith("[") and ("traj" in keys or {"task_id", "reward", "info"} <= keys)

    def count(self, path: Path) -> int | None:  # noqa: ARG002 - the same answer for every file
        """None: the whole file must be parsed to count its runs."""
        return None

    def read(self, path: Path) -> Iterator[Episode | Refusal]:
        """One Episode or Refusal for each run, in order. Raises ImportFailed for a file that is not a JSON list."""
        yield from convert_entries(path, iter_list(path), _to_episode)


def _to_episode(run: object) -> Episode:
    if not isinstance(run, dict) or "traj" not in run:
        keys = f"keys {show(sorted(run))}" if isinstance(run, dict) else show(run)
        raise EntryRefused("bad_shape", keys, "{task_id, reward, info, traj, trial}", "give a results file of tau-bench")
    _require_whole_run(run.get("info"))
    require_clean([run.get("task_id"), run.get("trial"), run["traj"], *run])
    task_id, trial = find_id(run, "task_id"), find_id(run, "trial")
    if task_id is None:
        raise EntryRefused("bad_shape", "no task_id", "the task's number or name", "add it: attempts at one task are compared")
    taken = take_messages(run["traj"], "traj")
    tags = {"format": TauBenchImporter.name, **ignored_tag(taken.ignored | (run.keys() - _KNOWN))}
    if trial is not None:
        tags["trial"] = trial
    if taken.n_decoded:
        tags["decoded_arguments"] = str(taken.n_decoded)
    return Episode(
        task_id=task_id,
        group_id=task_id,
        messages=tuple(taken.messages),
        outcome=_to_outcome(run.get("reward")),
        metadata=EpisodeMetadata(scenario=TauBenchImporter.name, tags=tags),
    )


def _require_whole_run(info: object) -> None:
    """Refuse runs that an exception ended: their reward 0 and empty or broken `traj` stand for no attempt of the agent."""
    error = (info.get("error") or info.get("traceback")) if isinstance(info, dict) else None
    if error:
        found = f"a run that an exception ended: {show(error)}"
        raise EntryRefused("run_error", found, "a run that came to its end", "run the task again: this says nothing of the agent")


def _to_outcome(reward: object) -> AnyOutcome:
    """tau-bench pays all or nothing, so anything below 1 is a failure that names what was paid; no reward says nothing."""
    if reward is None:
        return Unknown()
    paid = float(reward) if isinstance(reward, bool) else find_finite(reward)
    if paid is None:
        raise EntryRefused("bad_reward", f"reward {show(reward)}", "a finite number, a boolean or null", "write what was paid")
    return Success(paid) if paid >= SUCCESS_REWARD else Failure(f"reward {paid}")
