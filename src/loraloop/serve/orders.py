"""What a service is told to do, and where: the orders as they go over the line, and the file that names a running service."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from loraloop.episode import Frozen
from loraloop.errors import ServingError, SettingsError, UnknownModel
from loraloop.files import write_atomic
from loraloop.lease import read_holder
from loraloop.serve.applier import ALIAS_FORM
from loraloop.serve.fleet_status import ApplyReport, FleetStatus

HOST = "127.0.0.1"
SERVICE_FILE = "service.json"
LEASE_FILE = "service.lease"
DEFAULT_ALIAS = "agent"
MAX_PORT = 65535
MAX_SECONDS = 1800.0
"""The longest that an order may take: a base model that must be converted, or a reference that must be computed, takes minutes."""


@dataclass(frozen=True)
class ServiceSettings:
    """What is served, and where."""

    base: str = ""
    """What the applier opens: a GGUF file, a model's folder, or a server's URL. Has to be said."""
    applier: str = "llama.cpp"
    port: int = 0
    """0 for any that is free."""
    token: str | None = None
    """What clients must show, of visible ASCII as it goes in a header; a random one without."""
    drain_seconds: float = 120.0
    """How long what is under way may go on when a version, or the service, ends."""
    options: Mapping[str, str] = field(default_factory=dict)
    """The applier's own settings, by name."""

    def __post_init__(self) -> None:
        """Raises SettingsError for values out of their range, and ServingError for a token that clients could not send."""
        if not 0 <= self.port <= MAX_PORT:
            raise SettingsError(f"port={self.port}: expected 0 for any that is free, or a port up to {MAX_PORT}")
        if not self.drain_seconds >= 0:
            raise SettingsError(f"drain_seconds={self.drain_seconds}: expected 0 or more seconds")
        odd = next((letter for letter in self.token or "" if not "!" <= letter <= "~"), None)
        if odd is not None:
            raise ServingError(f"the token holds {odd!r}, which clients cannot send in a header; take letters, digits and signs of ASCII")


class ApplyOrder(Frozen):
    """Let a model answer to an alias."""

    model: str = Field(min_length=1, max_length=200)
    """The id of a trained model or its beginning, `latest`, or `base`."""
    alias: str = Field(default=DEFAULT_ALIAS, pattern=f"^{ALIAS_FORM}$")
    canary: float | None = Field(default=None, gt=0, lt=1)
    """The share of conversations that it gets on trial; all without."""
    override: str | None = Field(default=None, min_length=1, max_length=1000)
    """Why it is served though it is not promoted."""


class RollbackOrder(Frozen):
    """Let an alias go back."""

    alias: str = Field(default=DEFAULT_ALIAS, pattern=f"^{ALIAS_FORM}$")
    to: str | None = Field(default=None, max_length=200)
    """A version's name or a model's id that answered before; the last one without."""
    why: str = Field(default="", max_length=1000)


class PromoteOrder(Frozen):
    """Let the canary of an alias answer to all of its conversations."""

    alias: str = Field(default=DEFAULT_ALIAS, pattern=f"^{ALIAS_FORM}$")


class ServiceStatus(Frozen):
    """How a running service stands."""

    fleet: FleetStatus
    recorder: dict[str, Any]
    """What the recorder says: queued, recorded, dropped and the like."""


class ServiceAddress(Frozen):
    """Where a service answers; the file is readable by its user alone."""

    url: str
    """`http://127.0.0.1:PORT`"""
    token: str
    pid: int

    def write(self, folder: Path) -> None:
        """Put it where `find_service` looks."""
        write_atomic(folder / SERVICE_FILE, self.model_dump_json(indent=2) + "\n", mode=0o600)


def find_service(folder: Path) -> ServiceAddress | None:
    """The service that runs for this folder; None when none does. Raises ServingError when one runs that cannot be told anything yet."""
    holder = read_holder(folder / LEASE_FILE)
    if holder is None or not holder.is_alive:
        return None
    try:
        address = ServiceAddress.model_validate_json((folder / SERVICE_FILE).read_bytes())
    except (OSError, ValidationError):
        address = None
    if address is None or address.pid not in {pid for pid, _ in holder.processes}:
        raise ServingError(f"{holder.describe()} is not ready to be told anything; try again when it says that it is")
    return address


def tell(address: ServiceAddress, order: ApplyOrder | RollbackOrder | PromoteOrder) -> ApplyReport:
    """Give an order and wait until it is carried out. Raises ServingError with the service's own words when it is not."""
    paths = {ApplyOrder: "apply", RollbackOrder: "rollback", PromoteOrder: "promote"}
    return ApplyReport.model_validate(_call(address, "POST", f"/admin/{paths[type(order)]}", order.model_dump_json()))


def ask_status(address: ServiceAddress) -> ServiceStatus:
    """How the service stands. Raises ServingError when it does not say."""
    return ServiceStatus.model_validate(_call(address, "GET", "/admin/status"))


def _call(address: ServiceAddress, method: str, path: str, body: str | None = None) -> Any:
    place = urllib.parse.urlsplit(address.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=MAX_SECONDS)
    headers = {"Authorization": f"Bearer {address.token}", "Content-Type": "application/json"}
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        found = json.loads(answer.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ServingError(f"the service at {address.url} (process {address.pid}) does not answer: {error}; look at its log") from error
    finally:
        connection.close()
    if answer.status == http.client.OK:
        return found
    message = str(found.get("error", {}).get("message", found)) if isinstance(found, dict) else str(found)
    raise UnknownModel(message) if answer.status == http.client.NOT_FOUND else ServingError(message)
