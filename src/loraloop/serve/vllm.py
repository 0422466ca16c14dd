"""vLLM behind the router: a running server that loads and unloads adapters over HTTP.

Start it with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. Each version gets a name and a folder of its own, so that no cache
that vLLM keeps by name and path can hold what another adapter has computed. The folder is a copy that nobody else deletes: vLLM reads a
listed adapter again when it needs to, and ends when its files are gone. So files go only after the server does not list it any more.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self
from urllib.parse import urlsplit

from pydantic import Field

from loraloop.base_model import resolve_base
from loraloop.episode import Frozen
from loraloop.errors import BaseModelError, ServingError
from loraloop.files import content_hash, new_directory, write_json
from loraloop.serve.applier import BASE, HASH_DIGITS, Endpoint, Scored, Version, read_options
from loraloop.serve.peft_adapter import CONFIG_FILE, WEIGHTS_FILE, read_adapter

if TYPE_CHECKING:
    import httpx2

KEY_VARIABLE = "LORALOOP_VLLM_KEY"
"""The environment variable with the server's own API key, where it has one."""
LOADED = "loaded"
"""The folder of the copies."""
_OK, _NOT_FOUND = 200, 404


class VllmSettings(Frozen):
    """What the server was started with, and how long it may take."""

    max_lora_rank: int = Field(default=16, ge=1)
    """The server's own `--max-lora-rank`, which it does not tell; an adapter of a higher rank is refused before it is sent."""
    n_top: int = Field(default=20, ge=1, le=20)
    """How many of the likeliest tokens are scored; its `--max-logprobs` is 20 unless told otherwise."""
    request_seconds: float = Field(default=120.0, gt=0)
    """How long loading, or the answer to a probe prompt, may take."""
    health_seconds: float = Field(default=10.0, gt=0)
    """How long the server may take to say that it is there."""


