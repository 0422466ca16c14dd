"""`python -m loraloop.serve.reference`: what transformers and PEFT compute for probe prompts, with an adapter and without.

Reads a `ReferencePlan` as JSON from standard input, and writes the arrays where it says. Float32, on the CPU, at low priority, offline.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from loraloop.base_model import load_tokenizer, resolve_base
from loraloop.errors import LoraLoopError, ServingError
from loraloop.files import sync
from loraloop.serve.proof import ReferencePlan


def compute(plan: ReferencePlan) -> None:
    """Carry out `plan`. Raises ServingError and BaseModelError when it cannot be."""
    import peft
    import torch
    import transformers

    base = resolve_base(plan.base)
    if plan.base_sha256 is not None and base.sha256 != plan.base_sha256:
        raise ServingError(f"the adapter was trained on the base model {plan.base_sha256[:12]}, and {plan.base} is {base.sha256[:12]}")
    tokenizer = load_tokenizer(base)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"][: plan.max_tokens] for text in plan.texts]
    prompts = [prompt for prompt in prompts if prompt]
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, trust_remote_code=False).eval()

    def score() -> np.ndarray:
        with torch.no_grad():
            rows = [torch.log_softmax(network(torch.tensor([prompt])).logits[0, -1], -1) for prompt in prompts]
        return torch.stack(rows).numpy()  # (prompts, vocabulary)

    without = score()
    network = peft.PeftModel.from_pretrained(network, plan.adapter).eval()
    _write(plan.target, prompts, without, score())


def _write(target: Path, prompts: list[list[int]], base: np.ndarray, adapter: np.ndarray) -> None:
    tokens = np.full((len(prompts), max(map(len, prompts))), -1, np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        try:
            np.savez(file, tokens=tokens, base=base, adapter=adapter)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    sync(target.parent)


def main() -> None:
    """Read the plan and carry it out; an error of ours becomes one line and exit code 1."""
    with contextlib.suppress(OSError):
        os.nice(10)  # the servers that answer go first
    try:
        compute(ReferencePlan.model_validate_json(sys.stdin.read()))
    except LoraLoopError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
