"""Fleets over real servers in child processes, with short waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from http_applier import HttpApplier

from loraloop.serve.aliases import AliasFile
from loraloop.serve.applier import Applier, Endpoint
from loraloop.serve.fleet import Fleet
from loraloop.serve.fleet_status import FleetSettings
from loraloop.serve.loaded import OpenTicket
from loraloop.serve.proof import Proof

PROMPTS = ((1, 2, 3), (4, 5))


async def prove_by_difference(applier: Applier, base: Endpoint, green: Endpoint) -> Proof:
    """Whether the version's scores differ from the base model's at all."""
    before, after = await applier.score(base, PROMPTS), await applier.score(green, PROMPTS)
    differs = before != after
    return Proof(proven=differs, reason="it differs" if differs else "it answers as the base model does", figures={"prompts": len(PROMPTS)})


@asynccontextmanager
async def open_fleet(folder: Path, applier: HttpApplier | None = None, **settings: Any) -> AsyncIterator[tuple[Fleet, HttpApplier]]:
    applier = applier or HttpApplier()
    quick = {"drain_seconds": 20.0, "look_seconds": 0.05, "first_wait_seconds": 0.05, "last_wait_seconds": 0.2, **settings}
    fleet = Fleet(applier, AliasFile(folder), prove_by_difference, FleetSettings(**quick))
    try:
        yield await fleet.recover(), applier
    finally:
        await fleet.close()
        await applier.close()


async def ask(fleet: Fleet, applier: HttpApplier, model: str = "agent", conversation: str = "1", **body: Any) -> str:
    """One request, as a router makes it; the name of the version that answered."""
    ticket = fleet.acquire(model, conversation)
    failed = True
    try:
        answer = await applier.call(ticket.endpoint, "/v1/chat/completions", body)
        failed = False
    finally:
        ticket.release(failed=failed)
    assert answer["model"] == ticket.endpoint.version.name
    return str(answer["model"])


async def wait_until(true: Callable[[], bool], max_seconds: float = 10.0) -> None:
    async with asyncio.timeout(max_seconds):
        while not true():  # noqa: ASYNC110  the state of another object
            await asyncio.sleep(0.02)


def hold(fleet: Fleet, model: str = "agent", conversation: str = "1") -> OpenTicket:
    """A request that goes on."""
    return fleet.acquire(model, conversation)


def state_of(fleet: Fleet, name: str) -> str:
    return next(each.state.value for each in fleet.status().versions if each.name == name)
