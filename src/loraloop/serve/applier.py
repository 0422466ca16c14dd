"""What an applier is: it brings a version to where it answers, and takes it away again.

A version is one immutable thing that can be served, an endpoint is where it answers. A version's name says its bytes, so that a cache
that is kept by name can never hold what another adapter has computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, Self, TypeVar

from pydantic import Field, JsonValue, ValidationError

from loraloop.episode import Frozen
from loraloop.errors import SettingsError

BASE = "base"
"""The alias, and the first part of the version's name, of the base model without an adapter."""
HASH_DIGITS = 12
ALIAS_FORM = r"[a-z0-9][a-z0-9._-]{0,47}"


class Version(Frozen):
    """One immutable thing that can be served: a base model alone, or with one adapter."""

    name: str = Field(pattern=rf"^{ALIAS_FORM}@[0-9a-f]{{{HASH_DIGITS}}}$")
    """`base@<digits of the base model's hash>` or `<alias>@<digits of the adapter's hash>`."""
    model_id: str | None = None
    """The registry's id of the trained model; None for the base model."""
    adapter_sha256: str | None = None
    adapter_path: Path | None = None
    """The folder of the PEFT adapter; never deleted while this version is loaded anywhere."""
    base_sha256: str | None = None
    """What the adapter was trained on; where it is known, a server of another base model must refuse it."""

    @classmethod
    def of_base(cls, base_sha256: str) -> Self:
        """The base model alone."""
        return cls(name=f"{BASE}@{base_sha256[:HASH_DIGITS]}", base_sha256=base_sha256)

    @classmethod
    def of_adapter(cls, alias: str, *, adapter_sha256: str, adapter_path: Path, model_id: str, base_sha256: str | None) -> Self:
        """An adapter, named by the alias it is for and by its hash. Raises ValueError for an alias that cannot be one."""
        if not re.fullmatch(ALIAS_FORM, alias) or alias == BASE:
            raise ValueError(f"{alias!r} cannot be an alias; expected 1 to 48 of a-z, 0-9 and ._-, not {BASE!r}")
        name = f"{alias}@{adapter_sha256[:HASH_DIGITS]}"
        return cls(name=name, model_id=model_id, adapter_sha256=adapter_sha256, adapter_path=adapter_path, base_sha256=base_sha256)


@dataclass(frozen=True)
class Endpoint:
    """Where one version answers, and what a request must carry to be answered by it and by nothing else."""

    version: Version
    url: str
    """`http://127.0.0.1:PORT`, without `/v1`."""
    model: str
    """What the server takes as `model` for this version."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with each request, such as the server's own key."""
    body: Mapping[str, JsonValue] = field(default_factory=dict)
    """Laid over each request's JSON, such as llama.cpp's explicit list of adapters."""
    ignores_tools: bool = False
    """Whether the model's chat template is known to have no place for tools, so that the server leaves them out in silence."""


@dataclass(frozen=True)
class Scored:
    """What a server thinks of some tokens: the log-probability of each of the likeliest next tokens behind a prompt."""

    top: tuple[Mapping[int, float], ...]
    """One mapping (token id -> natural log-probability) for each probe prompt."""


Options = TypeVar("Options", bound=Frozen)


def read_options(kind: type[Options], given: Mapping[str, str], applier: str) -> Options:
    """An applier's settings from texts by name. Raises SettingsError naming each that is unknown or cannot be, and those that there are."""
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        unknown = "there is no such option"
        wrong = ((str(each["loc"][0]), unknown if each["type"] == "extra_forbidden" else each["msg"]) for each in error.errors())
        said = "; ".join(f"{name}={given.get(name, '')}: {why}" for name, why in wrong)
        raise SettingsError(f"options of {applier}: {said}; known: {', '.join(kind.model_fields)}") from error


class Applier(Protocol):
    """Brings versions to where they answer. One instance serves one base model; used by one event loop.

    A plug-in is a class with `async def open(base: str, folder: Path, settings) -> Applier`: `base` as `--base` has it, `folder` is its
    own, `settings` a mapping of texts as `--option NAME=VALUE` gives them.
    """

    name: ClassVar[str]
    """As `--applier` takes it."""

    @property
    def base(self) -> Version:
        """The base model that it serves."""
        ...

    def check(self, version: Version) -> list[str]:
        """Everything for which the server would reject `version`, or serve it wrongly, a phrase each; empty when there is nothing."""
        ...

    async def start(self, version: Version) -> Endpoint:
        """Bring `version` to where it answers, healthy, and take no other's place. Raises ServingError; then nothing of it is left."""
        ...

    async def is_healthy(self, endpoint: Endpoint) -> bool:
        """Whether it answers still."""
        ...

    async def score(self, endpoint: Endpoint, prompts: tuple[tuple[int, ...], ...]) -> Scored:
        """The likeliest next tokens behind each prompt of token ids, as the endpoint computes them. Raises ServingError."""
        ...

    async def stop(self, endpoint: Endpoint) -> None:
        """Take the version away; the caller has seen its last request end. Safe to call twice, and when it has died meanwhile."""
        ...

    async def close(self) -> None:
        """Stop everything that this applier has started."""
        ...
