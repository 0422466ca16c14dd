"""The README.md of an adapter: what a person who finds the folder needs to know."""

from __future__ import annotations

from loraloop.training_record import TrainingRecord


def model_card(record: TrainingRecord) -> str:
    """Markdown with the metadata block that hubs and PEFT read; it names no path of the machine it was trained on."""
    settings = record.settings
    held_out = "not measured"
    if record.held_out_loss_before is not None and record.held_out_loss_after is not None:
        held_out = f"{record.held_out_loss_before:.4f} before, {record.held_out_loss_after:.4f} after, over {record.held_out_rows} rows"
    refused = ", ".join(f"{reason} {count}" for reason, count in record.data.refused.items()) or "none"
    tokens = f"{record.data.n_tokens} tokens, {record.data.n_supervised_tokens} of them supervised"
    base = f"base_model: {record.base_model}\n" if record.base_source == "hub" else ""
    return f"""---
{base}library_name: peft
tags: [lora, loraloop]
---

# LoRA adapter for {record.base_model}

Trained by loraloop {record.versions["loraloop"]} from {len(record.used_episode_ids)} recorded episodes.

| | |
|---|---|
| base model | {record.base_model}, sha256 {record.base_sha256} |
| data | {record.data.rows} rows, {tokens}; sha256 {record.data_sha256} |
| left out | {refused} |
| rank, alpha, dropout | {settings["rank"]}, {settings["alpha"]:g}, {settings["dropout"]:g} |
| learning rate, steps | {settings["lr"]:g}, {record.steps} |
| seed, dtype | {record.seed}, {record.dtype} |
| held-out loss | {held_out} |

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("<base model>"), "<this folder>")
```

Only the agent's own tokens carried loss. `training_record.json` lists every episode used, every refusal, and all settings.
"""
