"""MLflow: a run of the experiment `loraloop`, found again by its tag `loraloop.run`.

Where it goes is what MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say. Only the client is used, never MLflow's global "active run".
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from loraloop.files import locked_directory
from loraloop.lora.report_to.messages import FAILED, FINISHED, Figure, Opening

MAX_PARAMS, MAX_METRICS = 100, 1000
"""How many a server takes at once."""
RUN_TAG = "loraloop.run"


def open_service(opening: Opening) -> MlflowRun:
    """The run of this id, continued where the service has it. One process at a time: two must not make the same experiment, or store."""
    with locked_directory(opening.folder):
        return MlflowRun(opening)


class MlflowRun:
    """A run in a tracking store."""

    def __init__(self, opening: Opening) -> None:
        self._client = MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
        experiment = _find_experiment(self._client, os.environ["MLFLOW_EXPERIMENT_NAME"], opening)
        found = self._client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{opening.run_id}'", max_results=1)
        run: Run = found[0] if found else self._client.create_run(experiment, run_name=opening.run_id, tags={RUN_TAG: opening.run_id})
        self._id: str = run.info.run_id
        if found:
            self._client.update_run(self._id, status="RUNNING")
        self._describe(opening, run.data.params)
        self.logged: Mapping[str, int] = {
            name: max(metric.step for metric in self._client.get_metric_history(self._id, name)) for name in run.data.metrics
        }

    def log(self, figures: Sequence[Figure]) -> None:
        """One metric each."""
        metrics = [Metric(figure.name, figure.value, figure.at_ms, figure.step) for figure in figures]
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + MAX_METRICS])

    def close(self, state: str) -> None:
        """FINISHED, FAILED, or KILLED for a run that was stopped; the state's own word is the tag `loraloop.state`."""
        self._client.set_tag(self._id, "loraloop.state", state)
        self._client.set_terminated(self._id, {FINISHED: "FINISHED", FAILED: "FAILED"}.get(state, "KILLED"))

    def _describe(self, opening: Opening, known: Mapping[str, str]) -> None:
        """Settings as parameters, which MLflow never lets change: one that a resumed run has changed is the tag `resumed.<name>`."""
        texts = {name: str(value) for name, value in opening.settings.items()}
        tags = {f"loraloop.{name}": text for name, text in opening.lineage.items()}
        tags |= {f"resumed.{name}": text for name, text in texts.items() if known.get(name, text) != text}
        params = [Param(name, text) for name, text in texts.items() if name not in known]
        self._client.log_batch(self._id, tags=[RunTag(name, text) for name, text in tags.items()])
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MAX_PARAMS])


def _find_experiment(client: MlflowClient, name: str, opening: Opening) -> str:
    """The experiment's id; one that is not there is made. Files of a local one stay in the folder."""
    found = client.get_experiment_by_name(name)
    if found is None:
        local = os.environ["MLFLOW_TRACKING_URI"].startswith("sqlite:")
        try:
            return str(client.create_experiment(name, artifact_location=(opening.folder / "artifacts").as_uri() if local else None))
        except MlflowException:  # a process on another machine was quicker
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)
