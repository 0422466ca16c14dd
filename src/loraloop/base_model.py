"""The base model an adapter is trained on: a hub id, a folder, or a GGUF file; found, hashed, and loaded without surprises.

Only safetensors are read, never pickles, and no code from a model's folder runs. A GGUF file is dequantised once into the user's
cache, in float32, so that what is trained is what llama.cpp serves. Everything works offline when the files are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from loraloop.episode import Frozen
from loraloop.errors import BaseModelError
from loraloop.files import file_sha256, new_directory

Dtype = Literal["auto", "float32", "bfloat16"]

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
_WAYS = "give the folder of a model saved as safetensors, a .gguf file, or the id of a model on the Hugging Face hub"


class BaseModel(Frozen):
    """A base model that is on this machine."""

    name: str
    """How adapters refer to it: the hub id, or the name of the folder or file, without its path."""
    source: Literal["hub", "folder", "gguf"]
    path: Path
    """A folder with config.json, a tokenizer, and weights as safetensors."""
    sha256: str
    """Over the weights and the configuration; two copies of one model agree."""


def resolve_base(base: str, say: Callable[[str], None] = lambda _: None) -> BaseModel:
    """Find `base`, fetching or converting it when needed; `say` hears what takes long.

    Raises BaseModelError, in one message, when it cannot be had or is not a model that can be trained.
    """
    path = Path(os.path.expanduser(base))  # noqa: PTH111  that of pathlib raises for a user that there is not
    if path.is_file():
        folder, name, source = _from_gguf(path, say), path.stem, "gguf"
    elif path.is_dir():
        folder, name, source = path.resolve(), path.resolve().name, "folder"
    elif base.startswith(("/", ".", "~")) or base.endswith(".gguf") or base.count("/") > 1:
        raise BaseModelError(f"base model {base!r}: no such file or folder; {_WAYS}")
    else:
        folder, name, source = _from_hub(base, say), base, "hub"
    return BaseModel(name=name, source=source, path=folder, sha256=_hash_folder(folder, base))


def load_tokenizer(base: BaseModel) -> Any:
    """The tokenizer with its chat template. Raises BaseModelError."""
    import transformers

    with _as_base_model_error(base, "its tokenizer cannot be loaded"):
        return transformers.AutoTokenizer.from_pretrained(str(base.path), local_files_only=True, trust_remote_code=False)


def load_model(base: BaseModel, dtype: Literal["float32", "bfloat16"]) -> Any:
    """The causal language model in `dtype`, in eval mode, on the CPU.

    Raises BaseModelError, also when weights are missing: transformers would make them up at random.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with _as_base_model_error(base, "it cannot be loaded"):
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            str(base.path),
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        _require_all_weights(model, loaded)
    return model.eval()


def watch_files(base: BaseModel) -> Callable[[], None]:
    """A check that raises BaseModelError when the files of `base` are not what they are now any more."""
    seen = _stamps(base.path)

    def check() -> None:
        if _stamps(base.path) == seen:
            return
        if _hash_folder(base.path, base.name) != base.sha256:
            raise BaseModelError(
                f"base model {base.name!r} in {base.path} was changed while an adapter was trained on it; put it back, and go on from the "
                "last checkpoint"
            )

    return check


def _stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes when a model's files do."""
    files = [folder / "config.json", *folder.glob("*.safetensors")]
    with contextlib.suppress(OSError):
        return {file.name: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for file in files for stat in [file.stat()]}
    return {}


def choose_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(wanted: Dtype, device: str) -> Literal["float32", "bfloat16"]:
    """`auto` is bfloat16 where the hardware computes in it; elsewhere it would be several times slower than float32."""
    import torch

    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if _cpu_has_bf16() else "float32"


def tune_process() -> bool:
    """Settings of this process for computing on the CPU; call it before torch is loaded. True when glibc took them.

    glibc keeps freed memory instead of returning it after every operation: touching fresh pages costs several times more than
    computing on warm ones. OpenMP's threads spin for a short while only before they sleep: where another program wants a core too,
    long spinning stalls both (docs/lab-book.md has the figures). There is one thread for each core that this process may use, however
    many hyper-threads a core has. Elsewhere than on Linux only the spinning applies. What the environment sets already is kept.
    """
    import ctypes

    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if n_cores := _count_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(n_cores))
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    no_mmap, trim_threshold, top_pad = -4, -1, -2  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    return bool(mallopt(no_mmap, 0) and mallopt(trim_threshold, 2**31 - 1) and mallopt(top_pad, 256 << 20))


