"""trackio: a run of the project `loraloop`, named by its run id.

Where it goes is what TRACKIO_DIR, TRACKIO_PROJECT, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL say. trackio raises nothing once a run is
open: trouble is a Python warning, after which it tries again. So the first one is raised when the run ends.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Mapping, Sequence

import trackio
from trackio.sqlite_storage import SQLiteStorage

from loraloop.lora.report_to.messages import FAILED, FINISHED, Figure, Opening


def open_service(opening: Opening) -> TrackioRun:
    """The run of this id, continued where the service has it."""
    return TrackioRun(opening)


class TrackioRun:
    """A run of a project; its own thread writes it out twice a second."""

    def __init__(self, opening: Opening) -> None:
        self._trouble: list[str] = []
        warnings.showwarning = self._hear
        project = os.environ["TRACKIO_PROJECT"]
        self._run = trackio.init(
            project,
            name=opening.run_id,
            config={**opening.settings, **opening.lineage},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.logged: Mapping[str, int] = _last_steps(project, opening.run_id)
        if not self.logged:
            self._run.log({}, step=0)  # trackio knows a run, and its settings, from the first row on

    def log(self, figures: Sequence[Figure]) -> None:
        """One row for each step, so that trackio draws its figures over each other."""
        for step, row in itertools.groupby(figures, lambda figure: figure.step):
            self._run.log({figure.name: figure.value for figure in row}, step=step)

    def close(self, state: str) -> None:
        """An alert of the run says the state, which trackio does not know. Raises RuntimeError for trouble on the way."""
        levels = {FINISHED: trackio.AlertLevel.INFO, FAILED: trackio.AlertLevel.ERROR}
        self._run.alert(f"training {state}", level=levels.get(state, trackio.AlertLevel.WARN))
        trackio.finish()
        if self._trouble:
            raise RuntimeError(self._trouble[0])

    def _hear(self, message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        print(f"{category.__name__}: {message}", flush=True)  # noqa: T201  into the log
        if category is UserWarning:
            self._trouble.append(str(message))


def _last_steps(project: str, run_id: str) -> dict[str, int]:
    """The highest step of each figure in the store on this machine; a remote one is not asked."""
    last: dict[str, int] = {}
    for row in SQLiteStorage.get_logs(project, run_id):
        for name in row:
            last[name] = max(row["step"], last.get(name, -1))
    return last
