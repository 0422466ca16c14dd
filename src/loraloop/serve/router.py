"""The router: an OpenAI-compatible server in front of those that serve the versions of a model.

Clients call an alias; who answers is decided by `Routes` for each call, told in the answer, and recorded by the `Recorder`. It serves
one model of trust: whoever has the token may call everything here. It never takes a path or an address from a request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import cast

import httpx2
from pydantic import JsonValue, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from loraloop.episode import AnyOutcome, Outcome
from loraloop.errors import StoreError
from loraloop.serve.capture import Recorder, UnknownEpisode
from loraloop.serve.gate import LOCAL_HOSTS, Gate
from loraloop.serve.relay import Load, Relay, RouterSettings
from loraloop.serve.request import Api, read_body
from loraloop.serve.routing import Routes
from loraloop.serve.wire import Declined

KEEPALIVE_SECONDS = 2.0
"""A connection that rests longer is closed by us: servers close theirs after 5 s, and a call must not meet that."""
CONNECT_SECONDS = 10.0
MAX_OUTCOME_BYTES = 1 << 20
_APIS: tuple[Api, ...] = ("chat/completions", "completions")
_COMMENT = TypeAdapter(str)
_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(AnyOutcome)


def create_app(routes: Routes, recorder: Recorder, settings: RouterSettings, more: Sequence[BaseRoute] = ()) -> Starlette:
    """The router as an ASGI application; `more` are routes behind the same checks, such as those that switch versions.

    The recorder is the caller's to start and to close.
    """
    client = httpx2.AsyncClient(
        timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=settings.max_in_flight, keepalive_expiry=KEEPALIVE_SECONDS),
        trust_env=False,  # no proxy of the environment stands between us and loopback
        follow_redirects=False,
    )
    load = Load(settings.max_in_flight)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    calls = [(prefix, api) for prefix in ("", "/e/{episode}") for api in _APIS]
    relays = [
        Route(f"{prefix}/v1/{api}", Relay(api, routes, recorder, client, (settings, load)), methods=["POST"]) for prefix, api in calls
    ]
    told = _Told(routes, recorder)
    own = [
        Route("/v1/models", told.models, methods=["GET"]),
        Route("/e/{episode}/v1/models", told.models, methods=["GET"]),
        Route("/healthz", told.health, methods=["GET"]),
        Route("/records/{record}", told.record, methods=["GET"]),
        Route("/episodes/{episode}/outcome", told.outcome, methods=["POST"]),
    ]
    gate = Middleware(Gate, token=settings.token, hosts=(*LOCAL_HOSTS, *settings.hosts))
    handlers = {Declined: _decline, 404: _no_route, 405: _no_route}
    return Starlette(routes=[*relays, *own, *more], middleware=[gate], lifespan=lifespan, exception_handlers=handlers)


class _Told:
    """What the router says of itself, and what it is told."""

    def __init__(self, routes: Routes, recorder: Recorder) -> None:
        self._routes = routes
        self._recorder = recorder

    async def models(self, _: Request) -> JSONResponse:
        """What can be called, and the version that answers to it now."""
        names = self._routes.list_names()
        listed = [
            {"id": name, "object": "model", "created": 0, "owned_by": "loraloop", "version": version} for name, version in names.items()
        ]
        return JSONResponse({"object": "list", "data": listed})

    async def health(self, _: Request) -> JSONResponse:
        """That it is there; 503 when nothing can be called."""
        serves = bool(self._routes.list_names())
        return JSONResponse({"status": "ok" if serves else "nothing serves"}, 200 if serves else 503)

    async def record(self, request: Request) -> JSONResponse:
        """A record once it is on the disk, 202 until then."""
        found = await self._recorder.find_record(request.path_params["record"])
        status = {"recorded": 200, "queued": 202}.get(str(found["state"]), 404)
        if status != 404:
            return JSONResponse(found, status)
        raise Declined(404, str(found["why"]), code="record_not_found")

    async def outcome(self, request: Request) -> JSONResponse:
        """How an episode ended: on the disk before it is answered."""
        raw = await read_body(request.scope, request.receive, MAX_OUTCOME_BYTES)
        outcome, comment = _read_outcome(raw or b"")
        episode = request.path_params["episode"]
        try:
            await self._recorder.add_outcome(episode, outcome, comment)
        except UnknownEpisode as error:
            raise Declined(404, str(error), code="episode_not_found") from error
        except (StoreError, OSError) as error:
            message = f"the outcome could not be kept: {error}; send it again"
            raise Declined(503, message, code="not_recorded", retry_after=2) from error
        return JSONResponse({"episode": episode, "state": "recorded"})


def _read_outcome(raw: bytes) -> tuple[Outcome | None, str]:
    """(how it ended or None, comment) of `{"kind": "success", "score": 0.8, "comment": "…"}` and the like."""
    expected = '{"kind": "success", "score": 1.0}, {"kind": "failure", "reason": "…"}, {"kind": "timeout"} or {"comment": "…"}'
    try:
        said = TypeAdapter(dict[str, JsonValue]).validate_json(raw)
        comment = _COMMENT.validate_python(said.pop("comment", ""))
        outcome = _OUTCOME.validate_python(said) if said or not comment else None
    except ValidationError as error:
        raise Declined(400, f"this is no outcome ({_first_line(error)}); expected {expected}", code="bad_outcome") from error
    if outcome is not None and outcome.is_unknown:
        raise Declined(400, f"`unknown` says nothing; expected {expected}", code="bad_outcome")
    return outcome, comment


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    return ": ".join([*map(str, first["loc"]), first["msg"]])


async def _decline(_: Request, error: Exception) -> JSONResponse:
    declined = cast("Declined", error)
    return JSONResponse(declined.to_json(), declined.status, headers=declined.headers)


async def _no_route(request: Request, error: Exception) -> JSONResponse:
    status = int(getattr(error, "status_code", 404))
    why = "is not served here" if status == 404 else f"does not take {request.method}"
    said = Declined(
        status, f"{request.url.path} {why}; there is /v1/chat/completions, /v1/completions and /v1/models", code="no_such_route"
    )
    return JSONResponse(said.to_json(), status)
