"""One version that is brought up: its state, and an exact count of the requests that are under way on it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraloop.episode import Frozen, now_ms
from loraloop.serve.states import VersionState, check_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraloop.serve.applier import Endpoint, Version
    from loraloop.serve.proof import Proof

logger = logging.getLogger(__name__)


class LoadedStatus(Frozen):
    """A version as `loraloop serve status` shows it."""

    name: str
    model_id: str | None
    state: VersionState
    reason: str
    """Why it is in this state; empty when that goes without saying."""
    since: int
    """Since when, in Unix milliseconds."""
    in_flight: int
    """Requests under way."""
    requests: int
    """Requests that it was sent, those under way too."""
    failures: int
    """Those of them that it did not answer well."""
    cut: int
    """Requests that were under way when the time for draining was over."""
    released_twice: int
    """Requests whose end was told more than once: a fault in the router; the count is right all the same."""


class Loaded:
    """A version from its start to its end. Started again, it is another `Loaded`: a count never mixes two servers."""

    def __init__(self, version: Version) -> None:
        self.version = version
        self.endpoint: Endpoint | None = None
        self.proof: Proof | None = None
        self.state = VersionState.STARTING
        self.reason = ""
        self.since = now_ms()
        self.in_flight = 0
        self.requests = 0
        self.failures = 0
        self.cut = 0
        self.released_twice = 0
        self.missed_looks = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def become(self, state: VersionState, reason: str = "") -> None:
        """Take a step of the table. Raises ServingError for one that it lacks."""
        check_step(self.version.name, self.state, state)
        logger.info("%s: %s -> %s %s", self.version.name, self.state, state, reason)
        self.state, self.reason, self.since = state, reason, now_ms()

    def open_ticket(self, alias: str, *, is_canary: bool = False, on_end: Callable[[OpenTicket, bool], None] | None = None) -> OpenTicket:
        """Count one request more; `on_end` hears its end, and whether it failed, once."""
        assert self.endpoint is not None  # noqa: S101  what answers has an endpoint
        self.in_flight += 1
        self.requests += 1
        self._idle.clear()
        return OpenTicket(alias, self.endpoint, is_canary, self, on_end)

    def end_one(self, *, failed: bool) -> None:
        """One request less."""
        self.in_flight -= 1
        self.failures += failed
        if self.in_flight == 0:
            self._idle.set()

    async def wait_idle(self, max_seconds: float) -> int:
        """Wait until nothing is under way, at most so long; how many requests are under way then."""
        try:
            async with asyncio.timeout(max_seconds):
                await self._idle.wait()
        except TimeoutError:
            pass
        return self.in_flight

    def status(self) -> LoadedStatus:
        """What it is now."""
        return LoadedStatus(
            name=self.version.name,
            model_id=self.version.model_id,
            state=self.state,
            reason=self.reason,
            since=self.since,
            in_flight=self.in_flight,
            requests=self.requests,
            failures=self.failures,
            cut=self.cut,
            released_twice=self.released_twice,
        )


@dataclass(eq=False)
class OpenTicket:
    """One request under way on `loaded`; see `routing.Ticket`."""

    alias: str
    endpoint: Endpoint
    is_canary: bool
    loaded: Loaded
    on_end: Callable[[OpenTicket, bool], None] | None = None
    released: bool = field(default=False, init=False)

    def release(self, *, failed: bool = False) -> None:
        """The request has ended. A second call changes no count; it is logged, and shown in the status."""
        if self.released:
            self.loaded.released_twice += 1
            logger.error("a request to %s was released twice; the router must release each once", self.loaded.version.name)
            return
        self.released = True
        self.loaded.end_one(failed=failed)
        if self.on_end is not None:
            self.on_end(self, failed)
