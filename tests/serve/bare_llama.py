"""llama.cpp's own server with a model in a GGUF file, on its own: `python bare_llama.py GGUF`; prints its URL, and ends with its parent."""

from __future__ import annotations

import sys

import xllamacpp


def main(gguf: str) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel = 4096, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.cache_ram_mib = 0
    params.use_jinja = True
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    del server


if __name__ == "__main__":
    main(sys.argv[1])
