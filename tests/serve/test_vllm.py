"""vLLM: the same tests against a server that speaks its protocol, and against a real one where LORALOOP_TEST_VLLM names it.

The real one serves a model whose folder is on this machine, with LoRA on and updates allowed:
`LORALOOP_TEST_VLLM=http://127.0.0.1:18090`.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from random_adapters import make_adapter
from tiny import make_model

from loraloop.base_model import resolve_base
from loraloop.errors import ServingError
from loraloop.files import file_sha256
from loraloop.serve.aliases import AliasFile
from loraloop.serve.applier import Applier, Endpoint, Version
from loraloop.serve.fleet import Fleet
from loraloop.serve.proof import Proof
from loraloop.serve.vllm import VllmApplier
from loraloop.testing import FakeVllm, check_applier

REAL = os.environ.get("LORALOOP_TEST_VLLM")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def fake(base: Path) -> FakeVllm:
    return FakeVllm(str(base))


@pytest.fixture(params=["fake", "real"])
def url(request: pytest.FixtureRequest, fake: FakeVllm) -> Iterator[str]:
    if request.param == "real":
        if not REAL:
            pytest.skip("LORALOOP_TEST_VLLM names no vLLM server")
        yield REAL
        return
    with fake.running() as at:
        yield at


@pytest.fixture
async def opened(url: str, tmp_path: Path) -> AsyncIterator[VllmApplier]:
    applier = await VllmApplier.open(url, tmp_path / "serving")
    yield applier
    await applier.close()


async def folder_of(url: str) -> Path:
    """Where the files of the base model are that the server serves."""
    async with httpx2.AsyncClient(trust_env=False) as client:
        cards = (await client.get(f"{url}/v1/models")).json()["data"]
    return Path(next(card["root"] for card in cards if not card["parent"]))


async def names_of(url: str) -> set[str]:
    async with httpx2.AsyncClient(trust_env=False) as client:
        return {card["id"] for card in (await client.get(f"{url}/v1/models")).json()["data"]}


def make_version(model: Path, folder: Path, seed: int, *, rank: int = 4, **changes: Any) -> Version:
    make_adapter(folder, json.loads((model / "config.json").read_text()), seed, strength=0.2, rank=rank)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(model), **changes}))
    sha256 = file_sha256(folder / "adapter_model.safetensors")
    base_sha256 = resolve_base(str(model)).sha256
    return Version.of_adapter("agent", adapter_sha256=sha256, adapter_path=folder, model_id=None, base_sha256=base_sha256)


async def test_it_does_all_that_an_applier_promises(url: str, tmp_path: Path) -> None:
    model = await folder_of(url)
    versions = [make_version(model, tmp_path / str(seed), seed) for seed in (1, 2)]
    await check_applier(await VllmApplier.open(url, tmp_path / "serving"), versions)
    assert not list((tmp_path / "serving" / "vllm" / "loaded").iterdir())


async def test_each_load_has_a_folder_of_its_own_without_the_path_of_the_base_and_it_goes_only_after_unloading(
    opened: VllmApplier, url: str, tmp_path: Path
) -> None:
    version = make_version(await folder_of(url), tmp_path / "a", 1)
    loaded = tmp_path / "serving" / "vllm" / "loaded"
    seen = set()
    for _ in range(2):
        endpoint = await opened.start(version)
        [copy] = loaded.iterdir()
        seen.add(copy)
        config = json.loads((copy / "adapter_config.json").read_text())
        assert not Path(config["base_model_name_or_path"]).is_absolute()
        assert file_sha256(copy / "adapter_model.safetensors") == version.adapter_sha256
        assert version.name in await names_of(url)
        await opened.stop(endpoint)
        assert version.name not in await names_of(url)
        assert not list(loaded.iterdir())
    assert len(seen) == 2
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()


async def test_what_an_earlier_service_has_left_is_unloaded_and_its_files_go(url: str, tmp_path: Path) -> None:
    version = make_version(await folder_of(url), tmp_path / "a", 1)
    killed = await VllmApplier.open(url, tmp_path / "serving")
    await killed.start(version)
    await killed._client.aclose()
    next_one = await VllmApplier.open(url, tmp_path / "serving")
    assert version.name not in await names_of(url)
    assert not list((tmp_path / "serving" / "vllm" / "loaded").iterdir())
    await next_one.start(version)
    await next_one.close()
    assert version.name not in await names_of(url)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"rank": 32}, "rank 32 is above the server's --max-lora-rank 16"),
        ({"modules_to_save": ["lm_head"]}, "modules"),
    ],
)
async def test_what_vllm_would_refuse_is_refused_before_it_is_asked(
    opened: VllmApplier, url: str, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    version = make_version(await folder_of(url), tmp_path / "bad", 1, **changes)
    assert any(told in finding for finding in opened.check(version))
    with pytest.raises(ServingError, match=told):
        await opened.start(version)
    assert version.name not in await names_of(url)


async def test_what_vllm_refuses_leaves_nothing(opened: VllmApplier, url: str, tmp_path: Path) -> None:
    version = make_version(await folder_of(url), tmp_path / "bad", 1, rank=32)
    opened.check = lambda version: []  # type: ignore[method-assign]  # as for a limit that we do not know
    with pytest.raises(ServingError, match="refused /v1/load_lora_adapter with 500"):
        await opened.start(version)
    assert version.name not in await names_of(url)
    assert not list((tmp_path / "serving" / "vllm" / "loaded").iterdir())


async def test_a_fleet_switches_on_one_server_and_unloads_only_what_nobody_uses(opened: VllmApplier, url: str, tmp_path: Path) -> None:
    model = await folder_of(url)
    a, b = (make_version(model, tmp_path / name, seed) for seed, name in enumerate("ab", 1))

    async def prove(applier: Applier, plain: Endpoint, green: Endpoint) -> Proof:
        prompts = ((1, 2, 3),)
        differs = await applier.score(plain, prompts) != await applier.score(green, prompts)
        return Proof(proven=differs, reason="it differs")

    fleet = Fleet(opened, AliasFile(tmp_path / "aliases"), prove)
    await fleet.recover()
    await fleet.apply(a, "agent")
    ticket = fleet.acquire("agent", "1")
    await fleet.apply(b, "agent")
    assert {a.name, b.name} <= await names_of(url), "the old one drains"
    assert (await opened.score(ticket.endpoint, ((1, 2),))).top, "and answers"
    ticket.release()
    await fleet.wait_settled()
    assert a.name not in await names_of(url)
    assert fleet.acquire("agent", "1").endpoint.model == b.name
    await fleet.rollback("agent")
    assert fleet.list_names()["agent"] == a.name
    for loaded in fleet._loader:
        while loaded.in_flight:
            loaded.end_one(failed=False)
    await fleet.close()
    assert {a.name, b.name}.isdisjoint(await names_of(url))


async def test_a_server_that_cannot_update_or_is_none_is_told(base: Path, tmp_path: Path) -> None:
    with FakeVllm(str(base), allows_updates=False).running() as url:
        applier = await VllmApplier.open(url, tmp_path)
        with pytest.raises(ServingError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
            await applier.start(make_version(base, tmp_path / "a", 1))
        await applier.close()
    with pytest.raises(ServingError, match="does not list its models"):
        await VllmApplier.open(url, tmp_path)
    with pytest.raises(ServingError, match="is no address of a vLLM server"):
        await VllmApplier.open("model.gguf", tmp_path)


async def test_the_files_of_what_the_server_still_lists_are_kept(base: Path, fake: FakeVllm, tmp_path: Path) -> None:
    with fake.running() as url:
        applier = await VllmApplier.open(url, tmp_path / "serving")
        version = make_version(base, tmp_path / "a", 1)
        endpoint = await applier.start(version)
        fake.adapters["under another name"] = fake.adapters[version.name]
        loaded = tmp_path / "serving" / "vllm" / "loaded"
        with pytest.raises(ServingError, match="still lists"):
            await applier.stop(endpoint)
        assert len(list(loaded.iterdir())) == 1
        del fake.adapters["under another name"]
        await applier.stop(endpoint)
        assert not list(loaded.iterdir())
        await applier.close()


async def test_a_server_that_was_started_anew_has_lost_the_version_and_that_is_seen(base: Path, fake: FakeVllm, tmp_path: Path) -> None:
    with fake.running() as url:
        applier = await VllmApplier.open(url, tmp_path / "serving")
        endpoint = await applier.start(make_version(base, tmp_path / "a", 1))
        assert await applier.is_healthy(endpoint)
        fake.adapters.clear()
        assert not await applier.is_healthy(endpoint)
        await applier.stop(endpoint)
        assert await applier.is_healthy(await applier.start(endpoint.version))
        fake.is_dead = True
        assert not await applier.is_healthy(endpoint)
        await applier.close()
