"""The tokenizer of a folder in Hugging Face's files, as llama.cpp reads it: byte-level BPE with a way to cut text that llama.cpp knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import tokenizers

QWEN_CUTS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3_CUTS = QWEN_CUTS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
"""How Qwen2 and Llama 3 cut text before merging: their tokenizers state these very expressions."""


def add_vocabulary(writer: Any, folder: Path, n_tokens: int) -> None:
    """Tokens, merges, special tokens and chat template; `n_tokens` is how many rows the embeddings have.

    Raises ValueError, OSError or KeyError for a tokenizer that llama.cpp would cut text with in another way.
    """
    whole = json.loads((folder / "tokenizer.json").read_bytes())
    settings = _load(folder / "tokenizer_config.json")
    model = whole["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ValueError(f"its tokenizer is {model.get('type')!r}, expected byte-level BPE")
    tokens: list[tuple[str, Any]] = [(f"[PAD{number}]", gguf.TokenType.UNUSED) for number in range(n_tokens)]
    added = {entry["id"]: entry for entry in whole.get("added_tokens", [])}
    for text, number in {**model["vocab"], **{entry["content"]: number for number, entry in added.items()}}.items():
        if number >= n_tokens:
            raise ValueError(f"its tokenizer has the token {number}, and its embeddings have {n_tokens} rows")
        kind = gguf.TokenType.NORMAL
        if number in added:
            kind = gguf.TokenType.CONTROL if added[number].get("special") else gguf.TokenType.USER_DEFINED
        tokens[number] = (text, kind)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_name_cutting(whole.get("pre_tokenizer"), has_merges=bool(merges)))
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_merges(merges or [" ".join(pair) for pair in _harmless_merge(model["vocab"])])
    _add_special(writer, folder, settings, {text: number for number, (text, _) in enumerate(tokens)})
    if template := _find_template(folder, settings):
        writer.add_chat_template(template)


def _harmless_merge(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """llama.cpp wants at least one merge; where there is none, one whose result is no token is never taken."""
    letters = [text for text in sorted(vocab) if len(text) == 1]
    return [(letters[0], letters[0])] if letters and letters[0] * 2 not in vocab else []


def _name_cutting(pre_tokenizer: Any, *, has_merges: bool) -> str:
    """llama.cpp's name of the way in which text is cut before merging. Raises ValueError for one that it has no proven name for."""
    if not has_merges:
        return "gpt-2"  # each byte is a token, however text is cut
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        if pattern in {QWEN_CUTS, LLAMA_3_CUTS} and steps[0].get("behavior") == "Isolated":
            return "qwen2" if pattern == QWEN_CUTS else "llama-bpe"
    raise ValueError(f"its tokenizer cuts text in a way ({' and '.join(map(str, kinds))}) that is not proven to be llama.cpp's")


def _add_special(writer: Any, folder: Path, settings: Mapping[str, Any], ids: Mapping[str, int]) -> None:
    for name, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in ids:
            add(ids[text])
    ends = _load(folder / "generation_config.json").get("eos_token_id")
    if isinstance(ends, list) and ends:
        writer.add_eot_token_id(int(ends[-1]))  # a turn ends with any of them
    start = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids
    without = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a", add_special_tokens=False).ids
    writer.add_add_bos_token(len(start) > len(without) and start[-len(without) :] == without)


def _find_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.is_file() else {}
