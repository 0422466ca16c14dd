"""llama.cpp behind the router: one server process for each version, so that no cache can hold what another adapter has computed.

The adapter is given at the server's start with scale 0, and each request names it in full; a request that did not would be answered by
the base model in silence. The server listens on loopback only, on a port of its own choice, with a key that is new each time.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, JsonValue

from loraloop.base_model import cache_directory, resolve_base
from loraloop.episode import Frozen
from loraloop.errors import BaseModelError, ServingError
from loraloop.files import locked_directory
from loraloop.serve.applier import Endpoint, Scored, Version, read_options
from loraloop.serve.gguf import GgufBase, check_adapter, read_base, write_adapter
from loraloop.serve.gguf_base import GgufDtype, write_base
from loraloop.serve.llama_launcher import VARIABLE, LlamaServerPlan
from loraloop.serve.server_process import ServerProcess

if TYPE_CHECKING:
    import httpx2

_N_TOP = 50
"""How many of the likeliest tokens are scored."""
_ASCII_ONLY = "root ::= [a-z]+"
"""A grammar for the one token that scoring generates: of half a character, llama.cpp tells no log-probabilities."""
_HEALTH_SECONDS = 5.0
_SETTLE_SECONDS = 0.5
"""How long an error waits to learn whether the server has died of it."""


def count_processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LlamaCppSettings(Frozen):
    """How each llama.cpp server runs."""

    n_parallel: int = Field(default=2, ge=1, le=64)
    """Requests that are computed at the same time, 1 to 64; others wait."""
    n_ctx: int = Field(default=4096, ge=64)
    """Tokens of one request, prompt and answer together; memory is taken for `n_parallel` times as many."""
    n_threads: int = Field(default_factory=count_processors, ge=1)
    """Threads of one server; during a switch two servers share the processors."""
    start_seconds: float = Field(default=120.0, gt=0)
    """How long a server may take until it answers."""
    request_seconds: float = Field(default=120.0, gt=0)
    """How long the answer to one probe prompt may take."""
    reproducible: bool = False
    """The same bytes for the same greedy request: one request at a time, each prompt computed anew, attention in float32. Slower."""
    base_dtype: GgufDtype = "auto"
    """The type of the weights when a folder is converted: `auto` as they are stored, float32, float16 or bfloat16."""


class LlamaCppApplier:
    """Serves one base model, and adapters of it, by a llama.cpp server for each version. Made by `open`."""

    name: ClassVar[str] = "llama.cpp"

    def __init__(self, base: GgufBase, base_version: Version, folder: Path, settings: LlamaCppSettings) -> None:
        import httpx2

        self._base = base
        self._stamp = _stamp(base.path)
        self._version = base_version
        self._folder = folder
        self._settings = settings
        self._client: httpx2.AsyncClient = httpx2.AsyncClient(trust_env=False, timeout=settings.request_seconds)
        self._starting: set[ServerProcess] = set()
        self._running: dict[str, ServerProcess] = {}

    @classmethod
    async def open(cls, base: str, folder: Path, settings: LlamaCppSettings | Mapping[str, str] | None = None) -> Self:
        """An applier for `base`, a GGUF file or whatever `resolve_base` finds; a folder is converted once into `folder`, named by its hash.

        `settings` may be texts by name, as `--option` gives them. Raises SettingsError for one that cannot be, ServingError and
        BaseModelError when it cannot be served.
        """
        chosen = settings if isinstance(settings, LlamaCppSettings) else read_options(LlamaCppSettings, settings or {}, cls.name)
        if "://" in base:
            raise ServingError(f"{base!r} is an address, and llama.cpp serves a GGUF file or a folder; `--applier vllm` takes an address")
        for package in ("xllamacpp", "httpx2"):
            if importlib.util.find_spec(package) is None:
                raise ServingError(f"serving by llama.cpp needs the package {package}; pip install 'loraloop[serve]'")
        try:
            found, sha256 = await asyncio.to_thread(_find_base, base, folder, chosen.base_dtype)
        except OSError as error:
            raise ServingError(f"base model {base!r} cannot be opened for serving from {folder} ({error})") from error
        return cls(found, Version.of_base(sha256), folder, chosen)

    @property
    def base(self) -> Version:
        """The base model: named by the hash of the folder it was converted from, or of the GGUF file."""
        return self._version

    def check(self, version: Version) -> list[str]:
        """Everything for which llama.cpp would reject `version`, or serve it wrongly; empty when there is nothing.

        Takes milliseconds, but for the first adapter whose base model may be this GGUF file dequantised, as a training does it: where that
        was never done on this machine it is done now, to know its hash.
        """
        if version.base_sha256 is not None and version.base_sha256 not in self._base.known_as:
            self._base = _learn_hash(self._base)
        if version.adapter_path is not None:
            return check_adapter(version.adapter_path, self._base, version.base_sha256)
        if version.adapter_sha256 is not None or version.model_id is not None:
            return ["it is an adapter without a folder (adapter_path)"]
        if version.base_sha256 not in self._base.known_as:
            return [f"it is the base model {(version.base_sha256 or 'of unknown hash')[:12]}, and this applier serves {self._version.name}"]
        return []

    async def start(self, version: Version) -> Endpoint:
        """A new server for `version`, healthy. Raises ServingError with the end of its log; then nothing of it is left."""
        if findings := await asyncio.to_thread(self.check, version):
            raise ServingError(f"{version.name}: {'; '.join(findings)}")
        if _stamp(self._base.path) != self._stamp:
            raise ServingError(f"the base model {self._base.path} was changed since it was opened; put it back, or open it anew")
        if version.adapter_path is None:
            return await self._launch(version, None)
        with _folder_aside(self._folder) as aside:  # the server reads it once
            adapter = aside / "adapter.gguf"
            await asyncio.to_thread(self._write, version, adapter)
            return await self._launch(version, adapter)

    async def is_healthy(self, endpoint: Endpoint) -> bool:
        """Whether its process is there and answers."""
        import httpx2

        process = self._running.get(endpoint.url)
        if process is None or not process.is_running:
            return False
        try:
            return (await self._client.get(f"{endpoint.url}/health", timeout=_HEALTH_SECONDS)).status_code == httpx2.codes.OK
        except httpx2.HTTPError:
            return False

    async def score(self, endpoint: Endpoint, prompts: tuple[tuple[int, ...], ...]) -> Scored:
        """The 50 likeliest next tokens behind each prompt, from the logits, before any sampling. Raises ServingError."""
        return Scored(tuple([await self._score_one(endpoint, prompt) for prompt in prompts]))

    async def stop(self, endpoint: Endpoint) -> None:
        """End the server; one that has ended, or that is not of this applier, is none."""
        if process := self._running.get(endpoint.url):
            await process.stop()
            self._running.pop(endpoint.url, None)

    async def close(self) -> None:
        """End every server, also those that are just starting."""
        await asyncio.gather(*(process.stop() for process in [*self._running.values(), *self._starting]))
        self._running.clear()
        await self._client.aclose()

    def _write(self, version: Version, target: Path) -> None:
        assert version.adapter_path is not None  # noqa: S101  its caller looked
        try:
            write_adapter(version.adapter_path, self._base, target, version=version.name, trained_on=version.base_sha256)
        except OSError as error:
            raise ServingError(f"{version.name}: its GGUF file cannot be written into {self._folder} ({error})") from error

    async def _launch(self, version: Version, adapter: Path | None) -> Endpoint:
        key = secrets.token_urlsafe(24)
        argv = [sys.executable, "-m", "loraloop.serve.llama_launcher"]
        log_path = self._folder / "logs" / f"{version.name}.log"
        process = await ServerProcess.start(argv, {VARIABLE: self._make_plan(version, adapter, key)}, log_path)
        self._starting.add(process)
        try:
            async with asyncio.timeout(self._settings.start_seconds):
                url = str(json.loads(await process.read_line())["url"])
                endpoint = Endpoint(version, url, version.name, {"Authorization": f"Bearer {key}"}, self._make_body(adapter))
                self._running[url] = process
                while not await self.is_healthy(endpoint):
                    process.check_running()
                    await asyncio.sleep(0.02)
                endpoint = replace(endpoint, ignores_tools=await self._lacks_tools(endpoint))
        except TimeoutError as error:
            seconds = f"the server did not answer within {self._settings.start_seconds:g} s (start_seconds)"
            await self._discard(process)
            raise ServingError(f"{version.name}: {seconds}; it said last:\n{process.tail}") from error
        except BaseException as error:
            await asyncio.shield(self._discard(process))
            if isinstance(error, ServingError):
                raise ServingError(f"{version.name}: {error}\nThe whole log is in {log_path}") from error
            raise
        finally:
            self._starting.discard(process)
        return endpoint

    async def _lacks_tools(self, endpoint: Endpoint) -> bool:
        """Whether llama.cpp says that the model's chat template has no place for tools: it leaves them out then, and tells nobody."""
        import httpx2

        try:
            told = (await self._client.get(f"{endpoint.url}/props", headers=endpoint.headers)).json()
            return told["chat_template_caps"]["supports_tools"] is False
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            return False  # another version of it, or it has just died, which the next look tells

    async def _discard(self, process: ServerProcess) -> None:
        await process.stop()
        for url in [url for url, running in self._running.items() if running is process]:
            del self._running[url]

    def _make_plan(self, version: Version, adapter: Path | None, key: str) -> str:
        n_parallel = 1 if self._settings.reproducible else self._settings.n_parallel
        plan = LlamaServerPlan(
            model=str(self._base.path),
            adapter=None if adapter is None else str(adapter),
            name=version.name,
            api_key=key,
            n_parallel=n_parallel,
            n_ctx=n_parallel * self._settings.n_ctx,
            n_threads=self._settings.n_threads,
            is_exact=self._settings.reproducible,
        )
        return plan.model_dump_json()

    def _make_body(self, adapter: Path | None) -> dict[str, JsonValue]:
        """Laid over each request: the complete list of adapters; the base model's server has none."""
        body: dict[str, JsonValue] = {"lora": [] if adapter is None else [{"id": 0, "scale": 1.0}]}
        return body | ({"cache_prompt": False} if self._settings.reproducible else {})

    async def _score_one(self, endpoint: Endpoint, prompt: tuple[int, ...]) -> dict[int, float]:
        import httpx2

        asked = {"prompt": list(prompt), "n_predict": 1, "n_probs": _N_TOP, "temperature": 0, "grammar": _ASCII_ONLY, "cache_prompt": False}
        try:
            response = await self._client.post(f"{endpoint.url}/completion", json=asked | dict(endpoint.body), headers=endpoint.headers)
            response.raise_for_status()
            top = response.json()["completion_probabilities"][0]["top_logprobs"]
            return {int(entry["id"]): float(entry["logprob"]) for entry in top}
        except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            state = await self._describe(endpoint)
            said = f": {error.response.text[:300]}" if isinstance(error, httpx2.HTTPStatusError) else ""
            what = f"a prompt of {len(prompt)} tokens cannot be scored ({error!r}{said}); {state}"
            raise ServingError(f"{endpoint.version.name}: {what}") from error

    async def _describe(self, endpoint: Endpoint) -> str:
        process = self._running.get(endpoint.url)
        if process is None:
            return "its server is stopped"
        await process.wait_end(_SETTLE_SECONDS)
        return process.describe_end()


