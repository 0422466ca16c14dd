"""Base models as GGUF files: llama.cpp cuts text and renders chats as the folder's own tokenizer does, and the rest is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as gguf_package
import httpx2
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import CHATML, make_config, make_model

from loraloop.base_model import resolve_base
from loraloop.errors import BaseModelError, ServingError
from loraloop.serve.gguf import SOURCE_KEY, read_base
from loraloop.serve.gguf_base import write_base
from loraloop.serve.gguf_vocabulary import LLAMA_3_CUTS, QWEN_CUTS
from loraloop.serve.llama_server import LlamaCppApplier, LlamaCppSettings

TEXTS = [
    "Hello world, it's 12345 o'clock; don't WE'LL I'd",
    "tabs\tand  double  spaces \n\n  lines\r\n\r\n end   ",
    "naïve café 東京タワー 🤖🚀 Привет 1,234.5678 ١٢٣",
    "def f(x):\n    return {'a': x**2, \"b\": [1,2,3]}  # comment\n\n\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "  leading",
    "",
    "x",
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2?\n"},
    {"role": "assistant", "content": "4"},
]


def split(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def cutters() -> dict[str, Any]:
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": digits,
        "qwen2": split(QWEN_CUTS),
        "llama-bpe": split(LLAMA_3_CUTS),
    }


def make_base(folder: Path, cutter: Any, *, bos: bool = False) -> Any:
    """A tiny Llama whose tokenizer has learned merges behind `cutter`; the tokenizer, too."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cutter
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    corpus = [*TEXTS, *("123 456 1234 99 in 2024" for _ in range(9)), Path(__file__).read_text(), *("  word's we'll\n\n" for _ in range(9))]
    tokenizer.train_from_iterator(corpus, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = CHATML
    torch.manual_seed(0)
    config = make_config("llama", vocab_size=len(fast) + 5, eos_token_id=2, pad_token_id=2)  # rows of padding, as many models have
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
async def test_llama_cpp_cuts_and_renders_as_the_folder_does(name: str, tmp_path: Path) -> None:
    tokenizer = make_base(tmp_path / "base", cutters()[name], bos=name == "llama-bpe")
    applier = await LlamaCppApplier.open(str(tmp_path / "base"), tmp_path, LlamaCppSettings(n_ctx=256, n_threads=1))
    (file,) = (tmp_path / "bases").glob("*.gguf")
    assert gguf_package.GGUFReader(file).get_field("tokenizer.ggml.pre").contents() == name
    try:
        endpoint = await applier.start(applier.base)
        async with httpx2.AsyncClient(base_url=endpoint.url, headers=endpoint.headers, trust_env=False) as client:
            for text in TEXTS:
                asked = {"content": text, "add_special": True, "parse_special": True}
                assert (await client.post("/tokenize", json=asked)).json()["tokens"] == tokenizer(text)["input_ids"], text
            rendered = (await client.post("/apply-template", json={"messages": MESSAGES[:2]})).json()["prompt"]
    finally:
        await applier.close()
    assert rendered == tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)


async def test_open_converts_once(tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path / "base")
    first = await LlamaCppApplier.open(str(model), tmp_path / "serving")
    (file,) = (tmp_path / "serving" / "bases").glob("*.gguf")
    made = file.stat()
    second = await LlamaCppApplier.open(str(model), tmp_path / "serving")
    assert first.base == second.base
    assert first.base.base_sha256 == resolve_base(str(model)).sha256
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (made.st_mtime_ns, made.st_ino)
    await first.close()
    await second.close()


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_weights_are_of_the_type_that_is_asked_for(dtype: Any, size: int, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "base")
    write_base(model, tmp_path / "base.gguf", dtype)
    tensors = {tensor.name: tensor for tensor in gguf_package.GGUFReader(tmp_path / "base.gguf").tensors}
    matrix = tensors["blk.0.ffn_up.weight"]
    assert matrix.n_bytes == 64 * 128 * size
    assert tensors["blk.0.attn_norm.weight"].n_bytes == 64 * 4
    stored = load_file(model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    again = gguf_package.quants.dequantize(matrix.data, matrix.tensor_type)
    assert np.abs(again - stored).max() <= {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[dtype] * np.abs(stored).max()


def test_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "base")
    write_base(model, tmp_path / "one.gguf")
    write_base(model, tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert resolve_base(str(model)).sha256 in read_base(tmp_path / "one.gguf").known_as
    assert gguf_package.GGUFReader(tmp_path / "one.gguf").get_field(SOURCE_KEY).contents() == resolve_base(str(model)).sha256


def configure(name: str = "config.json", **changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | changes))

    return change


def rewrite(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        loaded = load_file(model / "model.safetensors")
        change(loaded)
        save_file(loaded, model / "model.safetensors")

    return apply


NORM = "model.norm.weight"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "architecture": (configure(model_type="gemma3"), "its architecture is 'gemma3'"),
    "no_causal_model": (configure(architectures=["LlamaForSequenceClassification"]), "converted here are causal models"),
    "sliding_window": (configure(use_sliding_window=True), "sliding window"),
    "quantised": (configure(quantization_config={"bits": 4}), "quantised"),
    "activation": (configure(hidden_act="gelu"), "activation is 'gelu'"),
    "rope": (configure(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0, "factor": 4.0}), "in the way 'yarn'"),
    "old_rope": (configure(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), "in the way 'linear'"),
    "missing_setting": (configure(intermediate_size=None), "cannot be converted to GGUF"),
    "missing_tensor": (rewrite(lambda loaded: loaded.pop(NORM)), "1 of its tensors are missing: output_norm.weight"),
    "unknown_tensor": (rewrite(lambda loaded: loaded.update(extra=np.ones(3, np.float32))), "extra has no place"),
    "not_finite": (rewrite(lambda loaded: loaded.update({NORM: np.full(64, np.nan, np.float32)})), "not finite"),
    "integers": (rewrite(lambda loaded: loaded.update({NORM: np.ones(64, np.int32)})), "is of I32"),
    "no_tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json"),
    "sentencepiece": (configure("tokenizer.json", model={"type": "Unigram", "vocab": []}), "'Unigram', expected byte-level BPE"),
    "too_many_tokens": (configure(vocab_size=10), "its embeddings have 10 rows"),
}


@pytest.mark.parametrize("kind", BAD)
def test_model_that_cannot_be_converted_exactly_is_refused_with_the_way_out(kind: str, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "base")
    spoil, reason = BAD[kind]
    spoil(model)
    with pytest.raises(ServingError, match=rf"(?s){reason}.*convert_hf_to_gguf\.py"):
        write_base(model, tmp_path / "base.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_text_cut_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    make_base(tmp_path / "base", split(r"\d+"))
    with pytest.raises(ServingError, match=r"cuts text in a way .*Split and ByteLevel.* not proven"):
        write_base(tmp_path / "base", tmp_path / "base.gguf")


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "base")
    shutil.move(model / "model.safetensors", model / "model.bin")
    with pytest.raises(BaseModelError, match="holds"):
        write_base(model, tmp_path / "base.gguf")
