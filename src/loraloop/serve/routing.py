"""How the router finds the version that answers a request: what it asks, and what it gets."""

from __future__ import annotations

from typing import Protocol

from loraloop.serve.applier import Endpoint


class Ticket(Protocol):
    """One request under way: while it is not released, its version is neither stopped nor unloaded."""

    alias: str
    """What the client called."""
    endpoint: Endpoint
    is_canary: bool

    def release(self, *, failed: bool = False) -> None:
        """The request has ended, to its last byte; `failed` when the server did not answer it well. Called once."""
        ...


class Routes(Protocol):
    """Which names there are, and who answers to them now."""

    def acquire(self, model: str, conversation: str) -> Ticket:
        """A ticket for one request to `model`: an alias, or the full name of a version that is loaded.

        `conversation` keeps a conversation with one version while a canary runs. Raises UnknownModel for a name that there is not, and
        NothingServes when none answers to it now. Never waits.
        """
        ...

    def list_names(self) -> dict[str, str]:
        """What can be asked for: each alias and each loaded version's name -> the version's name that answers now."""
        ...
