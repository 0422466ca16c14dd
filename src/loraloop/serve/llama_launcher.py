"""`python -m loraloop.serve.llama_launcher`: llama.cpp's own HTTP server, until this process is ended.

What it serves comes as JSON in the environment, since it holds a key, which the process list would show. When the server listens, one
line of JSON with its address goes to standard output; everything that llama.cpp says goes to standard error. Ends with 1 when the model
or the adapter is none.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from pydantic import Field

from loraloop.episode import Frozen

VARIABLE = "LORALOOP_LLAMA_SERVER"


class LlamaServerPlan(Frozen):
    """One server: a base model, and an adapter that each request must name."""

    model: str
    adapter: str | None
    name: str
    """What it calls its model."""
    api_key: str
    n_parallel: int = Field(ge=1)
    n_ctx: int = Field(ge=1)
    """Tokens of all requests under way together."""
    n_threads: int = Field(ge=1)
    is_exact: bool = False
    """Keys and values in float32, and plain attention: llama.cpp's flash attention rounds to float16 on the CPU."""


def main() -> None:
    """Never returns."""
    import xllamacpp

    plan = LlamaServerPlan.model_validate_json(os.environ.pop(VARIABLE))
    told = os.dup(1)
    os.dup2(2, 1)
    try:
        server = xllamacpp.Server(make_params(plan))
    except RuntimeError as error:
        sys.stderr.write(f"llama.cpp cannot serve {plan.name}: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    os.write(told, (json.dumps({"url": server.listening_address}) + "\n").encode())
    os.close(told)
    while True:
        signal.pause()


def make_params(plan: LlamaServerPlan) -> Any:
    """The settings of llama.cpp (`xllamacpp.CommonParams`), as the traps of its server want them."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = plan.model
    params.model_alias = {plan.name}
    params.n_ctx, params.n_parallel = plan.n_ctx, plan.n_parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = plan.n_threads
    params.n_gpu_layers = 0
    if plan.is_exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = False  # or it may take another context than it was told
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.api_keys = [plan.api_key]
    params.cors_origins, params.cors_credentials = "", False
    params.ui = params.endpoint_slots = False
    params.cache_ram_mib = 0  # its cache of prompts is kept by tokens alone, whatever adapter has computed it
    if plan.adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(plan.adapter, 0.0)]  # each request names it
    return params


if __name__ == "__main__":
    main()
