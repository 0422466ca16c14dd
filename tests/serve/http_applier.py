"""An applier whose versions are real HTTP servers, each in a child process, with answers and scores that come from the adapter's bytes.

The servers are `adapter_server.py`. An adapter's file `effect` holds `<kind> <strength>`: `good` applies it, `ignored` serves the base model's scores, `dies` ends at start.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from loraloop.errors import ServingError
from loraloop.files import file_sha256
from loraloop.serve.applier import Endpoint, Scored, Version

BASE_SHA256 = "b" * 64
SERVER = Path(__file__).with_name("adapter_server.py")


def make_adapter(folder: Path, strength: float = 1.0, *, kind: str = "good", alias: str = "agent") -> Version:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "effect").write_text(f"{kind} {strength}")
    sha256 = file_sha256(folder / "effect")
    return Version.of_adapter(alias, adapter_sha256=sha256, adapter_path=folder, model_id=None, base_sha256=BASE_SHA256)


class HttpApplier:
    """See the module."""

    name: ClassVar[str] = "http"

    def __init__(self) -> None:
        self.base = Version.of_base(BASE_SHA256)
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.started: list[str] = []
        self.stopped: list[tuple[str, int | None]] = []
        self.broken: set[str] = set()

    def check(self, version: Version) -> list[str]:
        assert version.adapter_path is not None
        if not (version.adapter_path / "effect").exists():
            return [f"there is no adapter in {version.adapter_path.name}"]
        return [] if version.base_sha256 in (None, BASE_SHA256) else ["it was trained on another base model"]

    async def start(self, version: Version) -> Endpoint:
        self.started.append(version.name)
        folder = str(version.adapter_path) if version.adapter_path else ""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", str(SERVER), version.name, folder, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            raise ServingError(f"its server ended with exit code {await process.wait()} before it answered")
        endpoint = Endpoint(version, f"http://127.0.0.1:{int(line)}", version.name)
        self.processes[endpoint.url] = process
        return endpoint

    async def is_healthy(self, endpoint: Endpoint) -> bool:
        with suppress(OSError, ValueError):
            return (await self.call(endpoint, "/health", {}))["model"] == endpoint.version.name
        return False

    async def score(self, endpoint: Endpoint, prompts: tuple[tuple[int, ...], ...]) -> Scored:
        try:
            found = await self.call(endpoint, "/score", {"prompts": prompts})
        except (OSError, ValueError) as error:
            raise ServingError(f"{endpoint.version.name} does not score: {error}") from error
        return Scored(tuple({int(token): value for token, value in top.items()} for top in found["top"]))

    async def stop(self, endpoint: Endpoint) -> None:
        process = self.processes.pop(endpoint.url, None)
        if process is None:
            return
        if endpoint.version.name in self.broken:
            raise OSError("it cannot be stopped")
        with suppress(ProcessLookupError):
            process.terminate()
        self.stopped.append((endpoint.version.name, await process.wait()))

    async def close(self) -> None:
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self.processes.clear()

    async def kill(self, endpoint: Endpoint) -> None:
        """As the system does when memory runs out."""
        self.processes[endpoint.url].kill()
        await self.processes[endpoint.url].wait()

    async def call(self, endpoint: Endpoint, path: str, body: dict[str, Any]) -> dict[str, Any]:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(endpoint.url.rpartition(":")[2]))
        try:
            data = json.dumps(body).encode()
            writer.write(b"POST %s HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), len(data), data))
            return dict(json.loads((await reader.read()).partition(b"\r\n\r\n")[2]))
        finally:
            writer.close()
