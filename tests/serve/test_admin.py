"""A running service is told over HTTP, by names only."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
from fleets import ask, open_fleet
from http_applier import HttpApplier, make_adapter
from starlette.applications import Starlette

from loraloop.errors import ServingError, UnknownModel
from loraloop.lease import Lease
from loraloop.serve.admin import list_routes
from loraloop.serve.applier import Version
from loraloop.serve.fleet import Fleet
from loraloop.serve.orders import LEASE_FILE, ApplyOrder, PromoteOrder, RollbackOrder, ServiceAddress, ask_status, find_service, tell


@asynccontextmanager
async def open_service(folder: Path) -> AsyncIterator[tuple[Fleet, HttpApplier, ServiceAddress]]:
    """The admin routes over a fleet on a real port; models are the adapters in `folder`, by name."""

    def find_version(order: ApplyOrder) -> tuple[Version, str]:
        strengths = {"a": 1.0, "b": 2.0}
        if order.model not in strengths:
            raise ServingError(f"{order.model} is a candidate, and only promoted models are served")
        return make_adapter(folder / order.model, strengths[order.model], alias=order.alias), order.override or "because"

    async with open_fleet(folder / "serving") as (fleet, applier):
        server = uvicorn.Server(
            uvicorn.Config(Starlette(routes=list_routes(fleet, find_version, lambda: {"queued": 0})), port=0, log_level="error", ws="none")
        )
        running = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110  another's state
            await asyncio.sleep(0.01)
        address = ServiceAddress(url=f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", token="secret", pid=os.getpid())
        try:
            yield fleet, applier, address
        finally:
            server.should_exit = True
            await running


async def test_a_service_applies_tries_promotes_and_rolls_back_and_tells_how_it_stands(tmp_path: Path) -> None:
    async with open_service(tmp_path) as (fleet, applier, address):
        report = await asyncio.to_thread(tell, address, ApplyOrder(model="a"))
        assert (report.kind, report.before) == ("apply", None)
        assert report.proof
        assert await ask(fleet, applier) == report.version
        tried = await asyncio.to_thread(tell, address, ApplyOrder(model="b", canary=0.25))
        assert (tried.kind, tried.share) == ("canary", 0.25)
        promoted = await asyncio.to_thread(tell, address, PromoteOrder())
        assert promoted.version == tried.version
        back = await asyncio.to_thread(tell, address, RollbackOrder(why="worse"))
        assert back.version == report.version
        base = await asyncio.to_thread(tell, address, ApplyOrder(model="base", alias="plain"))
        assert base.version == applier.base.name
        status = await asyncio.to_thread(ask_status, address)
        assert status.fleet.aliases["agent"].version == report.version
        assert status.fleet.aliases["agent"].previous == (promoted.version,)
        assert status.recorder == {"queued": 0}


async def test_what_cannot_be_done_comes_back_in_the_services_own_words(tmp_path: Path) -> None:
    async with open_service(tmp_path) as (_, _, address):
        with pytest.raises(ServingError, match="c is a candidate, and only promoted models"):
            await asyncio.to_thread(tell, address, ApplyOrder(model="c"))
        with pytest.raises(UnknownModel, match="there is no alias 'agent'"):
            await asyncio.to_thread(tell, address, RollbackOrder())
        wrong = ApplyOrder.model_construct(model="a", alias="../x", canary=None, override=None)
        with pytest.raises(ServingError, match=r"this is no order: alias"):
            await asyncio.to_thread(tell, address, wrong)
        with pytest.raises(ServingError, match="at most 65536 bytes"):
            await asyncio.to_thread(tell, address, ApplyOrder.model_construct(model="a" * 100_000, alias="x", canary=None, override=None))
    with pytest.raises(ServingError, match="does not answer"):
        await asyncio.to_thread(ask_status, address)


def test_a_service_is_found_by_its_lease_and_its_file_which_nobody_else_may_read(tmp_path: Path) -> None:
    assert find_service(tmp_path) is None
    address = ServiceAddress(url="http://127.0.0.1:1", token="secret", pid=os.getpid())
    address.write(tmp_path)
    assert stat.S_IMODE((tmp_path / "service.json").stat().st_mode) == 0o600
    assert find_service(tmp_path) is None, "the file is of a service that was killed"
    lease = Lease(tmp_path / LEASE_FILE)
    lease.acquire("loraloop serve")
    assert find_service(tmp_path) == address
    address.model_copy(update={"pid": 1}).write(tmp_path)
    with pytest.raises(ServingError, match="is not ready to be told anything"):
        find_service(tmp_path)
    lease.release()
    assert find_service(tmp_path) is None
