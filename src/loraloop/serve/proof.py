"""Proof that a version's adapter is applied by the server that answers for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from pydantic import Field

from loraloop.episode import Frozen
from loraloop.serve.applier import Applier, Endpoint


class Proof(Frozen):
    """What was measured, and whether it shows that the adapter is applied."""

    proven: bool
    reason: str
    """In words with the figures."""
    figures: dict[str, float] = Field(default_factory=dict)


Prove = Callable[[Applier, Endpoint, Endpoint], Awaitable[Proof]]
"""Measures through (applier, the base model's endpoint, the version's endpoint). Raises ServingError when it cannot measure."""
