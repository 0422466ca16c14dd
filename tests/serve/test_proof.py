"""The proof: what passes, and that each way of applying an adapter wrongly fails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from adapter_server import VOCABULARY, log_probs
from random_adapters import make_adapter
from tiny import make_model

from loraloop.base_model import resolve_base
from loraloop.errors import ServingError
from loraloop.files import file_sha256
from loraloop.serve.applier import Endpoint, Scored, Version
from loraloop.serve.proof import Prover, Reference, judge

PROMPTS = ((1, 2), (3, 4, 5), (6,), (7, 8))


def dense(prompts: tuple[tuple[int, ...], ...], strength: float) -> np.ndarray:
    return np.array([[log_probs(prompt, strength)[token] for token in range(VOCABULARY)] for prompt in prompts], np.float32)


def reference(strength: float) -> Reference:
    return Reference(PROMPTS, dense(PROMPTS, 0), dense(PROMPTS, strength))


def scores(strength: float, noise: float = 0.0, seed: int = 0) -> list[dict[int, float]]:
    draw = np.random.default_rng(seed)
    return [{token: value + noise * draw.normal() for token, value in log_probs(prompt, strength).items()} for prompt in PROMPTS]


@pytest.mark.parametrize("strength", [0.02, 0.3, 1.0])
def test_an_adapter_that_is_applied_is_proven(strength: float) -> None:
    proof = judge(reference(strength), scores(0), scores(0), scores(strength))
    assert proof.proven, proof.reason
    assert proof.figures["slope"] == pytest.approx(1, abs=1e-3)
    assert proof.figures["correlation"] == pytest.approx(1, abs=1e-3)
    assert proof.figures["noise"] == 0


def test_a_server_that_computes_with_fewer_bits_passes_while_its_own_error_is_the_same_both_ways() -> None:
    bits = [{token: 0.1 * np.random.default_rng([row, token]).normal() for token in range(VOCABULARY)} for row in range(len(PROMPTS))]
    base, version = ([{t: v + off[t] for t, v in top.items()} for top, off in zip(scores(s), bits, strict=True)] for s in (0, 0.5))
    proof = judge(reference(0.5), base, base, version)
    assert proof.proven, proof.reason
    assert proof.figures["base_error"] > 0.05


@pytest.mark.parametrize(("served", "told"), [(0.0, "answers as the base model"), (2.0, "times"), (0.5, "times"), (-1.0, "times")])
def test_no_adapter_or_another_scale_is_not_proven(served: float, told: str) -> None:
    proof = judge(reference(1.0), scores(0), scores(0), scores(served))
    assert not proof.proven
    assert told in proof.reason


def test_another_adapter_wrongly_ordered_rows_and_mere_noise_are_not_proven() -> None:
    other = [{token: log_probs((*prompt, 9), 1.0)[token] for token in range(VOCABULARY)} for prompt in PROMPTS]
    turned = [{token: top[(token + 1) % VOCABULARY] for token in range(VOCABULARY)} for top in scores(1.0)]
    noisy = judge(reference(0.02), scores(0, 0.2, 1), scores(0, 0.2, 2), scores(0, 0.2, 3))
    for version in (other, turned):
        assert not judge(reference(1.0), scores(0), scores(0), version).proven
    assert not noisy.proven


def test_an_adapter_that_hides_in_the_servers_own_error_is_told_the_way_out() -> None:
    hidden = judge(reference(0.02), scores(0, 0.2, 1), scores(0, 0.2, 1), scores(0.02, 0.2, 3))
    assert not hidden.proven
    assert "serve a base model of more bits" in hidden.reason
    wrong = judge(reference(1.0), scores(0), scores(0), scores(-1.0))
    assert "more bits" not in wrong.reason


def test_a_constant_error_of_the_version_alone_is_not_proven() -> None:
    off = [{token: value + 0.03 * (-1) ** token for token, value in top.items()} for top in scores(1.0)]
    proof = judge(reference(1.0), scores(0), scores(0), off)
    assert not proof.proven
    assert "off transformers and PEFT by 0.03" in proof.reason


def test_an_adapter_without_an_effect_and_too_few_tokens_cannot_be_shown() -> None:
    assert "changes nothing" in judge(reference(0), scores(0), scores(0), scores(0)).reason
    few = [dict(list(top.items())[:2]) for top in scores(1.0)]
    assert "only 8 tokens" in judge(reference(1.0), scores(0), scores(0), few).reason


class FromPeft:
    """The other side: what transformers computes in this process, as a server would give it."""

    def __init__(self, base: Path, adapter: Path, scale: float) -> None:
        import peft
        import torch
        import transformers

        network = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model = peft.PeftModel.from_pretrained(network, adapter).eval()
        self.scale = scale
        self.calls = 0

    async def score(self, endpoint: Endpoint, prompts: tuple[tuple[int, ...], ...]) -> Scored:
        import torch

        self.calls += 1
        for module in self.model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] = self.scale if endpoint.model == "green" else 0.0
        with torch.no_grad():
            rows = [torch.log_softmax(self.model(torch.tensor([prompt])).logits[0, -1], -1) for prompt in prompts]
        return Scored(tuple({int(t): float(row[t]) for t in row.topk(50).indices} for row in rows))


async def test_the_reference_is_computed_once_in_a_process_of_its_own_and_agrees(tmp_path: Path) -> None:
    base = make_model("llama", tmp_path / "llama")
    adapter = make_adapter(tmp_path / "adapter", json.loads((base / "config.json").read_text()), 1, strength=0.2)
    sha256 = resolve_base(str(base)).sha256
    version = Version.of_adapter(
        "agent",
        adapter_sha256=file_sha256(adapter / "adapter_model.safetensors"),
        adapter_path=adapter,
        model_id=None,
        base_sha256=sha256,
    )
    prover = Prover(tmp_path / "references", str(base))
    ends = Endpoint(Version.of_base(sha256), "http://127.0.0.1:1", "base"), Endpoint(version, "http://127.0.0.1:1", "green")
    proof = await prover.prove(FromPeft(base, adapter, 1.0), *ends)
    assert proof.proven, proof.reason
    assert proof.figures["error"] < 1e-4
    [kept] = (tmp_path / "references").iterdir()
    written = kept.stat().st_mtime_ns
    for scale in (2.0, 0.5, 0.0):
        assert not (await prover.prove(FromPeft(base, adapter, scale), *ends)).proven
    assert kept.stat().st_mtime_ns == written
    kept.write_bytes(kept.read_bytes()[:-100])
    assert (await prover.prove(FromPeft(base, adapter, 1.0), *ends)).proven, "what cannot be read is computed anew"
    kept.unlink()
    wrong = version.model_copy(update={"base_sha256": "f" * 64})
    with pytest.raises(ServingError, match="was trained on the base model ffffffffffff, and"):
        await prover.prove(FromPeft(base, adapter, 1.0), ends[0], Endpoint(wrong, "http://127.0.0.1:1", "green"))
    assert not list((tmp_path / "references").iterdir())
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    with pytest.raises(ServingError, match="does not name its base model"):
        await Prover(tmp_path / "references").prove(FromPeft.__new__(FromPeft), *ends)
