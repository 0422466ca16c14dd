"""A fleet over real llama.cpp servers, with the real proof: no answer of another version, and no bad adapter ever answers."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import psutil
import pytest
from random_adapters import make_adapter
from tiny import make_model

from loraloop.base_model import resolve_base
from loraloop.errors import ServingError
from loraloop.files import file_sha256
from loraloop.serve.aliases import AliasFile
from loraloop.serve.applier import Endpoint, Version
from loraloop.serve.fleet import Fleet
from loraloop.serve.fleet_status import FleetSettings
from loraloop.serve.llama_server import LlamaCppApplier, LlamaCppSettings
from loraloop.serve.proof import Prover

SETTINGS = LlamaCppSettings(n_ctx=256, n_threads=1, reproducible=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def versions(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Version]:
    folder = tmp_path_factory.mktemp("adapters")
    return [make_version(base, folder / str(seed), seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


def make_version(base: Path, folder: Path, seed: int) -> Version:
    make_adapter(folder, json.loads((base / "config.json").read_text()), seed, strength=0.3)
    return version_of(base, folder)


def version_of(base: Path, folder: Path) -> Version:
    weights = folder / "adapter_model.safetensors"
    sha256 = file_sha256(weights) if weights.exists() else "0" * 64
    base_sha256 = resolve_base(str(base)).sha256
    return Version.of_adapter("agent", adapter_sha256=sha256, adapter_path=folder, model_id=None, base_sha256=base_sha256)


@asynccontextmanager
async def open_fleet(base: Path, folder: Path, references: Path) -> AsyncIterator[tuple[Fleet, LlamaCppApplier]]:
    applier = await LlamaCppApplier.open(str(base), folder / "applier", SETTINGS)
    settings = FleetSettings(drain_seconds=20, look_seconds=0.1, missed_looks=1, first_wait_seconds=0.1)
    fleet = Fleet(applier, AliasFile(folder), Prover(references, str(base)).prove, settings)
    try:
        yield await fleet.recover(), applier
    finally:
        await fleet.close()


async def generate(client: httpx2.AsyncClient, endpoint: Endpoint) -> str:
    asked = {"model": endpoint.model, "prompt": "to be, or not to be", "max_tokens": 12, "temperature": 0, "logprobs": 1, **endpoint.body}
    answer = await client.post(f"{endpoint.url}/v1/completions", json=asked, headers=dict(endpoint.headers))
    answer.raise_for_status()
    return json.dumps(answer.json()["choices"])


async def test_answers_over_switches_are_those_of_one_version_alone(
    base: Path, versions: list[Version], references: Path, tmp_path: Path
) -> None:
    async with httpx2.AsyncClient(trust_env=False, timeout=60) as client:
        alone = {}
        for number, version in enumerate(versions):
            applier = await LlamaCppApplier.open(str(base), tmp_path / f"alone-{number}", SETTINGS)
            alone[version.name] = await generate(client, await applier.start(version))
            await applier.close()
        assert len(set(alone.values())) == 2
        async with open_fleet(base, tmp_path / "serving", references) as (fleet, _):
            first = await fleet.apply(versions[0], "agent")
            assert first.proof
            assert first.proof.proven
            assert first.proof.figures["correlation"] > 0.99
            await fleet.apply(versions[1], "agent")
            await fleet.rollback("agent")
            answered, over = [], asyncio.Event()

            async def ask_on() -> None:
                while not over.is_set():
                    ticket = fleet.acquire("agent", "1")
                    try:
                        answered.append((ticket.endpoint.version.name, await generate(client, ticket.endpoint)))
                    finally:
                        ticket.release()
                    await asyncio.sleep(0.02)  # the processors are needed by the servers that start, too

            clients = [asyncio.create_task(ask_on()) for _ in range(2)]
            await fleet.apply(versions[1], "agent")
            await fleet.rollback("agent")
            await fleet.rollback("agent")
            await asyncio.sleep(0.3)
            over.set()
            await asyncio.gather(*clients)
            await fleet.wait_settled()
            assert {name for name, _ in answered} == set(alone)
            assert all(text == alone[name] for name, text in answered), "never a mix, never of another version's cache"
            assert all(each.cut == 0 for each in fleet.status().versions)


def damage(kind: str, folder: Path) -> None:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    settings = json.loads(config.read_text())
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-500])
    elif kind == "header only":
        weights.write_bytes(weights.read_bytes()[:8])
    elif kind == "missing":
        weights.unlink()
    elif kind == "no configuration":
        config.unlink()
    elif kind == "pickle only":
        weights.rename(folder / "adapter_model.bin")
    elif kind == "dora":
        config.write_text(json.dumps({**settings, "use_dora": True}))
    elif kind == "not JSON":
        config.write_text("{")


@pytest.mark.parametrize("kind", ["truncated", "header only", "missing", "no configuration", "pickle only", "dora", "not JSON"])
async def test_a_bad_adapter_never_answers(base: Path, versions: list[Version], references: Path, tmp_path: Path, kind: str) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(versions[1].adapter_path or bad, bad)
    damage(kind, bad)
    async with open_fleet(base, tmp_path / "serving", references) as (fleet, _):
        await fleet.apply(versions[0], "agent")
        n_servers = len(psutil.Process().children(recursive=True))
        with pytest.raises(ServingError, match="cannot be served"):
            await fleet.apply(version_of(base, bad), "agent")
        assert fleet.list_names()["agent"] == versions[0].name
        assert [each.state for each in fleet.status().versions].count("failed") == 1
        assert len(psutil.Process().children(recursive=True)) == n_servers


async def test_an_adapter_that_is_served_with_another_scale_is_not_proven(
    base: Path, versions: list[Version], references: Path, tmp_path: Path
) -> None:
    """The files are changed between the reference and the load, as a faulty writer would: same name, twice the effect."""
    twice = tmp_path / "twice"
    shutil.copytree(versions[1].adapter_path or twice, twice)
    config = json.loads((twice / "adapter_config.json").read_text())
    (twice / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    async with open_fleet(base, tmp_path / "serving", references) as (fleet, _):
        await fleet.apply(versions[1], "agent")
        await fleet.apply(versions[0], "agent")
        await fleet.wait_settled()
        with pytest.raises(ServingError, match="it is not shown that its adapter is applied"):
            await fleet.apply(versions[1].model_copy(update={"adapter_path": twice}), "agent")
        assert fleet.list_names()["agent"] == versions[0].name


async def test_a_server_that_is_killed_comes_back(base: Path, versions: list[Version], references: Path, tmp_path: Path) -> None:
    async with open_fleet(base, tmp_path / "serving", references) as (fleet, applier):
        await fleet.apply(versions[0], "agent")
        ticket = fleet.acquire("agent", "1")
        applier._running[ticket.endpoint.url]._child.kill()
        ticket.release(failed=True)
        watch = asyncio.create_task(fleet.watch())
        async with asyncio.timeout(30), httpx2.AsyncClient(trust_env=False, timeout=60) as client:
            while True:
                status = next(each for each in fleet.status().versions if each.name == versions[0].name)
                if status.state == "live" and status.requests == 0:
                    break
                await asyncio.sleep(0.05)
            assert await generate(client, fleet.acquire("agent", "1").endpoint)
        for loaded in fleet._loader:
            while loaded.in_flight:
                loaded.end_one(failed=False)
        watch.cancel()
