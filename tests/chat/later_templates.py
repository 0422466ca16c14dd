"""More families, those whose templates came later or treat thoughts and calls in a way of their own; see templates.py."""

from __future__ import annotations

LFM2_5 = """\
{{- bos_token -}}
{%- macro show(value) -%}
    {%- if value is string -%}{{- '"' + value + '"' -}}
    {%- elif value is mapping -%}{{- value | tojson -}}
    {%- else -%}{{- value | string -}}{%- endif -%}
{%- endmacro -%}
{%- set head = namespace(system='', last=-1) -%}
{%- set turns = messages -%}
{%- if messages[0].role == 'system' -%}{%- set head.system, turns = messages[0].content, messages[1:] -%}{%- endif -%}
{%- if tools -%}
    {%- set lead = head.system + '\\n\\n' if head.system else '' -%}
    {%- set head.system = lead + "Today's date: " + strftime_now('%Y-%m-%d') + '\\n\\nList of tools: ' + tools | tojson -%}
{%- endif -%}
{%- if head.system -%}{{- '<|im_start|>system\\n' + head.system + '<|im_end|>\\n' -}}{%- endif -%}
{%- for message in turns if message.role == 'assistant' -%}{%- set head.last = head.last + 1 -%}{%- endfor -%}
{%- set seen = namespace(agent=-1) -%}
{%- for message in turns -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- set seen.agent = seen.agent + 1 -%}
        {%- generation -%}
        {%- if message.tool_calls is defined -%}
            {{- '<|tool_call_start|>[' -}}
            {%- for call in message.tool_calls -%}
                {{- ', ' if not loop.first else '' -}}{{- call.function.name + '(' -}}
                {%- for key, value in call.function.arguments.items() -%}
                    {{- ', ' if not loop.first else '' -}}{{- key + '=' + show(value) -}}
                {%- endfor -%}
                {{- ')' -}}
            {%- endfor -%}
            {{- ']<|tool_call_end|>' -}}
        {%- endif -%}
        {%- set content = message.content -%}
        {%- if seen.agent != head.last and '</think>' in content -%}{%- set content = content.split('</think>')[-1] | trim -%}{%- endif -%}
        {{- content + '<|im_end|>\\n' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message.content + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

GEMMA_3 = """\
{{- bos_token -}}
{%- set lead, turns = '', messages -%}
{%- if messages[0].role == 'system' -%}{%- set lead, turns = messages[0].content + '\\n\\n', messages[1:] -%}{%- endif -%}
{%- for message in turns -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' + (lead if loop.first else '') -}}
    {{- message.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

MISTRAL_SMALL = """\
{{- bos_token -}}
{%- set system, turns = 'You are Mistral Small 3. The current date is ' + strftime_now('%Y-%m-%d') + '.', messages -%}
{%- if messages[0].role == 'system' -%}{%- set system, turns = messages[0].content, messages[1:] -%}{%- endif -%}
{%- if tools -%}{%- set system = 'You are a helpful assistant that can call tools.\\n\\n' + system -%}{%- endif -%}
{{- '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' -}}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list -%}
{%- set count = namespace(plain=0) -%}
{%- for message in turns if message.role != 'tool' and not message.tool_calls -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
{%- endfor -%}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {%- if tools and message == users[-1] -%}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
        {{- '[INST]' + message.content + '[/INST]' -}}
    {%- elif message.tool_calls -%}
        {{- '[TOOL_CALLS] [' -}}
        {%- for call in message.tool_calls -%}
            {%- if call.id is not defined or call.id | length < 9 -%}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length >= 9!') -}}
            {%- endif -%}
            {{- ', ' if not loop.first else '' -}}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id[-9:] + '"}' -}}
        {%- endfor -%}
        {{- ']' + eos_token -}}
    {%- elif message.role == 'assistant' -%}
        {{- message.content + eos_token -}}
    {%- elif message.role == 'tool' -%}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id[-9:] + '"}[/TOOL_RESULTS]' -}}
    {%- endif -%}
{%- endfor -%}
"""

DEEPSEEK_V3_1 = """\
{%- set seen = namespace(system=[], asked=false, result=false) -%}
{%- for message in messages if message.role == 'system' -%}{%- set seen.system = seen.system + [message.content] -%}{%- endfor -%}
{{- bos_token + seen.system | join('\\n\\n') -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set seen.asked, seen.result = true, false -%}
        {{- '<｜User｜>' + message.content -}}
    {%- elif message.role == 'assistant' -%}
        {%- if seen.asked -%}{{- '<｜Assistant｜></think>' -}}{%- endif -%}
        {%- set seen.asked = false -%}
        {%- if message.tool_calls is defined -%}
            {%- set seen.result = false -%}
            {{- message.content + '<｜tool▁calls▁begin｜>' -}}
            {%- for call in message.tool_calls -%}
                {{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments + '<｜tool▁call▁end｜>' -}}
            {%- endfor -%}
            {{- '<｜tool▁calls▁end｜>' -}}
        {%- elif '</think>' in message.content and not seen.result -%}
            {{- message.content.split('</think>', 1)[1] -}}
        {%- else -%}
            {{- message.content -}}
            {%- set seen.result = false -%}
        {%- endif -%}
        {{- '<｜end▁of▁sentence｜>' -}}
    {%- elif message.role == 'tool' -%}
        {%- set seen.asked, seen.result = false, true -%}
        {{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and seen.asked -%}{{- '<｜Assistant｜></think>' -}}{%- endif -%}
"""

DEEPSEEK_R1 = """\
{%- set seen = namespace(system='', called=false, answered=false, result=false) -%}
{%- for message in messages if message.role == 'system' -%}{%- set seen.system = message.content -%}{%- endfor -%}
{{- bos_token + seen.system -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set seen.result = false -%}
        {{- '<｜User｜>' + message.content -}}
    {%- endif -%}
    {%- if message.role == 'assistant' and message.tool_calls -%}
        {%- set seen.result = false -%}
        {%- for call in message.tool_calls -%}
            {{- '\\n' if seen.called else '<｜Assistant｜><｜tool▁calls▁begin｜>' -}}
            {{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' -}}
            {{- call.function.arguments + '\\n```<｜tool▁call▁end｜>' -}}
            {%- set seen.called = true -%}
        {%- endfor -%}
        {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' -}}
    {%- endif -%}
    {%- if message.role == 'assistant' and message.content is not none -%}
        {%- if seen.result -%}
            {{- '<｜tool▁outputs▁end｜>' + message.content + '<｜end▁of▁sentence｜>' -}}
            {%- set seen.result = false -%}
        {%- else -%}
            {{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' -}}
        {%- endif -%}
    {%- endif -%}
    {%- if message.role == 'tool' -%}
        {%- set seen.result = true -%}
        {{- '\\n' if seen.answered else '<｜tool▁outputs▁begin｜>' -}}
        {{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' -}}
        {%- set seen.answered = true -%}
    {%- endif -%}
{%- endfor -%}
{%- if seen.result -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}
{%- if add_generation_prompt and not seen.result -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}
"""