class VllmApplier:
    """Serves one base model, and adapters of it, by a vLLM server that somebody else runs. Made by `open`."""

    name: ClassVar[str] = "vllm"

    def __init__(self, url: str, model: str, base: Version, folder: Path, settings: VllmSettings) -> None:
        import httpx2

        self._url = url
        self._model = model
        self._base = base
        self._folder = folder
        self._settings = settings
        key = os.environ.get(KEY_VARIABLE)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client: httpx2.AsyncClient = httpx2.AsyncClient(
            base_url=url, headers=self._headers, trust_env=False, follow_redirects=False, timeout=settings.request_seconds
        )
        self._loaded: dict[str, Path] = {}

    @classmethod
    async def open(cls, base: str, folder: Path, settings: VllmSettings | Mapping[str, str] | None = None) -> Self:
        """An applier for the server at the URL `base`; what an earlier service has left loaded there is unloaded.

        `settings` may be texts by name, as `--option` gives them. Raises SettingsError for one that cannot be, and ServingError when there
        is no such server.
        """
        chosen = settings if isinstance(settings, VllmSettings) else read_options(VllmSettings, settings or {}, cls.name)
        place = urlsplit(base)
        if place.scheme not in {"http", "https"} or not place.netloc:
            raise ServingError(f"{base!r} is no address of a vLLM server; expected one as http://127.0.0.1:8000")
        url = base.rstrip("/").removesuffix("/v1")
        self = cls(url, "", Version.of_base("0" * 64), (folder / "vllm").resolve(), chosen)
        try:
            cards = await self._list_cards()
            root = _find_base(cards, url)
            self._model = str(root["id"])
            self._base = await asyncio.to_thread(_name_base, str(root.get("root") or self._model))
            await self._sweep(cards)
        except BaseException:
            await self._client.aclose()
            raise
        return self

    @property
    def base(self) -> Version:
        """The base model; its hash is known only where its files are on this machine."""
        return self._base

    def check(self, version: Version) -> list[str]:
        """Everything for which vLLM would reject `version`, or serve it wrongly; empty when there is nothing."""
        if version.adapter_path is None:
            return [] if version.name == self._base.name else [f"it is no adapter, and the server's base model is {self._base.name}"]
        read = read_adapter(version.adapter_path)
        findings = list(read.findings)
        rank = max((pair.a.shape[0] for pair in read.pairs), default=0)
        if rank > self._settings.max_lora_rank:
            findings.append(f"its rank {rank} is above the server's --max-lora-rank {self._settings.max_lora_rank}")
        known = self._base.base_sha256, version.base_sha256
        if None not in known and known[0] != known[1]:
            findings.append(f"it was trained on the base model {str(known[1])[:12]}, and the server has {str(known[0])[:12]}")
        return findings

    async def start(self, version: Version) -> Endpoint:
        """Load `version` under its name from a folder of its own. Raises ServingError; then it is not loaded and has no files."""
        if version.adapter_path is None:
            return Endpoint(version, self._url, self._model, dict(self._headers))
        if findings := await asyncio.to_thread(self.check, version):
            raise ServingError(f"{version.name} cannot be served: {'; '.join(findings)}")
        await self._unload(version.name)  # of an earlier life
        copy = self._folder / LOADED / f"{version.name}-{uuid.uuid4().hex[:8]}"
        endpoint = Endpoint(version, self._url, version.name, dict(self._headers))
        try:
            await asyncio.to_thread(_copy_adapter, version.adapter_path, copy, self._model)
            self._loaded[version.name] = copy
            await self._load(endpoint, copy)
        except OSError as error:
            await asyncio.shield(self._take_away(version.name))
            raise ServingError(f"{version.name} cannot be copied into {self._folder} ({error})") from error
        except BaseException:
            await asyncio.shield(self._take_away(version.name))
            raise
        return endpoint

    async def is_healthy(self, endpoint: Endpoint) -> bool:
        """Whether the server answers, and lists this version from the folder that we gave it."""
        import httpx2

        if self._client.is_closed:
            return False
        try:
            answer = await self._client.get("/health", timeout=self._settings.health_seconds)
            if answer.status_code != _OK or endpoint.version.adapter_path is None:
                return answer.status_code == _OK
            copy = self._loaded.get(endpoint.version.name)
            cards = await self._list_cards()
        except (httpx2.HTTPError, ServingError):
            return False
        return any(card["id"] == endpoint.model and copy is not None and card.get("root") == str(copy) for card in cards)

    async def score(self, endpoint: Endpoint, prompts: tuple[tuple[int, ...], ...]) -> Scored:
        """The likeliest next tokens behind each prompt, before any sampling. Raises ServingError."""
        return Scored(tuple([await self._score_one(endpoint, prompt) for prompt in prompts]))

    async def stop(self, endpoint: Endpoint) -> None:
        """Unload the version; its files go when the server does not list it any more. The base model is not ours to stop."""
        if endpoint.version.adapter_path is not None:
            await self._take_away(endpoint.version.name)

    async def close(self) -> None:
        """Unload everything that this applier has loaded."""
        for name in tuple(self._loaded):
            with suppress(ServingError):
                await self._take_away(name)
        await self._client.aclose()

    async def _load(self, endpoint: Endpoint, copy: Path) -> None:
        name = endpoint.version.name
        await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(copy)})
        if not await self.is_healthy(endpoint):
            raise ServingError(f"the server at {self._url} does not list {name} after loading it")
        await self.score(endpoint, ((1,),))  # a file that is read on first use only is read now

    async def _take_away(self, name: str) -> None:
        copy = self._loaded.get(name)
        if copy is None:
            return
        await self._unload(name)
        if any(card["id"] == name or card.get("root") == str(copy) for card in await self._list_cards()):
            raise ServingError(f"the server at {self._url} still lists {name} after unloading it; its files are kept in {copy}")
        self._loaded.pop(name, None)
        await asyncio.to_thread(shutil.rmtree, copy, ignore_errors=True)

    async def _unload(self, name: str) -> None:
        await self._post("/v1/unload_lora_adapter", {"lora_name": name}, missing_is_well=True)

    async def _sweep(self, cards: list[dict[str, Any]]) -> None:
        """Unload what an earlier service of this folder has left, then remove the copies that the server does not list."""
        ours = self._folder / LOADED
        for card in cards:
            if card.get("parent") is not None and Path(str(card.get("root"))).parent == ours:
                await self._unload(str(card["id"]))
        listed = {str(card.get("root")) for card in await self._list_cards()}
        for left in ours.glob("*"):
            if str(left) not in listed:
                await asyncio.to_thread(shutil.rmtree, left, ignore_errors=True)

    async def _score_one(self, endpoint: Endpoint, prompt: tuple[int, ...]) -> dict[int, float]:
        asked = {
            "model": endpoint.model,
            "prompt": list(prompt),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": self._settings.n_top,
            "return_tokens_as_token_ids": True,
        }
        answer = await self._post("/v1/completions", asked)
        try:
            top = json.loads(answer)["choices"][0]["logprobs"]["top_logprobs"][0]
            return {int(token.removeprefix("token_id:")): float(value) for token, value in top.items()}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ServingError(f"{endpoint.model}: the server gave no log-probabilities ({error!r})") from error

    async def _list_cards(self) -> list[dict[str, Any]]:
        import httpx2

        try:
            answer = await self._client.get("/v1/models", timeout=self._settings.health_seconds)
            answer.raise_for_status()
            return [dict(card) for card in answer.json()["data"]]
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ServingError(f"the server at {self._url} does not list its models ({error!r}); is it vLLM, and is it up?") from error

    async def _post(self, path: str, body: dict[str, Any], *, missing_is_well: bool = False) -> str:
        import httpx2

        try:
            answer = await self._client.post(path, json=body)
        except httpx2.HTTPError as error:
            raise ServingError(f"the server at {self._url} does not answer to {path} ({error!r})") from error
        if answer.status_code == _OK or (missing_is_well and answer.status_code == _NOT_FOUND and "lora" in answer.text.lower()):
            return answer.text
        hint = ""
        if answer.status_code == _NOT_FOUND and path.endswith("_lora_adapter") and "lora" not in answer.text.lower():
            hint = "; start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        raise ServingError(f"the server at {self._url} refused {path} with {answer.status_code}: {answer.text[:500]}{hint}")


def _find_base(cards: list[dict[str, Any]], url: str) -> dict[str, Any]:
    """The card of the base model: it has no parent."""
    for card in cards:
        if card.get("parent") is None:
            return card
    raise ServingError(f"the server at {url} lists no base model")


def _copy_adapter(source: Path, target: Path, base: str) -> None:
    """The adapter's two files in a folder of their own, without the path of the machine that it was trained on."""
    with new_directory(target) as aside:
        shutil.copyfile(source / WEIGHTS_FILE, aside / WEIGHTS_FILE)
        config = json.loads((source / CONFIG_FILE).read_bytes())
        write_json(aside / CONFIG_FILE, {**config, "base_model_name_or_path": base})


def _name_base(root: str) -> Version:
    """The base model that a server names: by the hash of its files where they are here, else by the name, and then of unknown hash."""
    try:
        return Version.of_base(resolve_base(root).sha256)
    except BaseModelError:
        return Version(name=f"{BASE}@{content_hash(root)[:HASH_DIGITS]}")
