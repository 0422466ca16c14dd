"""llama.cpp's own server: what it computes against PEFT, what it refuses, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
from random_adapters import make_adapter
from safetensors.numpy import load_file, save_file
from tiny import make_model

from loraloop.errors import ServingError
from loraloop.files import file_sha256
from loraloop.serve import gguf
from loraloop.serve.applier import Endpoint, Version
from loraloop.serve.llama_server import LlamaCppApplier, LlamaCppSettings

SETTINGS = LlamaCppSettings(n_ctx=256, n_threads=1, reproducible=True)
PROMPTS = tuple(tuple(text.encode()) for text in ("hello, what is this?", "To be, or not to be", "def main(argv: list[str])"))
"""Each byte is a token of the tiny models."""
TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp("model") / request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
async def opened(llama: Path, tmp_path: Path) -> AsyncIterator[LlamaCppApplier]:
    applier = await LlamaCppApplier.open(str(llama), tmp_path / "serving", SETTINGS)
    yield applier
    await applier.close()


def version_of(adapter: Path, base_sha256: str | None = None) -> Version:
    sha256 = file_sha256(adapter / "adapter_model.safetensors") if (adapter / "adapter_model.safetensors").exists() else "0" * 64
    return Version.of_adapter("agent", adapter_sha256=sha256, adapter_path=adapter, model_id="lora-1-00000000", base_sha256=base_sha256)


def adapter_of(model: Path, folder: Path, seed: int = 1, **changes: Any) -> Path:
    make_adapter(folder, json.loads((model / "config.json").read_text()), seed)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def reference(model: Path, adapter: Path | None) -> list[np.ndarray]:
    """The log-probabilities of every next token behind each prompt, by transformers and PEFT."""
    import peft
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        network = peft.PeftModel.from_pretrained(network, adapter)
    with torch.no_grad():
        return [torch.log_softmax(network(torch.tensor([prompt])).logits[0, -1], -1).numpy() for prompt in PROMPTS]


async def error_of(applier: LlamaCppApplier, endpoint: Endpoint, wanted: list[np.ndarray]) -> float:
    scored = await applier.score(endpoint, PROMPTS)
    assert all(len(top) == 50 for top in scored.top)
    return max(abs(expected[token] - found) for expected, top in zip(wanted, scored.top, strict=True) for token, found in top.items())


def servers_of(pid: int | None = None) -> list[psutil.Process]:
    """llama.cpp servers among what a process has started, and what is left of their groups."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "loraloop.serve.llama_launcher" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def is_group_gone(group: int, seconds: float = 10) -> bool:
    """Whether nothing runs in a process group any more, or soon; what has ended and is not yet waited for does not run."""
    deadline = time.monotonic() + seconds
    while any(_is_in(process, group) for process in psutil.process_iter()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _is_in(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


async def become(condition: Callable[[], Awaitable[bool]], seconds: float = 10) -> bool:
    """Whether `condition` comes true in time."""
    deadline = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


PATTERNS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 2},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 16, r"layers\.1\.self_attn\.v_proj": 1}},
}


async def test_server_computes_what_peft_computes(model: Path, tmp_path: Path) -> None:
    applier = await LlamaCppApplier.open(str(model), tmp_path / "serving", SETTINGS)
    try:
        base = await applier.start(applier.base)
        plain = reference(model, None)
        assert await error_of(applier, base, plain) <= TOLERANCE
        await applier.stop(base)
        for name, changes in PATTERNS.items():
            adapter = adapter_of(model, tmp_path / name, **changes)
            endpoint = await applier.start(version_of(adapter))
            assert await error_of(applier, endpoint, reference(model, adapter)) <= TOLERANCE, name
            assert await error_of(applier, endpoint, plain) > 0.05, f"{name}: the adapter does something"
            await applier.stop(endpoint)
    finally:
        await applier.close()


