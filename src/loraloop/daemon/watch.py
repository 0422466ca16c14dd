"""The process round the loops: one at a time in a project, a thread for each alias, until it is told to stop.

A loop that trains for hours keeps no other from taking in, observing and rolling back. All that must outlive the process is in the store.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraloop.daemon.cycle import CycleReport, cycle_once
from loraloop.daemon.stages import Stages
from loraloop.errors import LeaseHeld, SettingsError, StoreError
from loraloop.lease import Holder, Lease, read_holder
from loraloop.settings import ScenarioSettings, nearest
from loraloop.store.ledger import Ledger

LEASE_FILE = "watch.json"
STOP_SECONDS = 0.5
"""Between two requests to stop, while something is under way still."""


@dataclass(frozen=True)
class Watch:
    """The loops of the project in `directory`."""

    directory: Path
    ledger: Ledger
    scenarios: Sequence[ScenarioSettings]
    stages: Stages
    interval_seconds: float

    def run(self, *, once: bool = False) -> Generator[CycleReport, None, None]:
        """A report of every cycle as it ends, one cycle an alias with `once`, else without end.

        When the iteration is left, by an exception or `close()`, what is under way keeps how far it is and ends first. Raises LeaseHeld,
        naming the process, when another watches the project already, or takes it over later.
        """
        lease = Lease(self.directory / LEASE_FILE)
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            lease.acquire("loraloop watch")
        except LeaseHeld as error:
            raise LeaseHeld(f"{self.directory} is watched by {error}; stop it first, or use `loraloop status`") from error
        reports: queue.Queue[CycleReport | LeaseHeld | None] = queue.Queue()
        is_over = threading.Event()
        with lease.kept(lambda by: reports.put(LeaseHeld(f"{self.directory} is watched by {by} now"))):
            threads = [threading.Thread(target=self._go, args=(one, reports, is_over, once), daemon=True) for one in self.scenarios]
            for thread in threads:
                thread.start()
            try:
                yield from _take(reports, len(threads))
            finally:
                is_over.set()
                while any(thread.is_alive() for thread in threads):
                    self.stages.stop()
                    for thread in threads:
                        thread.join(STOP_SECONDS)

    def _go(
        self, scenario: ScenarioSettings, reports: queue.Queue[CycleReport | LeaseHeld | None], is_over: threading.Event, once: bool
    ) -> None:
        """The loop of one alias; the store may fail for a while."""
        while not is_over.is_set():
            try:
                report = cycle_once(self.ledger, scenario, self.stages, is_over=is_over.is_set)
            except StoreError as error:
                report = CycleReport(alias=scenario.alias, waits_for="the store failed", failure=str(error))
            reports.put(report)
            if once:
                break
            if not report.moves:
                is_over.wait(self.interval_seconds)
        reports.put(None)


def choose(scenarios: Sequence[ScenarioSettings], aliases: Sequence[str]) -> list[ScenarioSettings]:
    """Those with one of `aliases`, all without any. Raises SettingsError for one that there is not."""
    known = {scenario.alias: scenario for scenario in scenarios}
    for alias in aliases:
        if alias not in known:
            raise SettingsError(f"there is no scenario {alias!r}; known: {', '.join(known)}.{nearest(alias, list(known))}")
    return [scenario for alias, scenario in known.items() if not aliases or alias in aliases]


def find_watcher(directory: Path) -> Holder | None:
    """The process that watches a project; None when none that lives does."""
    holder = read_holder(directory / LEASE_FILE)
    return holder if holder is not None and holder.is_alive else None


def _take(reports: queue.Queue[CycleReport | LeaseHeld | None], n_threads: int) -> Iterator[CycleReport]:
    """What the threads report until each has ended."""
    while n_threads:
        report = reports.get()
        if isinstance(report, LeaseHeld):
            raise report
        if report is None:
            n_threads -= 1
        else:
            yield report
