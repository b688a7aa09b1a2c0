"""Chat templates in the style of released ones, and conversations with all that rows may have."""

from typing import Any

CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}{% continue %}{% endif %}
    {%- set content = message.content if message.content is string else '' %}
    {{- '<|im_start|>' + message.role }}
    {%- if loop.index0 > ns.last and message.reasoning_content %}
        {{- '\\n<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>' }}
    {%- endif %}
    {{- '\\n' + content }}
    {%- for call in message.tool_calls or [] %}
        {%- set call = call.function if call.function else call %}
        {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
        {{- call.arguments if call.arguments is string else call.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

DATED = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|system|>Today Date: " + date_string + "\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + eos_token }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {{- message.tool_calls[0].function.arguments | tojson }}
    {%- else %}
        {{- "<|tool|>" + (message.content | tojson) + eos_token }}
    {%- endif %}
{%- endfor %}
"""

STRICT = """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
{% else %}
    {% set loop_messages = messages %}
{% endif %}
{{ bos_token }}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ ' [INST] ' + message['content'] + ' [/INST]' }}
    {% else %}
        {% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
{#- a comment -#}
"""

PARTS = """
{%- macro visible(content) -%}
    {%- if content is string -%}{{ content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}{{ item.text }}
            {%- elif item is string -%}{{ item }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ content }}
    {%- endif -%}
{%- endmacro -%}
{{- ']~!b[' ~ (unk_token | default('none')) }}
{%- for m in messages %}
    {%- if m.role == 'tool' and loop.previtem and loop.previtem.role != 'tool' %}{{- ']~b]tool' }}
    {%- else %}{{- ']~b]' ~ m.role }}{%- endif %}
    {{- '\\n' ~ visible(m.content) }}
    {%- for call in m.tool_calls or [] %}
        {%- for k, v in call.function.arguments.items() %}
            {{- '<parameter name="' ~ k ~ '">' }}
            {{- v | tojson(ensure_ascii=False) if v is not string else v }}
        {%- endfor %}
    {%- endfor %}
    {{- '[e~[\\n' }}
{%- endfor %}
"""

TEMPLATES = {"chatml": CHATML, "dated": DATED, "strict": STRICT, "parts": PARTS}

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Get <the> weather & the "sky\'s" colour: 15 °C.',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]

_CALL = {"id": "call12345", "type": "function"}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "question": {
        "messages": [
            {"role": "user", "content": "Is it far? <日本> "},
            {"role": "assistant", "content": " Not far.\n"},
        ],
        "tools": None,
    },
    "system": {
        "messages": [
            {"role": "system", "content": " Be brief.\n"},
            {"role": "user", "content": "Is it far?"},
            {"role": "assistant", "content": "No.", "reasoning_content": "\nShort.\n"},
            {"role": "user", "content": "And now?"},
        ],
        "tools": None,
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "Rain in Rome?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {**_CALL, "function": {"name": "weather", "arguments": {"city": "Röma"}}}
                ],
            },
            {"role": "tool", "tool_call_id": "call12345", "content": '{"sky": "blue"}'},
            {"role": "assistant", "content": "No."},
        ],
        "tools": TOOLS,
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Is it "}, {"type": "text"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "far."}]},
        ],
        "tools": None,
    },
    "wrong order": {
        "messages": [
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "Is it far?"},
        ],
        "tools": None,
    },
}
