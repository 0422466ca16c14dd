"""Every applier of ours keeps the promises of the protocol, and the check can tell one that does not."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from random_adapters import make_adapter
from tiny import make_model

from loraloop import plugins
from loraloop.errors import SettingsError
from loraloop.files import file_sha256
from loraloop.serve.applier import Endpoint, Scored, Version
from loraloop.serve.llama_server import LlamaCppApplier, LlamaCppSettings
from loraloop.testing import check_applier

SETTINGS = LlamaCppSettings(n_ctx=256, n_threads=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Version]]:
    """A model, and two adapters of it."""
    folder = tmp_path_factory.mktemp("models")
    model = make_model("llama", folder / "base")
    config = json.loads((model / "config.json").read_text())
    adapters = [make_adapter(folder / f"adapter-{seed}", config, seed, strength=0.5) for seed in (1, 2)]
    versions = [
        Version.of_adapter(
            "agent",
            adapter_sha256=file_sha256(adapter / "adapter_model.safetensors"),
            adapter_path=adapter,
            model_id=f"lora-{number}-00000000",
            base_sha256=None,
        )
        for number, adapter in enumerate(adapters)
    ]
    return model, versions


@pytest.fixture
async def opened(made: tuple[Path, list[Version]], tmp_path: Path) -> AsyncIterator[LlamaCppApplier]:
    kind = plugins.find("appliers", "llama.cpp")
    assert kind is LlamaCppApplier
    applier = await kind.open(str(made[0]), tmp_path, SETTINGS)
    yield applier
    await applier.close()


async def test_llama_cpp_keeps_the_promises_and_leaves_nothing(opened: LlamaCppApplier, made: tuple[Path, list[Version]]) -> None:
    await check_applier(opened, made[1])
    assert not [child for child in psutil.Process().children() if "loraloop.serve.llama_launcher" in child.cmdline()]


async def test_applier_that_serves_the_base_model_for_an_adapter_is_found(
    opened: LlamaCppApplier, made: tuple[Path, list[Version]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "_make_body", lambda adapter: {"lora": []})
    with pytest.raises(AssertionError, match=r"answers otherwise than the base model, and not [\d.e-]+ apart"):
        await check_applier(opened, made[1])


async def test_applier_whose_stop_does_nothing_is_found(
    opened: LlamaCppApplier, made: tuple[Path, list[Version]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stop(endpoint: Endpoint) -> None:
        del endpoint

    monkeypatch.setattr(opened, "stop", stop)
    with pytest.raises(AssertionError, match="is not healthy once it is stopped"):
        await check_applier(opened, made[1])


async def test_applier_that_tells_no_probabilities_is_found(
    opened: LlamaCppApplier, made: tuple[Path, list[Version]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def score(endpoint: Endpoint, prompts: tuple[tuple[int, ...], ...]) -> Scored:
        del endpoint
        return Scored(tuple({1: 0.5, 2: 0.5} for _ in prompts))

    monkeypatch.setattr(opened, "score", score)
    with pytest.raises(AssertionError, match="log-probabilities"):
        await check_applier(opened, made[1])


def test_unknown_applier_is_named_with_those_that_are_known() -> None:
    with pytest.raises(SettingsError, match=r"no applier named 'lama\.cpp'; known: .*llama\.cpp.*Did you mean llama\.cpp"):
        plugins.find("appliers", "lama.cpp")
