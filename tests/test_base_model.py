"""Base models: found as a folder, in the hub's cache or as a GGUF file; hashed; loaded without running anything of theirs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML

from loraloop.base_model import BaseModel, cache_directory, choose_dtype, load_model, load_tokenizer, resolve_base
from loraloop.errors import BaseModelError

HEADS, KV_HEADS, HIDDEN, WIDTH, LAYERS = 4, 2, 64, 128, 2


@pytest.fixture
def base(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be changed at will."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "base"))


# --- a folder ---------------------------------------------------------------------------------------------------------------


def test_a_folder_is_named_without_its_path(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve_base(str(base))
    assert (found.name, found.source, found.path) == ("base", "folder", base)
    monkeypatch.chdir(base)
    assert resolve_base(".") == found
    monkeypatch.setenv("HOME", str(base.parent))
    assert resolve_base("~/base") == found


def test_two_copies_of_one_model_have_one_hash_and_another_model_has_not(base: Path, tmp_path: Path) -> None:
    found = resolve_base(str(base))
    shutil.copytree(base, tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").write_text("not part of the model")
    assert resolve_base(str(tmp_path / "copy")).sha256 == found.sha256
    with (tmp_path / "copy" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert resolve_base(str(tmp_path / "copy")).sha256 != found.sha256


def test_a_model_in_several_files_is_hashed_over_all_of_them(base: Path) -> None:
    found = [resolve_base(str(base)).sha256]
    for name in ("a.safetensors", "z.safetensors", "config.json"):
        for content in (b"{}", b"[]"):
            (base / name).write_bytes(content)
            found.append(resolve_base(str(base)).sha256)
    assert len(set(found)) == 7


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_model_is_told_with_what_it_holds(base: Path, missing: str) -> None:
    (base / missing).rename(base / "pytorch_model.bin")
    with pytest.raises(
        BaseModelError,
        match=r"needs config\.json and \*\.safetensors, and holds .*pytorch_model\.bin.* \(pickled weights, .* are not read\)",
    ):
        resolve_base(str(base))


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="and holds nothing"):
        resolve_base(str(tmp_path))


@pytest.mark.parametrize(
    "name",
    ["/no/such/model", "./model", "../model", "~/model", "~nobody-of-that-name/model", "some/deep/model", "model.gguf", "org/model.gguf"],
)
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(name: str) -> None:
    said: list[str] = []
    with pytest.raises(BaseModelError, match="no such file or folder; give the folder of a model"):
        resolve_base(name, said.append)
    assert said == []


# --- the hub ----------------------------------------------------------------------------------------------------------------

RESOLVE = """
import sys
from loraloop.base_model import resolve_base
from loraloop.errors import BaseModelError
try:
    found = resolve_base(sys.argv[1])
    print(found.name, found.source, found.path, sep="\\n")
except BaseModelError as error:
    print("refused:", error)
"""


def resolve_with_cache(cache: Path, name: str) -> list[str]:
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", RESOLVE, name], capture_output=True, text=True, env=environment, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def put_into_cache(cache: Path, base: Path, *names: str, revision: str = "main") -> Path:
    """The hub's own layout: refs name a commit, snapshots hold its files."""
    commit = "c" * 40
    repository = cache / "models--some-org--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in names or [file.name for file in base.iterdir()]:
        shutil.copy(base / name, snapshot / name)
    return snapshot


@pytest.mark.parametrize("revision", ["main", "v2"])
def test_a_model_in_the_hubs_cache_is_found_offline(base: Path, tmp_path: Path, revision: str) -> None:
    snapshot = put_into_cache(tmp_path / "cache", base, revision=revision)
    name = "some-org/some-model" + ("@v2" if revision == "v2" else "")
    assert resolve_with_cache(tmp_path / "cache", name) == [name, "hub", str(snapshot)]


