"""Processes that are forked from a server which has loaded what they need, so that one takes a moment: one server for all tests."""

from __future__ import annotations

import multiprocessing

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["loraloop.lora.registry", "loraloop.train.run", "transformers.models.llama.modeling_llama", "peft"])
