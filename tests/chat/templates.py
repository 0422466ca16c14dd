"""Chat templates that behave as the public ones of well-known model families, written anew and short, with their special tokens.

What is kept: what they render, drop, trim, group and refuse, to the character, for text messages and tools in the OpenAI shape.
What is left out: images, built-in tools, dates, and switches that no caller here sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import tiny
from later_templates import DEEPSEEK_R1, DEEPSEEK_V3_1, GEMMA_3, LFM2_5, MISTRAL_SMALL

from loraloop.chat.template import ChatTemplate


@dataclass(frozen=True)
class Family:
    """One model family's template."""

    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None

    def make_tokenizer(self) -> Any:
        tokenizer = tiny.make_tokenizer(self.template, special=list(self.special), eos=self.eos)
        if self.bos:
            tokenizer.bos_token = self.bos
        return tokenizer


CHATML_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

SMOLLM2 = """\
{%- for message in messages -%}
    {%- if loop.first and message.role != 'system' -%}
        {{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

LLAMA_3 = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

LLAMA_3_1 = """\
{{- bos_token -}}
{%- set system, turns = '', messages -%}
{%- if messages[0].role == 'system' -%}
    {%- set system, turns = messages[0].content | trim, messages[1:] -%}
{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
{%- if tools -%}{{- 'Environment: ipython\\n' -}}{%- endif -%}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' + system + '<|eot_id|>' -}}
{%- if tools -%}
    {%- if not turns -%}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") -}}
    {%- endif -%}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {{- 'Given the following functions, please respond with a JSON for a function call with its proper arguments that best ' -}}
    {{- 'answers the given prompt.\\n\\nRespond in the format {"name": function name, "parameters": dictionary of argument name ' -}}
    {{- 'and its value}.Do not use variables.\\n\\n' -}}
    {%- for tool in tools -%}{{- tool | tojson(indent=4) + '\\n\\n' -}}{%- endfor -%}
    {{- turns[0].content | trim + '<|eot_id|>' -}}
    {%- set turns = turns[1:] -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if message.role == 'tool' or message.role == 'ipython' -%}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' -}}
    {%- elif 'tool_calls' in message -%}
        {%- if message.tool_calls | length != 1 -%}
            {{- raise_exception('This model only supports single tool-calls at once!') -}}
        {%- endif -%}
        {%- set call = message.tool_calls[0].function -%}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' -}}
        {{- call.arguments | tojson + '}<|eot_id|>' -}}
    {%- else -%}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

QWEN_TOOLS = """\
{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with function signatures ' -}}
{{- 'within <tools></tools> XML tags:\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' -}}
{{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' -}}
{{- '<|im_end|>\\n' -}}
"""

QWEN_RESULTS = """\
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
"""

QWEN_2_5 = f"""\
{{%- set system = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' -%}}
{{%- if messages[0].role == 'system' -%}}{{%- set system = messages[0].content -%}}{{%- endif -%}}
{{{{- '<|im_start|>system\\n' + system -}}}}
{{%- if tools -%}}
    {{{{- '\\n\\n' -}}}}
    {QWEN_TOOLS}
{{%- else -%}}
    {{{{- '<|im_end|>\\n' -}}}}
{{%- endif -%}}
{{%- for message in messages -%}}
    {{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}}
        {{{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}}}
    {{%- elif message.role == 'assistant' -%}}
        {{{{- '<|im_start|>assistant' -}}}}
        {{%- if message.content or not message.tool_calls -%}}{{{{- '\\n' + message.content -}}}}{{%- endif -%}}
        {{%- for call in message.tool_calls or [] -%}}
            {{{{- '\\n<tool_call>\\n{{"name": "' + call.function.name + '", "arguments": ' -}}}}
            {{{{- call.function.arguments | tojson + '}}\\n</tool_call>' -}}}}
        {{%- endfor -%}}
        {{{{- '<|im_end|>\\n' -}}}}
    {{%- elif message.role == 'tool' -%}}
        {QWEN_RESULTS}
    {{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n' -}}}}{{%- endif -%}}
"""

QWEN_3 = f"""\
{{%- if tools -%}}
    {{{{- '<|im_start|>system\\n' -}}}}
    {{%- if messages[0].role == 'system' -%}}{{{{- messages[0].content + '\\n\\n' -}}}}{{%- endif -%}}
    {QWEN_TOOLS}
{{%- elif messages[0].role == 'system' -%}}
    {{{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}}}
{{%- endif -%}}
{{%- set seen = namespace(query=messages | length - 1, found=false) -%}}
{{%- for message in messages[::-1] -%}}
    {{%- set response = message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>') -%}}
    {{%- if not seen.found and message.role == 'user' and not response -%}}
        {{%- set seen.found, seen.query = true, messages | length - 1 - loop.index0 -%}}
    {{%- endif -%}}
{{%- endfor -%}}
{{%- for message in messages -%}}
    {{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}}
        {{{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}}}
    {{%- elif message.role == 'assistant' -%}}
        {{%- set thought, content = '', message.content -%}}
        {{%- if '</think>' in content -%}}
            {{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}}
            {{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}}
        {{%- endif -%}}
        {{{{- '<|im_start|>assistant\\n' -}}}}
        {{%- if loop.index0 > seen.query and (loop.last or thought) -%}}
            {{{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}}}
        {{%- else -%}}
            {{{{- content -}}}}
        {{%- endif -%}}
        {{%- for call in message.tool_calls or [] -%}}
            {{%- if content or not loop.first -%}}{{{{- '\\n' -}}}}{{%- endif -%}}
            {{{{- '<tool_call>\\n{{"name": "' + call.function.name + '", "arguments": ' -}}}}
            {{{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson -}}}}
            {{{{- '}}\\n</tool_call>' -}}}}
        {{%- endfor -%}}
        {{{{- '<|im_end|>\\n' -}}}}
    {{%- elif message.role == 'tool' -%}}
        {QWEN_RESULTS}
    {{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n' -}}}}{{%- endif -%}}
"""

LFM2_HEAD = """\
{{- bos_token -}}
{%- set system, turns = '', messages -%}
{%- if messages[0].role == 'system' -%}
    {%- set system, turns = messages[0].content, messages[1:] -%}
{%- endif -%}
{%- if tools -%}
    {%- set list = namespace(text=[]) -%}
    {%- for tool in tools -%}{%- set list.text = list.text + [tool | tojson] -%}{%- endfor -%}
    {%- set lead = system + '\\n' if system else '' -%}
    {%- set system = lead + 'List of tools: <|tool_list_start|>[' + list.text | join(', ') + ']<|tool_list_end|>' -%}
{%- endif -%}
{%- if system -%}{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}{%- endif -%}
"""

LFM2 = f"""\
{LFM2_HEAD}
{{%- for message in turns -%}}
    {{%- set content = message.content -%}}
    {{%- if message.role == 'tool' -%}}
        {{%- set content = '<|tool_response_start|>' + content + '<|tool_response_end|>' -%}}
    {{%- endif -%}}
    {{{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n' -}}}}{{%- endif -%}}
"""

LFM2_CALLS = f"""\
{LFM2_HEAD}
{{%- macro show(value) -%}}
    {{%- if value is string -%}}
        {{{{- "'" + value | replace('\\\\', '\\\\\\\\') | replace("'", "\\\\'") | replace('\\n', '\\\\n') + "'" -}}}}
    {{%- elif value is mapping or value is iterable -%}}{{{{- value | tojson -}}}}
    {{%- else -%}}{{{{- value | string -}}}}{{%- endif -%}}
{{%- endmacro -%}}
{{%- for message in turns -%}}
    {{%- set content = message.content -%}}
    {{%- if message.role == 'tool' -%}}
        {{%- set content = '<|tool_response_start|>' + content + '<|tool_response_end|>' -%}}
    {{%- endif -%}}
    {{{{- '<|im_start|>' + message.role + '\\n' + content -}}}}
    {{%- if message.tool_calls -%}}
        {{{{- '<|tool_call_start|>[' -}}}}
        {{%- for call in message.tool_calls -%}}
            {{%- if call.function.arguments is string -%}}
                {{{{- raise_exception('Tool call arguments must be a mapping') -}}}}
            {{%- endif -%}}
            {{{{- ', ' if not loop.first else '' -}}}}{{{{- call.function.name + '(' -}}}}
            {{%- for key, value in call.function.arguments.items() -%}}
                {{{{- ', ' if not loop.first else '' -}}}}{{{{- key + '=' + show(value) -}}}}
            {{%- endfor -%}}
            {{{{- ')' -}}}}
        {{%- endfor -%}}
        {{{{- ']<|tool_call_end|>' -}}}}
    {{%- endif -%}}
    {{{{- '<|im_end|>\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n' -}}}}{{%- endif -%}}
"""

MISTRAL = """\
{%- set turns = messages -%}
{%- if messages[0].role == 'system' -%}{%- set system, turns = messages[0].content, messages[1:] -%}{%- endif -%}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list -%}
{%- set count = namespace(plain=0) -%}
{%- for message in turns -%}
    {%- if message.role != 'tool' and message.tool_calls is not defined -%}
        {%- if (message.role == 'user') != (count.plain % 2 == 0) -%}
            {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant/user/assistant/...') -}}
        {%- endif -%}
        {%- set count.plain = count.plain + 1 -%}
    {%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {%- if tools and message == users[-1] -%}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        {{- '[INST] ' -}}
        {%- if loop.last and system is defined -%}{{- system + '\\n\\n' -}}{%- endif -%}
        {{- message.content + '[/INST]' -}}
    {%- elif message.tool_calls is defined -%}
        {{- '[TOOL_CALLS] [' -}}
        {%- for call in message.tool_calls -%}
            {%- if call.id is not defined or call.id | length != 9 -%}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
            {%- endif -%}
            {{- ', ' if not loop.first else '' -}}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' -}}
        {%- endfor -%}
        {{- ']' + eos_token -}}
    {%- elif message.role == 'assistant' -%}
        {{- ' ' + message.content | trim + eos_token -}}
    {%- elif message.role == 'tool' -%}
        {%- if message.tool_call_id is not defined or message.tool_call_id | length != 9 -%}
            {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
        {%- endif -%}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' -}}
    {%- else -%}
        {{- raise_exception('Only user and assistant roles are supported, with the exception of an initial optional system message!') -}}
    {%- endif -%}
{%- endfor -%}
"""

GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for message in messages -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- set role = 'model' if message.role == 'assistant' else message.role -%}
    {{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

LLAMA_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
LFM2_SPECIAL = (
    "<|startoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|tool_list_start|>",
    "<|tool_list_end|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "<|tool_response_start|>",
    "<|tool_response_end|>",
)
MISTRAL_SPECIAL = (
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)

DEEPSEEK_SPECIAL = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
)
GEMMA_SPECIAL = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")

FAMILIES = {
    "smollm2": Family(SMOLLM2, CHATML_SPECIAL, "<|im_end|>"),
    "chatml": Family(tiny.CHATML, CHATML_SPECIAL, "<|im_end|>"),
    "llama3": Family(LLAMA_3, LLAMA_SPECIAL, "<|eot_id|>", "<|begin_of_text|>"),
    "llama3.1": Family(LLAMA_3_1, LLAMA_SPECIAL, "<|eot_id|>", "<|begin_of_text|>"),
    "qwen2.5": Family(QWEN_2_5, CHATML_SPECIAL, "<|im_end|>"),
    "qwen3": Family(QWEN_3, CHATML_SPECIAL, "<|im_end|>"),
    "lfm2": Family(LFM2, LFM2_SPECIAL, "<|im_end|>", "<|startoftext|>"),
    "lfm2-calls": Family(LFM2_CALLS, LFM2_SPECIAL, "<|im_end|>", "<|startoftext|>"),
    "mistral": Family(MISTRAL, MISTRAL_SPECIAL, "</s>", "<s>"),
    "gemma": Family(GEMMA, GEMMA_SPECIAL, "<eos>", "<bos>"),
    "lfm2.5": Family(LFM2_5, LFM2_SPECIAL, "<|im_end|>", "<|startoftext|>"),
    "gemma3": Family(GEMMA_3, GEMMA_SPECIAL, "<eos>", "<bos>"),
    "mistral-small": Family(MISTRAL_SMALL, (*MISTRAL_SPECIAL, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "</s>", "<s>"),
    "deepseek-v3.1": Family(DEEPSEEK_V3_1, DEEPSEEK_SPECIAL, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
    "deepseek-r1": Family(DEEPSEEK_R1, DEEPSEEK_SPECIAL, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
}
NAMES = tuple(FAMILIES)
STABLE = ("smollm2", "chatml", "llama3", "llama3.1", "qwen2.5", "lfm2", "lfm2-calls", "lfm2.5", "deepseek-v3.1", "deepseek-r1")
"""Those that never render a turn without thoughts otherwise once later ones follow."""


@cache
def make_template(name: str) -> ChatTemplate:
    """The family's template with a byte-level tokenizer."""
    return ChatTemplate(FAMILIES[name].make_tokenizer())
