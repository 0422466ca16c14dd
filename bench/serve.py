"""What the router costs: the same calls to a bare server and through the router to that server, side by side in one run.

`python -m bench.serve [--seconds 3] [--clients 1,2,4,8,16,32] [--rate 20] [--url URL --model NAME] [--json FILE]`

Without `--url` the server is a stub in a process of its own that answers at once, or streams a chunk each 5 ms, so that nothing but the
router is measured; with it, any OpenAI-compatible server. The router is a process of its own too, records everything, and checks a
token. Two tables come of it: calls a second with 1 to 32 clients that call without pause, and the latency at a steady rate, where calls
go to either side in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from bench.machine import describe_machine
from loraloop.files import write_json

TOKEN = "bench"  # noqa: S105 - of a router that lives for a minute
WORDS = 32
"""Chunks of a streamed answer of the stub."""
CHUNK_SECONDS = 0.005
"""Between them: a fast model on a large machine."""
TURNS = 20
"""Messages of a request, each of some 400 letters: an agent in the middle of its work."""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    name: str
    url: str
    headers: dict[str, str]


def main() -> int:
    """Measure, print two tables, and write the figures where `--json` says."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    parser.add_argument("--clients", default="1,2,4,8,16,32")
    parser.add_argument("--rate", type=float, default=20.0, help="calls a second to each side")
    parser.add_argument("--url", help="a bare server, without /v1")
    parser.add_argument("--model", default="stub", help="what it calls its model")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--worker", choices=("stub", "router"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments.worker, arguments)
        return 0
    with tempfile.TemporaryDirectory(prefix="loraloop-bench-") as folder, _sides(arguments, folder) as sides:
        figures = asyncio.run(_measure(sides, arguments))
    _print(figures)
    if arguments.json:
        write_json(arguments.json, {"machine": describe_machine().model_dump(), **figures})
    return 0


@contextmanager
def _sides(arguments: argparse.Namespace, folder: str) -> Iterator[tuple[Side, Side]]:
    """The bare server and the router before it, while the block runs."""
    started: list[subprocess.Popen[str]] = []

    def start(worker: str, *more: str) -> str:
        command = [sys.executable, "-m", "bench.serve", "--worker", worker, "--folder", folder, *more]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        line = started[-1].stdout.readline() if started[-1].stdout else ""
        if not line:
            raise SystemExit(f"the {worker} did not start")
        return line.strip()

    try:
        url = arguments.url or start("stub")
        router = start("router", "--url", url, "--model", arguments.model)
        yield Side("bare", url, {}), Side("router", router, {"authorization": f"Bearer {TOKEN}"})
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(20)
            if process.stdout:
                process.stdout.close()


async def _measure(sides: tuple[Side, Side], arguments: argparse.Namespace) -> dict[str, Any]:
    throughput, latency = [], []
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx2.AsyncClient(timeout=60, limits=limits, trust_env=False) as client:
        for side in sides:
            await _call(client, side, arguments.model, streams=True)
        for n_clients in [int(number) for number in arguments.clients.split(",")]:
            for streams in (False, True):
                row: dict[str, Any] = {"clients": n_clients, "streams": streams}
                for side in sides:
                    row[side.name] = round(await _press(client, side, arguments, n_clients, streams=streams), 1)
                throughput.append(row)
        latency += [{"streams": streams, **await _pace(client, sides, arguments, streams=streams)} for streams in (False, True)]
    return {"throughput": throughput, "latency": latency, "rate": arguments.rate, "server": arguments.url or "stub"}


async def _press(client: httpx2.AsyncClient, side: Side, arguments: argparse.Namespace, n_clients: int, *, streams: bool) -> float:
    """Calls a second that come to their end while so many clients call without pause."""
    until = time.perf_counter() + arguments.seconds
    started = time.perf_counter()

    async def press() -> int:
        n_calls = 0
        while time.perf_counter() < until:
            await _call(client, side, arguments.model, streams=streams)
            n_calls += 1
        return n_calls

    counts = await asyncio.gather(*(press() for _ in range(n_clients)))
    return sum(counts) / (time.perf_counter() - started)


