"""The service: an applier, the fleet over it, the recorder and the router, from their start to an orderly end.

One for each project (a lease). It listens on loopback. At its end it takes no more requests, lets those under way finish, and stops its
servers; killed, it comes up again with what the disk says.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import uvicorn

from loraloop.errors import LeaseHeld, ServingError
from loraloop.lease import Lease
from loraloop.plugins import EpisodeStore, find
from loraloop.serve.admin import FindVersion, list_routes
from loraloop.serve.aliases import AliasFile
from loraloop.serve.capture import Recorder
from loraloop.serve.fleet import Fleet
from loraloop.serve.fleet_status import FleetSettings
from loraloop.serve.listener import KEEP_ALIVE_SECONDS, favour_calls, open_listener
from loraloop.serve.orders import HOST, LEASE_FILE, SERVICE_FILE, ServiceAddress, ServiceSettings
from loraloop.serve.proof import Prove
from loraloop.serve.relay import RouterSettings
from loraloop.serve.router import create_app


async def run_service(
    folder: Path,
    store: EpisodeStore,
    settings: ServiceSettings,
    *,
    find_version: FindVersion,
    prove: Prove,
    on_ready: Callable[[ServiceAddress], None],
) -> int:
    """Serve until a signal says to end; the number of that signal. `on_ready` is called once, when requests are answered.

    Raises ServingError when another service runs, the port is taken, or the base model does not come up; then nothing is left.
    """
    lease = Lease(folder / LEASE_FILE)
    try:
        lease.acquire("loraloop serve")
    except LeaseHeld as error:
        raise ServingError(f"{error} serves this project already; see `loraloop serve status`") from error
    with lease.kept(), closing(open_listener(HOST, settings.port)) as listener:
        favour_calls()
        (folder / SERVICE_FILE).unlink(missing_ok=True)
        applier = await find("appliers", settings.applier).open(settings.base, folder / "appliers", settings.options)
        fleet = Fleet(applier, AliasFile(folder), prove, FleetSettings(drain_seconds=settings.drain_seconds))
        try:
            await fleet.recover()
            return await _answer(folder, store, settings, fleet, listener, find_version=find_version, on_ready=on_ready)
        finally:
            (folder / SERVICE_FILE).unlink(missing_ok=True)
            await fleet.close()


async def _answer(
    folder: Path,
    store: EpisodeStore,
    settings: ServiceSettings,
    fleet: Fleet,
    listener: socket.socket,
    *,
    find_version: FindVersion,
    on_ready: Callable[[ServiceAddress], None],
) -> int:
    token = settings.token or secrets.token_urlsafe(32)
    recorder = Recorder(folder / "capture", store, on_outcome=fleet.add_outcome)
    app = create_app(fleet, recorder, RouterSettings(token=token), list_routes(fleet, find_version, recorder.status))
    seconds = max(1, round(settings.drain_seconds))
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=seconds,
    )
    server = _Server(config)
    recorder.start()
    watch = asyncio.create_task(fleet.watch())
    try:
        address = ServiceAddress(url=f"http://{HOST}:{listener.getsockname()[1]}", token=token, pid=os.getpid())
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started and not serving.done():  # noqa: ASYNC110  uvicorn tells it by nothing else
            await asyncio.sleep(0.01)
        if server.started:
            address.write(folder)
            on_ready(address)
        await serving
    finally:
        watch.cancel()
        await asyncio.to_thread(recorder.close)
    if server.signal is None:
        raise ServingError("the router ended by itself; its log says why")
    return server.signal


class _Server(uvicorn.Server):
    """Ends when a signal says so, and remembers which."""

    signal: int | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In the place of uvicorn's own, which raises the signal again at the end, before the servers behind have ended."""
        loop = asyncio.get_running_loop()

        def end(number: int) -> None:
            self.force_exit = self.signal is not None  # asked twice
            self.signal = number
            self.should_exit = True

        numbers = [number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
        for number in numbers:
            loop.add_signal_handler(number, end, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)
