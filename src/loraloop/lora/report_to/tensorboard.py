"""TensorBoard: event files in `<folder>/<run id>`, with the settings as hyperparameters.

Written by TensorBoard's own event writer, so neither torch nor TensorFlow is needed. A run that is resumed writes another file beside
the first, which TensorBoard shows as one run. Of settings and state TensorBoard believes the first that it reads, so each is a file of
its own, which a resumed run replaces.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from loraloop.lora.report_to.messages import FAILED, FINISHED, Figure, Opening

EVENT_FILES, SETTINGS, END = "events.out.tfevents.*", ".settings", ".end"


def open_service(opening: Opening) -> TensorBoardRun:
    """The run's folder, new or continued."""
    return TensorBoardRun(opening)


class TensorBoardRun:
    """A folder of event files."""

    def __init__(self, opening: Opening) -> None:
        self._folder = opening.folder / opening.run_id
        self.logged: Mapping[str, int] = _last_steps(self._folder)
        self._remove(END)
        self._replace(SETTINGS, hparams_pb({**opening.settings, **opening.lineage}, trial_id=opening.run_id))
        self._writer = EventFileWriter(str(self._folder))

    def log(self, figures: Sequence[Figure]) -> None:
        """One scalar each."""
        for figure in figures:
            summary = scalar_pb(figure.name, figure.value)
            self._writer.add_event(Event(wall_time=figure.at_ms / 1000, step=figure.step, summary=summary))
        self._writer.flush()

    def close(self, state: str) -> None:
        """The end as the hyperparameter view shows it: success, failure, or unknown for a run that was stopped."""
        self._writer.close()
        status = {FINISHED: api_pb2.STATUS_SUCCESS, FAILED: api_pb2.STATUS_FAILURE}.get(state, api_pb2.STATUS_UNKNOWN)
        end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
        self._replace(END, Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)]))

    def _replace(self, suffix: str, summary: Summary) -> None:
        self._remove(suffix)
        writer = EventFileWriter(str(self._folder), filename_suffix=suffix)
        writer.add_event(Event(wall_time=time.time(), summary=summary))
        writer.close()

    def _remove(self, suffix: str) -> None:
        for path in self._folder.glob(f"{EVENT_FILES}{suffix}"):
            path.unlink()


def _last_steps(folder: Path) -> dict[str, int]:
    """The highest step of each tag; a record that a dying process cut off ends its file."""
    last: dict[str, int] = {}
    for path in sorted(folder.glob(EVENT_FILES)):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                last[value.tag] = max(event.step, last.get(value.tag, -1))
    return last