async def _pace(client: httpx2.AsyncClient, sides: Sequence[Side], arguments: argparse.Namespace, *, streams: bool) -> dict[str, Any]:
    """Milliseconds that calls at a steady rate take on either side, and what the router adds at the median and at p99."""
    step = 1 / arguments.rate / len(sides)
    n_calls = round(2 * arguments.seconds * arguments.rate) * len(sides)
    took: dict[str, list[float]] = {side.name: [] for side in sides}
    started = time.perf_counter()

    async def one(number: int) -> None:
        await asyncio.sleep(max(0.0, started + number * step - time.perf_counter()))
        side = sides[number % len(sides)]
        took[side.name].append(await _call(client, side, arguments.model, streams=streams) * 1000)

    await asyncio.gather(*(one(number) for number in range(n_calls)))
    figures = {name: {f"p{rank}": round(_rank(times, rank), 3) for rank in (50, 99)} for name, times in took.items()}
    added = {rank: round(figures["router"][rank] - figures["bare"][rank], 3) for rank in ("p50", "p99")}
    return {**figures, "added": added, "calls": n_calls // len(sides)}


async def _call(client: httpx2.AsyncClient, side: Side, model: str, *, streams: bool) -> float:
    """Seconds from sending a call to its last byte. Raises RuntimeError for an answer that is not whole."""
    messages = [{"role": ("user", "assistant")[number % 2], "content": f"{number} " + "word " * 80} for number in range(TURNS)]
    body = {"model": "bench" if side.name == "router" else model, "messages": messages, "stream": streams, "max_tokens": 16}
    started = time.perf_counter()
    async with client.stream("POST", f"{side.url}/v1/chat/completions", json=body, headers=side.headers) as response:
        raw = await response.aread()
    took = time.perf_counter() - started
    if response.status_code != 200 or (streams and b"[DONE]" not in raw):
        raise RuntimeError(f"{side.name} answered {response.status_code}: {raw[:300]!r}")
    return took


def _rank(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def _print(figures: dict[str, Any]) -> None:
    print("clients  form    bare/s  router/s")
    for row in figures["throughput"]:
        print(f"{row['clients']:7}  {'stream' if row['streams'] else 'whole ':6} {row['bare']:8.1f} {row['router']:8.1f}")
    print(f"\nat {figures['rate']:g} calls a second to each side, ms")
    print("form     bare p50   p99   router p50   p99   added p50   p99")
    for row in figures["latency"]:
        cells = [row[side][rank] for side in ("bare", "router", "added") for rank in ("p50", "p99")]
        print("{:7} {:9.2f} {:6.2f} {:11.2f} {:6.2f} {:10.2f} {:6.2f}".format("stream" if row["streams"] else "whole", *cells))


# --- the processes ----------------------------------------------------------------------------------------------------------


def _work(worker: str, arguments: argparse.Namespace) -> None:
    """Serve until told to end; the first line of standard output is the URL."""
    import uvicorn

    from loraloop.serve.listener import KEEP_ALIVE_SECONDS, favour_calls, open_listener

    listener = open_listener()
    favour_calls()
    recorder = None
    if worker == "stub":
        app: Any = _stub
    else:
        app, recorder = _router(arguments)
        recorder.start()
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, log_level="critical", lifespan="on" if recorder else "off", timeout_keep_alive=KEEP_ALIVE_SECONDS)
    asyncio.run(uvicorn.Server(config).serve([listener]))
    if recorder:
        sys.stderr.write(f"recorder: {json.dumps(recorder.status())}\n")
        recorder.close()


def _router(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from loraloop.serve.applier import Endpoint, Version
    from loraloop.serve.capture import Recorder
    from loraloop.serve.relay import RouterSettings
    from loraloop.serve.router import create_app
    from loraloop.store.sql import SqlEpisodeStore

    class Ticket:
        alias = "bench"
        is_canary = False
        endpoint = Endpoint(Version(name="bench@000000000000"), arguments.url, arguments.model)

        def release(self, *, failed: bool = False) -> None:
            if failed:
                sys.stderr.write("a call failed\n")

    class Routes:
        def acquire(self, model: str, conversation: str) -> Ticket:
            del model, conversation
            return Ticket()

        def list_names(self) -> dict[str, str]:
            return {"bench": Ticket.endpoint.version.name}

    recorder = Recorder(arguments.folder / "capture", SqlEpisodeStore(arguments.folder / "episodes.db"))
    return create_app(Routes(), recorder, RouterSettings(token=TOKEN)), recorder


async def _stub(_: Any, receive: Any, send: Any) -> None:
    """Answers at once, as a server with no model behind it would."""
    raw = b""
    while True:
        message = await receive()
        raw += message.get("body", b"")
        if not message.get("more_body"):
            break
    head = {"id": "x", "created": 1, "model": "stub"}
    if not json.loads(raw).get("stream"):
        choice = {"index": 0, "message": {"role": "assistant", "content": "word " * WORDS}, "finish_reason": "stop"}
        body = json.dumps({**head, "object": "chat.completion", "choices": [choice]}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for number in range(WORDS + 1):
        delta, reason = ({"content": "word "}, None) if number < WORDS else ({}, "stop")
        chunk = {**head, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        await send({"type": "http.response.body", "body": b"data: " + json.dumps(chunk).encode() + b"\n\n", "more_body": True})
        await asyncio.sleep(CHUNK_SECONDS)
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


if __name__ == "__main__":
    sys.exit(main())