def cache_directory() -> Path:
    """Where converted models are kept: LORALOOP_CACHE, else the user's cache directory."""
    if own := os.environ.get("LORALOOP_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraloop"


def _from_hub(base: str, say: Callable[[str], None]) -> Path:
    import huggingface_hub

    name, _, revision = base.partition("@")
    with contextlib.suppress(Exception):  # not in the local cache, or not a hub id at all: the next call tells which
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=_HUB_FILES, local_files_only=True))
        if not _list_missing(folder):
            return folder
    say(f"fetching {base} from the hub")
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=_HUB_FILES))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(f"base model {base!r} is not on this machine and cannot be had from the hub ({reason}); {_WAYS}") from error
    if missing := _list_missing(folder):  # offline, the hub's library gives what it has
        raise BaseModelError(f"base model {base!r}: {', '.join(missing)} is not on this machine and cannot be had from the hub; {_WAYS}")
    return folder


def _list_missing(folder: Path) -> list[str]:
    """What a folder of the hub's cache lacks of configuration, tokenizer and weights; other programs may have fetched a part only."""
    indexes = [json.loads(file.read_bytes()) for file in folder.glob("*.safetensors.index.json")]
    shards = sorted({str(name) for index in indexes for name in index["weight_map"].values()})
    return [pattern for pattern in ("config.json", "tokenizer*", "*.safetensors", *shards) if not any(folder.glob(pattern))]


def _from_gguf(path: Path, say: Callable[[str], None]) -> Path:
    """The folder with the dequantised model, made on the first call for these bytes."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise BaseModelError(f"base model {str(path)!r} is a file but not GGUF (it starts with {magic!r}); {_WAYS}")
    target = cache_directory() / "gguf" / file_sha256(path)[:24]
    if (target / "config.json").exists():
        return target
    say(f"dequantising {path.name} once into {target}")
    import torch
    import transformers

    try:
        folder, name = str(path.parent), path.name
        with _quiet():
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, dtype=torch.float32, output_loading_info=True
            )
            _require_all_weights(model, loaded)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except Exception as error:
        raise BaseModelError(f"base model {str(path)!r} cannot be read by transformers: {error}") from error
    model.hf_quantizer = None  # the weights are plain now; without this, saving them is refused
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with contextlib.suppress(FileExistsError), new_directory(target) as folder_aside:  # another process may have been faster
        model.save_pretrained(folder_aside)
        tokenizer.save_pretrained(folder_aside)
    return target


def _require_all_weights(model: Any, loaded: dict[str, Any]) -> None:
    """Raises BaseModelError for weights that neither the files hold nor other weights stand for (a head that is the embeddings)."""
    missing = sorted(set(loaded["missing_keys"]) - set(model.all_tied_weights_keys))
    if missing:
        few = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise BaseModelError(
            f"its files lack {len(missing)} weights of a {type(model).__name__}: {few}; get the whole of a causal language model"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, and without its report of a head that is missing where it is the embeddings again."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def _hash_folder(folder: Path, base: str) -> str:
    """SHA-256 over the names and hashes of config.json and the weights; raises BaseModelError when they are not there."""
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
        raise BaseModelError(
            f"base model {base!r}: the folder needs config.json and *.safetensors, and holds {found} "
            f"(pickled weights, .bin and .pt, are not read); {_WAYS}"
        )
    digest = hashlib.sha256()
    for file in [folder / "config.json", *weights]:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _as_base_model_error(base: BaseModel, what: str) -> Any:
    try:
        yield
    except Exception as error:
        # transformers would have its users pass the argument trust_remote_code
        why = "it needs code from its own folder, which loraloop never runs" if "trust_remote_code" in str(error) else error
        raise BaseModelError(f"base model {base.name!r} in {base.path}: {what} ({why})") from error


def _count_cores() -> int | None:
    """The cores behind the processors that this process may run on, or None where the system does not say."""
    try:
        allowed = os.sched_getaffinity(0)
        topology = [Path(f"/sys/devices/system/cpu/cpu{number}/topology") for number in allowed]
        cores = {(folder / "physical_package_id").read_text() + (folder / "core_id").read_text() for folder in topology}
    except (AttributeError, OSError):
        return None
    return len(cores)


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX512-BF16, AMX, or Arm's BF16 extension)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
