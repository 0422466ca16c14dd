"""What a side has played already, in whatever evaluation: the same weights, task, seed and settings give the same play.

So the base model, or what is live, is not played again for each candidate. A play that is reused is copied, so that each evaluation has
all that it rests on. What a server answers is never reused: nothing tells which weights were behind it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

from loraloop.evaluate.result import SIDES, EvaluationPlan, Side, SideName
from loraloop.evaluate.suite import Plays, Schedule, iter_plays
from loraloop.evaluation.options import EvaluationOptions
from loraloop.files import content_hash

PLAN_FILE = "plan.json"


def name_sides(sides: Mapping[SideName, Side], schedule: Schedule, options: EvaluationOptions) -> dict[SideName, str]:
    """A hash for each side over all that its plays follow from besides task and seed; none for a side that is served."""
    suite = type(schedule.suite)
    try:
        source = content_hash(Path(inspect.getfile(suite)).read_text(encoding="utf-8"))
    except (OSError, TypeError):  # a class that was made at a prompt can change without a trace
        return {}
    settings = [options.environment, dict(options.options), schedule.temperature, options.dtype, source, suite.__qualname__]
    return {
        name: content_hash([side.base_sha256, side.adapter_sha256, *settings])
        for name, side in sides.items()
        if side.url is None and side.base_sha256 is not None
    }


def reuse_plays(plays: Plays, schedule: Schedule, evaluations: Path) -> int:
    """Copy what `schedule` wants, and `plays` lacks, from the other folders under `evaluations`; how many plays that were."""
    wanted = {
        key: (side, task.id, seed)
        for side in SIDES
        for task in schedule.tasks
        for seed in range(schedule.seeds)
        if plays.find(side, task.id, seed) is None and (key := schedule.key(side, task, seed)) is not None
    }
    n_reused = 0
    for folder in _list_similar(evaluations, plays.folder, plays) if wanted else ():
        for play in iter_plays(folder):
            place = wanted.pop(play.key, None) if play.key else None
            if place is not None:
                plays.add(play.model_copy(update={"side": place[0]}))
                n_reused += 1
        if not wanted:
            break
    return n_reused


def _list_similar(evaluations: Path, own: Path, plays: Plays) -> Iterator[Path]:
    """The folders of other evaluations in the same environment, the newest first."""
    plan = _read_plan(own)
    found = sorted(evaluations.glob(f"eval-*/{plays.path.name}"), key=lambda file: -file.stat().st_mtime_ns)
    for file in found:
        other = _read_plan(file.parent) if file.parent != own else None
        if plan is not None and other is not None and (other.environment, other.temperature) == (plan.environment, plan.temperature):
            yield file.parent


def _read_plan(folder: Path) -> EvaluationPlan | None:
    """None for one that cannot be read: then nothing of it is reused."""
    try:
        return EvaluationPlan.model_validate_json((folder / PLAN_FILE).read_bytes())
    except (OSError, ValueError):
        return None
