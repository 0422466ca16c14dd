"""What llama.cpp's server says of the chat template of a base model is what its endpoint says."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import CHATML, make_model

from loraloop.serve.llama_server import LlamaCppApplier, LlamaCppSettings

WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools:\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(("template", "ignores"), [(CHATML, True), (WITH_TOOLS, False)])
async def test_an_endpoint_tells_whether_the_models_template_leaves_tools_out(tmp_path: Path, template: str, ignores: bool) -> None:
    base = make_model("llama", tmp_path / "llama", template)
    applier = await LlamaCppApplier.open(str(base), tmp_path / "serving", LlamaCppSettings(n_ctx=256, n_threads=1))
    try:
        assert (await applier.start(applier.base)).ignores_tools is ignores
    finally:
        await applier.close()
