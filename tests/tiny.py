"""Tiny random models with a byte-level tokenizer: real architectures, real templates, a second to make."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A template without tools, as SmolLM2's."""

SPECIAL = ["<|im_start|>", "<|im_end|>"]


def make_tokenizer(chat_template: str | None = CHATML, special: list[str] = SPECIAL, eos: str = "<|im_end|>") -> Any:
    """A fast tokenizer whose tokens are single bytes and the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    others = [token for token in special if token != eos]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, additional_special_tokens=others)
    fast.chat_template = chat_template
    return fast


def make_config(architecture: str, **changes: Any) -> Any:
    """The configuration of a tiny model: llama, qwen2 (biases), qwen3 (norms of queries and keys) or lfm2 (short convolutions)."""
    import transformers

    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
    }
    own = {
        "llama": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
        "qwen2": (transformers.Qwen2Config, {}),
        "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
        "lfm2": (transformers.Lfm2Config, {"layer_types": ["conv", "full_attention"]}),
    }
    kind, settings = own[architecture]
    return kind(**{**shape, **settings, **changes})


def make_model(architecture: str, folder: Path, chat_template: str | None = CHATML, **changes: Any) -> Path:
    """Save a random model (see `make_config`) and its tokenizer into `folder`."""
    import torch
    import transformers

    tokenizer = make_tokenizer(chat_template)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = make_config(architecture, vocab_size=len(tokenizer), **ends, **changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
