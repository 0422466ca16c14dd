"""Versions come up, are proven, drain and go: what a fleet does with one version, whatever alias it is for."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraloop.errors import ServingError
from loraloop.serve.loaded import Loaded
from loraloop.serve.proof import Proof, Prove
from loraloop.serve.states import ANSWERING, VersionState, check_step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraloop.serve.applier import Applier, Version

logger = logging.getLogger(__name__)

KEPT_ENDED = 20
"""So many versions that have ended are still shown."""
PRESENT = ANSWERING | {VersionState.PROVEN, VersionState.DRAINING}
"""Proven before, and not taken away."""


@dataclass
class Retry:
    """When a version that died is started again."""

    at: float
    """On the clock `time.monotonic`."""
    wait: float
    """How long the wait before it was, in seconds."""
    running: bool = False


class Loader:
    """The versions of one applier, by name: the newest `Loaded` of each."""

    def __init__(self, applier: Applier, prove: Prove, drain_seconds: float) -> None:
        self.applier = applier
        self._prove = prove
        self._drain_seconds = drain_seconds
        self._loaded: dict[str, Loaded] = {}
        self._drains: dict[str, asyncio.Task[None]] = {}

    def find(self, name: str) -> Loaded | None:
        """The version of that name as it was last brought up; None when it never was, or ended long ago."""
        return self._loaded.get(name)

    def __iter__(self) -> Iterator[Loaded]:
        """All of them."""
        return iter(tuple(self._loaded.values()))

    async def bring_up(self, version: Version) -> Loaded:
        """`version`, up, proven and healthy at the moment of return; one that is there already is taken as it is.

        Raises ServingError saying why it cannot be; then nothing of it is left, and its state tells the reason.
        """
        there = self._loaded.get(version.name)
        if there is not None and there.state in PRESENT and there.endpoint is not None:
            healthy = await self.applier.is_healthy(there.endpoint)
            if healthy and self._loaded.get(version.name) is there and there.state in PRESENT:
                return there
            if there.state in PRESENT and there.state is not VersionState.DRAINING:
                await self.fail(there, "it does not answer any more")
            await self.wait_gone(version.name)
        if there is not None:
            check_step(version.name, there.state, VersionState.STARTING)
        loaded = self._loaded[version.name] = Loaded(version)
        self._forget_ended()
        try:
            await self._start(loaded)
        except BaseException as error:
            reason = str(error) or type(error).__name__
            await asyncio.shield(self.fail(loaded, reason))
            if isinstance(error, Exception) and not isinstance(error, ServingError):
                logger.exception("%s did not come up", version.name)
                raise ServingError(f"{version.name} cannot be served: {type(error).__name__}: {reason}") from error
            if isinstance(error, ServingError):
                raise ServingError(f"{version.name} cannot be served: {reason}") from error
            raise
        return loaded

    async def _start(self, loaded: Loaded) -> None:
        is_base = loaded.version.name == self.applier.base.name
        findings = [] if is_base else await asyncio.to_thread(self.applier.check, loaded.version)  # may read large files
        if findings:
            raise ServingError("; ".join(findings))
        loaded.endpoint = await self.applier.start(loaded.version)
        loaded.become(VersionState.HEALTHY)
        loaded.proof = await self._find_proof(loaded)
        if not loaded.proof.proven:
            raise ServingError(f"it is not shown that its adapter is applied: {loaded.proof.reason}")
        if not await self.applier.is_healthy(loaded.endpoint):
            raise ServingError("it died before anybody was sent to it")
        loaded.become(VersionState.PROVEN)

    async def _find_proof(self, loaded: Loaded) -> Proof:
        if loaded.version.name == self.applier.base.name:
            return Proof(proven=True, reason="it is the base model")
        base = self._loaded.get(self.applier.base.name)
        if base is None or base.endpoint is None or base.state not in ANSWERING:
            raise ServingError("the base model, which it is compared with, does not answer at the moment; try again")
        assert loaded.endpoint is not None  # noqa: S101  it was just started
        return await self._prove(self.applier, base.endpoint, loaded.endpoint)

    async def fail(self, loaded: Loaded, reason: str) -> None:
        """It failed; what is left of it is taken away."""
        if loaded.state is not VersionState.FAILED:
            loaded.become(VersionState.FAILED, reason)
        await self._take_away(loaded)

    def drain(self, loaded: Loaded) -> None:
        """Send nobody to it any more, and stop it when its last request has ended, or the time for that is over."""
        loaded.become(VersionState.DRAINING)
        name = loaded.version.name
        self._drains[name] = asyncio.create_task(self._drain(loaded), name=f"drain {name}")

    def take_back(self, loaded: Loaded, state: VersionState) -> None:
        """One that drains answers again."""
        task = self._drains.pop(loaded.version.name, None)
        loaded.become(state)
        if task is not None:
            task.cancel()

    async def wait_gone(self, name: str) -> None:
        """Wait until the version of that name, if it drains, is gone."""
        task = self._drains.get(name)
        if task is not None:
            await asyncio.wait([task])

    async def wait_settled(self) -> None:
        """Wait until nothing drains."""
        while self._drains:
            await asyncio.wait(list(self._drains.values()))
            await asyncio.sleep(0)

    async def _drain(self, loaded: Loaded) -> None:
        left = await loaded.wait_idle(self._drain_seconds)
        if loaded.state is not VersionState.DRAINING:
            self._drains.pop(loaded.version.name, None)
            return
        loaded.cut = left
        reason = f"{left} requests were cut: they had not ended after {self._drain_seconds:g} s" if left else ""
        loaded.become(VersionState.STOPPED, reason)
        try:
            await self._take_away(loaded)
        finally:
            if self._drains.get(loaded.version.name) is asyncio.current_task():
                del self._drains[loaded.version.name]

    async def _take_away(self, loaded: Loaded) -> None:
        if loaded.endpoint is None:
            return
        try:
            await self.applier.stop(loaded.endpoint)
        except Exception as error:  # the applier is a plug-in: what it cannot stop is told, and costs no other version
            logger.exception("%s cannot be stopped", loaded.version.name)
            loaded.reason = f"{loaded.reason}; it cannot be stopped: {error}".lstrip("; ")

    def _forget_ended(self) -> None:
        ended = [each for each in self if each.state in (VersionState.STOPPED, VersionState.FAILED)]
        for each in sorted(ended, key=lambda each: each.since)[:-KEPT_ENDED]:
            self._loaded.pop(each.version.name, None)

    async def close(self) -> None:
        """Let what is under way end, within the time for draining, and stop everything."""
        for loaded in self:
            if loaded.state in ANSWERING:
                self.drain(loaded)
        with suppress(asyncio.CancelledError):
            await self.wait_settled()
        for loaded in self:
            if loaded.state is VersionState.PROVEN:
                loaded.become(VersionState.STOPPED)
        await self.applier.close()