def test_a_model_of_which_the_cache_has_a_part_is_not_on_this_machine(base: Path, tmp_path: Path) -> None:
    put_into_cache(tmp_path / "cache", base, "config.json", "tokenizer.json", "tokenizer_config.json")
    (said,) = resolve_with_cache(tmp_path / "cache", "some-org/some-model")
    assert said.startswith(
        "refused: base model 'some-org/some-model': *.safetensors is not on this machine and cannot be had from the hub; "
    )


def test_a_model_of_which_the_cache_lacks_a_shard_is_not_on_this_machine(base: Path, tmp_path: Path) -> None:
    shutil.copy(base / "model.safetensors", base / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "model.safetensors").unlink()
    snapshot = put_into_cache(tmp_path / "cache", base)
    assert "model-00002-of-00002.safetensors is not on this machine" in resolve_with_cache(tmp_path / "cache", "some-org/some-model")[0]
    shutil.copy(snapshot / "model-00001-of-00002.safetensors", snapshot / "model-00002-of-00002.safetensors")
    assert resolve_with_cache(tmp_path / "cache", "some-org/some-model")[1] == "hub"


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "not a hub id!", "nobody/no-such-model@v9"])
def test_a_model_that_cannot_be_had_gives_one_line_at_once(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises(BaseModelError) as failure:
        resolve_base(name)
    assert str(failure.value).startswith(f"base model {name!r} is not on this machine and cannot be had from the hub (")
    assert str(failure.value).endswith(
        "; give the folder of a model saved as safetensors, a .gguf file, or the id of a model on the Hugging Face hub"
    )
    assert "\n" not in str(failure.value)
    assert time.monotonic() - started < 20


# --- a GGUF file ------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path) -> dict[str, Any]:
    """A tiny Llama as llama.cpp would have it, most of it in 8-bit blocks; gives what its tensors stand for."""
    import gguf
    import numpy as np
    from tokenizers import pre_tokenizers

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "<|im_start|>", "<|im_end|>"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_pad_token_id(len(tokens) - 1)
    writer.add_chat_template(CHATML)

    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    kv = HIDDEN // HEADS * KV_HEADS
    attention = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN)}
    network = {"ffn_gate": (WIDTH, HIDDEN), "ffn_up": (WIDTH, HIDDEN), "ffn_down": (HIDDEN, WIDTH)}
    of_a_layer = {**attention, **network, "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in of_a_layer.items()}
    draw, means = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        values = draw.normal(0, 0.05, shape).astype(np.float32)
        if len(shape) == 2 and name != "token_embd":
            blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", values)
        means[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return means


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORALOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_dequantised_exactly_with_its_tokenizer_and_template(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    means = write_gguf(tmp_path / "tiny.gguf")
    found = resolve_base(str(tmp_path / "tiny.gguf"))
    assert "MISSING" not in "".join(capfd.readouterr()), "transformers reports a tied head as lost"
    assert (found.name, found.source) == ("tiny", "gguf")
    assert cache in found.path.parents
    weights = {name: value.numpy() for name, value in load_model(found, "float32").state_dict().items()}
    for layer in range(LAYERS):
        own = f"model.layers.{layer}."
        assert np.array_equal(weights[own + "mlp.up_proj.weight"], means[f"blk.{layer}.ffn_up"])
        assert np.array_equal(weights[own + "self_attn.v_proj.weight"], means[f"blk.{layer}.attn_v"])
        assert np.array_equal(weights[own + "input_layernorm.weight"], means[f"blk.{layer}.attn_norm"])
        for name, heads in (("q", HEADS), ("k", KV_HEADS)):  # llama.cpp interleaves the two halves of a head that rotate together
            there = means[f"blk.{layer}.attn_{name}"]
            halves = there.reshape(heads, -1, 2, HIDDEN).swapaxes(1, 2).reshape(there.shape)
            assert np.array_equal(weights[own + f"self_attn.{name}_proj.weight"], halves)
    assert np.array_equal(weights["model.embed_tokens.weight"], means["token_embd"])
    assert np.array_equal(weights["lm_head.weight"], means["token_embd"]), "there is no head of its own in the file"
    tokenizer = load_tokenizer(found)
    assert tokenizer.chat_template == CHATML
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer("he<|im_end|>", add_special_tokens=False)["input_ids"] == [256, 258]


def test_a_gguf_file_is_dequantised_once(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    said: list[str] = []
    first = resolve_base(str(tmp_path / "tiny.gguf"), said.append)
    times = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    shutil.move(tmp_path / "tiny.gguf", tmp_path / "renamed.gguf")
    second = resolve_base(str(tmp_path / "renamed.gguf"), said.append)
    assert len(said) == 1
    assert said[0].startswith("dequantising tiny.gguf once into ")
    assert (second.path, second.sha256, second.name) == (first.path, first.sha256, "renamed")
    assert {file: file.stat().st_mtime_ns for file in first.path.iterdir()} == times
    assert [entry.name for entry in (cache / "gguf").iterdir()] == [first.path.name]


def test_one_that_is_overtaken_while_it_dequantises_takes_what_the_other_made(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    overtaking: list[BaseModel] = []
    found = resolve_base(str(tmp_path / "tiny.gguf"), lambda _: overtaking.append(resolve_base(str(tmp_path / "tiny.gguf"))))
    assert overtaking == [found]
    assert [entry.name for entry in (cache / "gguf").iterdir()] == [found.path.name]


def test_a_gguf_file_that_is_cut_off_is_told_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(BaseModelError, match=r"base model '.*tiny\.gguf' cannot be read by transformers: "):
        resolve_base(str(tmp_path / "tiny.gguf"))
    assert not cache.exists() or list(cache.rglob("*")) == []


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04", b"gguf"])
def test_a_file_that_is_not_gguf_is_told(tmp_path: Path, cache: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(BaseModelError, match="is a file but not GGUF"):
        resolve_base(str(tmp_path / "model.gguf"))


def test_cache_is_the_users_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORALOOP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_directory() == Path("/home/somebody/.cache/loraloop")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_directory() == Path("/var/cache/loraloop")
    monkeypatch.setenv("LORALOOP_CACHE", "/big/disk")
    assert cache_directory() == Path("/big/disk")


# --- loading ----------------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_in_the_type_that_was_asked_for(base: Path) -> None:
    import torch

    found = resolve_base(str(base))
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = load_model(found, name)  # type: ignore[arg-type]
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert not model.training


def test_code_in_a_models_folder_never_runs(base: Path, tmp_path: Path) -> None:
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    config = json.loads((base / "config.json").read_text())
    for changes in ({}, {"model_type": "never_heard_of"}):
        (base / "config.json").write_text(
            json.dumps({**config, **changes, "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}})
        )
        found = resolve_base(str(base))
        if changes:
            with pytest.raises(BaseModelError, match=r"base model 'base' in .*: it cannot be loaded \(it needs code from its own folder"):
                load_model(found, "float32")
        else:
            assert type(load_model(found, "float32")).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_there_are_never_made_up(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    for changes, lacks in (
        ({"num_hidden_layers": 3}, "lack 9 weights of a LlamaForCausalLM: model.layers.2."),
        ({"tie_word_embeddings": False}, "lm_head"),
    ):
        (base / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(BaseModelError, match=f"base model 'base' in .*: it cannot be loaded .*{lacks}"):
            load_model(resolve_base(str(base)), "float32")


def test_damaged_weights_and_tokenizers_are_told_with_their_folder(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"\0" * 100)
    (base / "tokenizer.json").write_text("{")
    found = resolve_base(str(base))
    with pytest.raises(BaseModelError, match=rf"base model 'base' in {base}: it cannot be loaded \("):
        load_model(found, "float32")
    with pytest.raises(BaseModelError, match=rf"base model 'base' in {base}: its tokenizer cannot be loaded \("):
        load_tokenizer(found)


def test_a_type_that_was_asked_for_is_used_and_auto_is_one_of_both() -> None:
    assert choose_dtype("float32", "cpu") == "float32"
    assert choose_dtype("bfloat16", "cpu") == "bfloat16"
    assert choose_dtype("auto", "cpu") in ("float32", "bfloat16")