@contextmanager
def _folder_aside(folder: Path) -> Iterator[Path]:
    """A folder for what is needed until a server is up. Raises ServingError when there can be none."""
    try:
        aside = tempfile.TemporaryDirectory(prefix="adapter-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise ServingError(f"{folder}, where adapters are converted, cannot be written ({error.strerror}); nothing was started") from error
    with aside as path:
        yield Path(path)


def _find_base(base: str, folder: Path, dtype: GgufDtype) -> tuple[GgufBase, str]:
    """The GGUF file of `base`, converted when it is none yet, and the hash that names it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(base).expanduser()
    if path.is_file():
        found = read_base(path.resolve())
        if (cache_directory() / "gguf" / found.sha256[:24] / "config.json").exists():
            found = _learn_hash(found)
        return found, found.sha256
    model = resolve_base(base)
    target = folder / "bases" / f"{model.sha256[:24]}-{dtype}.gguf"
    with locked_directory(target.parent):
        if not target.exists():
            write_base(model.path, target, dtype)
    found = read_base(target)
    return replace(found, known_as=found.known_as | {model.sha256}), model.sha256


def _learn_hash(base: GgufBase) -> GgufBase:
    """`base`, known also by the hash that a training from this very file records: of the folder it was dequantised into here."""
    if base.known_as != {base.sha256}:
        return base  # known already, or converted from a folder
    try:
        return replace(base, known_as=base.known_as | {resolve_base(str(base.path)).sha256})
    except BaseModelError:
        return base  # transformers cannot read it, so nothing was trained on it here


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise ServingError(f"the base model {path} is gone ({error.strerror})") from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
