"""Routers to be killed: `python killed_router.py FOLDER UPSTREAM-URL` starts one for each line that it reads, and prints its pid and URL."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import uvicorn
from upstream import OneRoute

from loraloop.serve.capture import CaptureSettings, Recorder
from loraloop.serve.listener import open_listener
from loraloop.serve.relay import RouterSettings
from loraloop.serve.router import create_app
from loraloop.store.sql import SqlEpisodeStore


def main(folder: Path, upstream: str) -> None:
    """Forked, each of them has the libraries already, and nothing else of the one before."""
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            serve(folder, upstream)
            os._exit(0)
        os.waitpid(pid, 0)


def serve(folder: Path, upstream: str) -> None:
    write = os.write

    def write_slowly(handle: int, content: bytes) -> int:
        """A slow disk, so that there is a moment between an answer and its record."""
        time.sleep(0.03)
        return write(handle, content)

    os.write = write_slowly
    store = SqlEpisodeStore(folder / "episodes.db")
    recorder = Recorder(folder / "capture", store, settings=CaptureSettings(store_seconds=0.05))
    recorder.start()
    listener = open_listener()
    print(os.getpid(), f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    server = uvicorn.Server(uvicorn.Config(create_app(OneRoute(upstream), recorder, RouterSettings()), log_level="critical"))
    asyncio.run(server.serve([listener]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
