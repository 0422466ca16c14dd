"""Harbor's trial folder: {agent/trajectory.json, result.json, verifier/reward.txt or reward.json}, one attempt at one task.

The reward is what `result.json` says the verifier paid, else what the verifier's own file says. With several rewards the one named
`reward` counts; without it the outcome is Unknown and all are tags. An exception that stopped the trial means the reward says nothing of
the agent, but for the agent's own time running out: then less than full reward is a Timeout that keeps it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from loraloop.chat.refused_entry import EntryRefused, find_finite, show
from loraloop.episode import AnyOutcome, Success, Timeout, Unknown
from loraloop.errors import ImportFailed
from loraloop.importers.agent_turns import as_object, to_outcome
from loraloop.importers.entry import require_clean
from loraloop.importers.json_input import load_document

_MAIN = re.compile(r"trajectory(\.cont-\d+)?\.json")
"""The agent's own trajectory and its continuations; files of other names are its sub-agents'."""
_MAX_REWARD_BYTES = 4096
_TIMEOUT = "AgentTimeoutError"


@dataclass(frozen=True)
class Trial:
    """What a trial folder says of the trajectory in it."""

    task_id: str | None = None
    outcome: AnyOutcome = field(default_factory=Unknown)
    tags: dict[str, object] = field(default_factory=dict)


def find_trial(path: Path) -> Trial | None:
    """The trial whose main trajectory `path` is; None when it lies in no trial folder. Refused as `bad_reward`."""
    folder = path.parent.parent
    if path.parent.name != "agent" or not _MAIN.fullmatch(path.name):
        return None
    result = _read_result(folder / "result.json")
    exception = as_object(result.get("exception_info")).get("exception_type")
    rewards = as_object(as_object(result.get("verifier_result")).get("rewards")) or _read_rewards(folder / "verifier")
    if not result and not rewards:
        return None
    task_id = result.get("task_name")
    tags = {
        "exception": exception if isinstance(exception, str) else None,
        "trial": result.get("trial_name"),
        **{f"reward.{name}": rewards[name] for name in sorted(rewards) if len(rewards) > 1},
    }
    return Trial(task_id if isinstance(task_id, str) and task_id else None, _to_outcome(rewards, exception), tags)


def _to_outcome(rewards: dict[str, object], exception: object) -> AnyOutcome:
    if exception not in (None, _TIMEOUT):
        return Unknown()
    reward = next(iter(rewards.values())) if len(rewards) == 1 else rewards.get("reward")
    if reward is None:
        return Timeout() if exception == _TIMEOUT else Unknown()
    outcome = to_outcome(reward)
    if exception == _TIMEOUT and not isinstance(outcome, Success):
        return Timeout(float(reward) if isinstance(reward, bool) else find_finite(reward))
    return outcome


def _read_result(path: Path) -> dict[str, object]:
    """The document, empty when there is none, when it cannot be read, and when it is of another program."""
    try:
        result = as_object(load_document(path)) if path.is_file() else {}
    except ImportFailed:
        return {}
    require_clean(result)
    return result if result.keys() & {"trial_name", "verifier_result", "exception_info"} else {}


def _read_rewards(folder: Path) -> dict[str, object]:
    as_json, as_text = folder / "reward.json", folder / "reward.txt"
    if as_json.is_file():
        try:
            said = load_document(as_json)
        except ImportFailed:
            return {}
        require_clean(said)
        return said if isinstance(said, dict) else {"reward": said}
    if not as_text.is_file():
        return {}
    with as_text.open("rb") as file:
        text = file.read(_MAX_REWARD_BYTES).decode(errors="replace").strip()
    try:
        return {"reward": json.loads(text)}
    except (ValueError, RecursionError) as error:
        raise EntryRefused("bad_reward", f"{as_text.name} with {show(text)}", "a number", "write what was paid") from error