async def test_adapter_of_every_layer_as_peft_saves_it(model: Path, tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    heads = [] if network.config.tie_word_embeddings else ["lm_head"]
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[*layers, *heads],
        init_lora_weights=False,
        rank_pattern={"down_proj": 2, "layers.1.mlp.up_proj": 3},
    )
    peft.get_peft_model(network, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    applier = await LlamaCppApplier.open(str(model), tmp_path / "serving", SETTINGS)
    try:
        endpoint = await applier.start(version_of(tmp_path / "adapter"))
        assert await error_of(applier, endpoint, reference(model, tmp_path / "adapter")) <= TOLERANCE
        assert await error_of(applier, endpoint, reference(model, None)) > 0.1
    finally:
        await applier.close()


async def test_rows_in_a_wrong_order_are_noticed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = json.loads((model / "config.json").read_text())["model_type"]
    applier = await LlamaCppApplier.open(str(model), tmp_path / "serving", SETTINGS)
    adapter = tmp_path / "adapter"
    make_adapter(adapter, json.loads((model / "config.json").read_text()), 1, strength=1.0)
    try:
        monkeypatch.setitem(gguf.PERMUTED, architecture, not gguf.PERMUTED[architecture])
        endpoint = await applier.start(version_of(adapter))
        assert await error_of(applier, endpoint, reference(model, adapter)) > 0.1
    finally:
        await applier.close()


async def test_request_is_answered_by_its_adapter_under_its_name(opened: LlamaCppApplier, llama: Path, tmp_path: Path) -> None:
    endpoint = await opened.start(version_of(adapter_of(llama, tmp_path / "adapter")))
    async with httpx2.AsyncClient(trust_env=False) as client:
        asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "model": endpoint.model}
        url = f"{endpoint.url}/v1/chat/completions"
        answer = (await client.post(url, json=asked | dict(endpoint.body), headers=endpoint.headers)).json()
        assert answer["model"] == endpoint.version.name
        assert (await client.post(url, json=asked)).status_code == 401, "without the key"
        evil = await client.get(f"{endpoint.url}/v1/models", headers={**endpoint.headers, "Origin": "http://evil.example"})
        assert evil.headers.get("access-control-allow-origin", "") == ""
    assert endpoint.body == {"lora": [{"id": 0, "scale": 1.0}], "cache_prompt": False}
    assert endpoint.url.startswith("http://127.0.0.1:")


async def test_stop_leaves_nothing_and_can_be_said_twice(opened: LlamaCppApplier, tmp_path: Path) -> None:
    endpoint = await opened.start(opened.base)
    assert await opened.is_healthy(endpoint)
    (server,) = servers_of()
    await opened.stop(endpoint)
    await opened.stop(endpoint)
    assert not await opened.is_healthy(endpoint)
    assert is_group_gone(server.pid)
    assert sorted(path.name for path in (tmp_path / "serving").iterdir()) == ["bases", "logs"]


async def test_killed_server_is_noticed(opened: LlamaCppApplier) -> None:
    endpoint = await opened.start(opened.base)
    (server,) = servers_of()
    server.kill()

    async def is_noticed() -> bool:
        return not await opened.is_healthy(endpoint)

    assert await become(is_noticed)
    with pytest.raises(ServingError, match=r"cannot be scored .*ended by SIGKILL"):
        await opened.score(endpoint, PROMPTS)
    await opened.stop(endpoint)
    assert is_group_gone(server.pid)


async def test_cancelled_start_leaves_nothing(opened: LlamaCppApplier) -> None:
    start = asyncio.create_task(opened.start(opened.base))

    async def is_there() -> bool:
        return bool(servers_of())

    assert await become(is_there)
    (server,) = servers_of()
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert is_group_gone(server.pid)


async def test_server_that_is_late_is_ended(llama: Path, tmp_path: Path) -> None:
    applier = await LlamaCppApplier.open(str(llama), tmp_path, SETTINGS.model_copy(update={"start_seconds": 0.05}))
    with pytest.raises(ServingError, match=r"did not answer within 0\.05 s"):
        await applier.start(applier.base)
    assert servers_of() == []
    await applier.close()


