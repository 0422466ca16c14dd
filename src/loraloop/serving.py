"""Trained models meet the service: which may be served, and orders that are given while no service runs.

    serve     aliases on the disk -> servers and a router before them
    apply     a model -> the version that answers to an alias       (registry, serve)
    rollback  an alias goes back to what answered before

A running service is told; without one the order is written down, and carried out in the usual way at the next start: until it is proven,
what answered before goes on.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loraloop.episode import now_ms
from loraloop.errors import LeaseHeld, ServingError, UnknownModel
from loraloop.lease import Lease
from loraloop.lora.model import LoraModelId
from loraloop.lora.registry import LoraModelRegistry
from loraloop.lora.states import ModelState
from loraloop.plugins import EpisodeStore
from loraloop.serve.aliases import AliasFile, Served, make_move
from loraloop.serve.applier import BASE, Version
from loraloop.serve.fleet_status import ApplyReport, name_both
from loraloop.serve.orders import (
    LEASE_FILE,
    ApplyOrder,
    PromoteOrder,
    RollbackOrder,
    ServiceAddress,
    ServiceSettings,
    ServiceStatus,
    ask_status,
    find_service,
    tell,
)
from loraloop.serve.proof import Prover


def serve(
    folder: Path,
    store: EpisodeStore,
    registry: LoraModelRegistry,
    settings: ServiceSettings,
    on_ready: Callable[[ServiceAddress], None],
) -> int:
    """Serve until a signal says to end, and give its number. Raises ServingError when it cannot begin, or the parts are not installed."""
    for package in ("starlette", "uvicorn", "httpx2"):
        if importlib.util.find_spec(package) is None:
            raise ServingError(f"serving needs the package {package}; pip install 'loraloop[serve]'")
    from loraloop.serve.service import run_service

    def find(order: ApplyOrder) -> tuple[Version, str]:
        return find_version(registry, order)

    folder.mkdir(parents=True, exist_ok=True)
    prover = Prover(folder / "references", None if "://" in settings.base else settings.base)
    return asyncio.run(run_service(folder, store, settings, find_version=find, prove=prover.prove, on_ready=on_ready))


def find_version(registry: LoraModelRegistry, order: ApplyOrder) -> tuple[Version, str]:
    """The version that an order means, its files hashed again, and what the history says of why it may be served.

    Raises ServingError for a model that is not promoted, unless the order says why it is served all the same, and LoraTrainerError for
    one that is not there or not what was recorded.
    """
    model = registry.verify(order.model)
    if model.state is not ModelState.PROMOTED and not order.override:
        raise ServingError(
            f"{model.id} is {model.state}, and only promoted models are served; say `--override REASON` to serve it all the same"
        )
    why = f"{model.state}, served all the same: {order.override}" if model.state is not ModelState.PROMOTED else (order.override or "")
    assert model.adapter_sha256 is not None  # noqa: S101  verify would have refused it
    version = Version.of_adapter(
        order.alias,
        adapter_sha256=model.adapter_sha256,
        adapter_path=model.adapter_path.resolve(),
        model_id=model.id,
        base_sha256=model.base_sha256,
    )
    return version, why


def apply(folder: Path, registry: LoraModelRegistry, order: ApplyOrder) -> ApplyReport:
    """Let a model answer to an alias; `kind` is `wanted` when no service runs, which takes it up at its next start.

    Raises ServingError, UnknownModel and LoraTrainerError when it cannot; then nothing has changed.
    """
    service = find_service(folder)
    if service is not None:
        return tell(service, order)
    if order.canary is not None:
        raise ServingError("a canary is tried on requests, and no service runs; start one with `loraloop serve`")
    if order.model == BASE:
        raise ServingError("the base model is applied while a service runs, which knows it; start one with `loraloop serve`")
    version, why = find_version(registry, order)
    return _write_down(folder, order.alias, version, why)


def promote(folder: Path, order: PromoteOrder) -> ApplyReport:
    """Let the canary of an alias answer to all of its conversations. Raises ServingError, also when no service runs."""
    service = find_service(folder)
    if service is None:
        raise ServingError("no service runs; start one with `loraloop serve`")
    return tell(service, order)


def rollback(folder: Path, registry: LoraModelRegistry, order: RollbackOrder) -> ApplyReport:
    """Let an alias go back; without a service at its next start. A retired model is promoted again by that.

    Raises ServingError and UnknownModel when it cannot; then nothing has changed.
    """
    service = find_service(folder)
    if service is not None:
        report = tell(service, order)
    else:
        served = AliasFile(folder).read().aliases.get(order.alias)
        if served is None:
            raise UnknownModel(f"there is no alias {order.alias!r} in {folder}")
        chosen = served.find_previous(order.to)
        if chosen is None:
            known = ", ".join(name_both(each) for each in served.previous) or "nothing"
            raise ServingError(f"{order.alias!r} cannot go back to {order.to or 'what answered before'}; it can to: {known}")
        report = _write_down(folder, order.alias, chosen, order.why or "rollback")
    if report.model_id is not None and registry.get(report.model_id).state is ModelState.RETIRED:
        registry.move(report.model_id, ModelState.PROMOTED, f"rollback of {order.alias}: {order.why or 'no reason given'}")
    return report


def read_status(folder: Path) -> ServiceStatus | dict[str, Served]:
    """How the running service stands; without one, what the disk says of each alias. Raises ServingError."""
    service = find_service(folder)
    return AliasFile(folder).read().aliases if service is None else ask_status(service)


def find_use(folder: Path, model_id: LoraModelId) -> str | None:
    """The alias that needs a model, in words; None when none does."""
    for alias, served in AliasFile(folder).read().aliases.items():
        needed = (*served.versions, *(() if served.wanted is None else (served.wanted,)))
        if any(each.model_id == model_id for each in needed):
            return f"the alias {alias} is served by it; apply another first"
    return None


def _write_down(folder: Path, alias: str, version: Version, why: str) -> ApplyReport:
    """Note what the next service takes up."""
    with _alone(folder):
        file = AliasFile(folder)
        table = file.read()
        before = table.aliases.get(alias, Served())
        after = before.model_copy(update={"wanted": version, "at": now_ms()})
        try:
            file.write(table.with_alias(alias, after))
        except OSError as error:
            raise ServingError(f"{alias} stays as it is: the disk did not take the order: {error}") from error
        file.tell(make_move(alias, "wanted", before, after, why))
    before_name = before.version.name if before.version else None
    return ApplyReport(alias=alias, kind="wanted", version=version.name, model_id=version.model_id, before=before_name)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no service runs, and none starts."""
    lease = Lease(folder / LEASE_FILE)
    try:
        lease.acquire("loraloop apply")
    except LeaseHeld as error:
        raise ServingError(f"{error} has just started; give the order again") from error
    try:
        yield
    finally:
        lease.release()
