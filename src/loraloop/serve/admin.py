"""The routes by which a running service is told to switch: `/admin/status`, `/admin/apply`, `/admin/rollback`, `/admin/promote`.

They take names and figures only, never a path or an address, and stand behind the router's own checks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from loraloop.episode import Frozen
from loraloop.errors import LoraLoopError, UnknownModel
from loraloop.serve.applier import BASE, Version
from loraloop.serve.fleet import Fleet
from loraloop.serve.orders import ApplyOrder, PromoteOrder, RollbackOrder, ServiceStatus

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 65_536

FindVersion = Callable[[ApplyOrder], tuple[Version, str]]
"""The version of a model that may be served, and what the history says of why. Raises LoraLoopError when it may not."""
_Order = TypeVar("_Order", bound=Frozen)


def list_routes(fleet: Fleet, find_version: FindVersion, recorder_status: Callable[[], Mapping[str, Any]]) -> list[BaseRoute]:
    """The routes over `fleet`."""

    async def apply(order: ApplyOrder) -> Frozen:
        if order.model == BASE:
            return await fleet.apply(fleet.base, order.alias, canary=order.canary, why=order.override or "")
        version, why = await asyncio.to_thread(find_version, order)
        return await fleet.apply(version, order.alias, canary=order.canary, why=why)

    async def rollback(order: RollbackOrder) -> Frozen:
        return await fleet.rollback(order.alias, order.to, why=order.why)

    async def promote(order: PromoteOrder) -> Frozen:
        return await fleet.promote(order.alias)

    async def status(_: Request) -> Response:
        return _answer(ServiceStatus(fleet=fleet.status(), recorder=dict(recorder_status())))

    return [
        Route("/admin/status", status, methods=["GET"]),
        Route("/admin/apply", _taking(ApplyOrder, apply), methods=["POST"]),
        Route("/admin/rollback", _taking(RollbackOrder, rollback), methods=["POST"]),
        Route("/admin/promote", _taking(PromoteOrder, promote), methods=["POST"]),
    ]


def _taking(kind: type[_Order], carry_out: Callable[[_Order], Awaitable[Frozen]]) -> Callable[[Request], Awaitable[Response]]:
    """A route that reads an order, has it carried out, and tells what became of it."""

    async def route(request: Request) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                return _refuse(413, f"an order has at most {MAX_BODY_BYTES} bytes")
        try:
            order = kind.model_validate_json(body)
        except ValidationError as error:
            told = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'the order'}: {each['msg']}" for each in error.errors())
            return _refuse(422, f"this is no order: {told}")
        try:
            return _answer(await carry_out(order))
        except UnknownModel as error:
            return _refuse(404, str(error))
        except LoraLoopError as error:
            return _refuse(409, str(error))

    return route


def _answer(told: Frozen) -> Response:
    return Response(told.model_dump_json(), media_type="application/json")


def _refuse(status: int, message: str) -> Response:
    logger.warning("refused: %s", message)
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "code": None, "param": None}}, status)