async def test_what_llama_cpp_refuses_is_told_with_its_log(
    opened: LlamaCppApplier, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a check is wrong, the server's own refusal is the last line of defence."""
    adapter = adapter_of(llama, tmp_path / "adapter")

    def write_cut_off(adapter: Path, base: gguf.GgufBase, target: Path, **others: Any) -> None:
        gguf.write_adapter(adapter, base, target, **others)
        target.write_bytes(target.read_bytes()[:-4000])

    monkeypatch.setattr("loraloop.serve.llama_server.write_adapter", write_cut_off)
    with pytest.raises(ServingError, match=r"(?s)agent@\w+: the server ended \(exit 1\).*adapter.*The whole log is in"):
        await opened.start(version_of(adapter))
    assert servers_of() == []


async def test_prompt_that_is_too_long_is_told_as_the_server_tells_it(opened: LlamaCppApplier) -> None:
    endpoint = await opened.start(opened.base)
    with pytest.raises(
        ServingError, match=r"a prompt of 400 tokens cannot be scored .*exceeds the available context size.*the server runs"
    ):
        await opened.score(endpoint, (tuple([65] * 400),))
    assert await opened.is_healthy(endpoint)


async def test_changed_base_file_is_not_served(opened: LlamaCppApplier, tmp_path: Path) -> None:
    (file,) = (tmp_path / "serving" / "bases").glob("*.gguf")
    os.utime(file, (1, 1))
    with pytest.raises(ServingError, match="was changed since it was opened"):
        await opened.start(opened.base)


async def test_adapter_of_another_base_is_refused(opened: LlamaCppApplier, llama: Path, tmp_path: Path) -> None:
    adapter = adapter_of(llama, tmp_path / "adapter")
    assert opened.check(version_of(adapter, opened.base.base_sha256)) == []
    findings = opened.check(version_of(adapter, "f" * 64))
    assert len(findings) == 1
    assert findings[0].startswith("it was trained on base model ffffffffffff")
    with pytest.raises(ServingError, match="trained on base model ffffffffffff"):
        await opened.start(version_of(adapter, "f" * 64))
    assert servers_of() == []


async def test_bad_adapter_never_starts_a_server(opened: LlamaCppApplier, llama: Path, tmp_path: Path) -> None:
    adapter = adapter_of(llama, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = min(tensors)
    save_file({**tensors, first: np.full_like(tensors[first], math.nan)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ServingError, match="not finite"):
        await opened.start(version_of(adapter))
    assert servers_of() == []
    assert sorted(path.name for path in (tmp_path / "serving").iterdir()) == ["bases"]


async def test_gguf_file_is_served_as_it_is(opened: LlamaCppApplier, llama: Path, tmp_path: Path) -> None:
    (file,) = (tmp_path / "serving" / "bases").glob("*.gguf")
    applier = await LlamaCppApplier.open(str(file), tmp_path / "other", SETTINGS)
    assert applier.base.base_sha256 == file_sha256(file)
    adapter = adapter_of(llama, tmp_path / "adapter")
    assert applier.check(version_of(adapter, opened.base.base_sha256)) == [], "the hash of the folder it came from is in the file"
    assert applier.check(opened.base) == []
    await applier.close()


def test_server_ends_when_its_parent_is_killed(llama: Path, tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import asyncio, sys
        from pathlib import Path
        from loraloop.serve.llama_server import LlamaCppApplier, LlamaCppSettings

        async def main() -> None:
            settings = LlamaCppSettings(n_ctx=256, n_threads=1)
            applier = await LlamaCppApplier.open(sys.argv[1], Path(sys.argv[2]), settings)
            await applier.start(applier.base)
            print("ready", flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(llama), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    (server,) = servers_of(parent.pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert is_group_gone(server.pid)
