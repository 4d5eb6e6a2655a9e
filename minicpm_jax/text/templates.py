"""Built-in chat templates of the family, for folders that bring none (models.md 8).

Written from the rules, not copied: a released folder's own template wins where there is one. What
the assistant said, with its end token, stands in {% generation %} blocks: `masks` trains on that.
"""

# MiniCPM-1, -2, MoE: no separators, no end token between turns, the generation prompt is implicit.
MINICPM2 = (
  "{% for message in messages %}"
  "{% if message['role'] == 'user' %}"
  "{{ '<用户>' + message['content'] | trim + '<AI>' }}"
  "{% elif message['role'] == 'assistant' %}"
  "{% generation %}{{ message['content'] | trim }}{% endgeneration %}"
  "{% else %}"
  "{{ message['content'] | trim }}"
  "{% endif %}"
  "{% endfor %}"
)

# MiniCPM3, 4, 4.1, BitCPM4. The BOS comes from the tokenizer.
CHATML = (
  "{% for message in messages %}"
  "{{ '<|im_start|>' + message['role'] + '\\n' }}"
  "{% if message['role'] == 'assistant' %}"
  "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
  "{% else %}"
  "{{ message['content'] + '<|im_end|>' }}"
  "{% endif %}"
  "{{ '\\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# MiniCPM5: the template writes <s> itself. Thinking is `reasoning_content`, or <think>..</think> at
# the start of the content; it is kept only after the last genuine user turn. With
# enable_thinking=false the empty block of the generation prompt is also in front of those turns.
MINICPM5 = """\
{%- macro tool_section() -%}
{{ '<tools>\\n' }}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor -%}
{{ '</tools>' }}
{%- endmacro -%}

{%- macro call(item) -%}
{%- set function = item.function if item.function is defined else item -%}
{%- if function.arguments is string %}
{{- raise_exception('tool call ' + function.name + ': arguments is text, expected a dict') }}
{%- endif %}
{{- '<function name="' + function.name + '">' }}
{%- for name, value in (function.arguments or {}).items() %}
{{- '<param name="' + name + '">' }}
{%- if value is not string %}
{{- value | string }}
{%- elif '<' in value or '&' in value or '\\n' in value %}
{{- '<![CDATA[' + value + ']]>' }}
{%- else %}
{{- value }}
{%- endif %}
{{- '</param>' }}
{%- endfor %}
{{- '</function>' }}
{%- endmacro -%}

{%- set place = namespace(last_user=-1) -%}
{%- for message in messages %}
{%- set text = message['content'] if message['content'] is string else '' %}
{%- set is_result = text.startswith('<tool_response>') and text.endswith('</tool_response>') %}
{%- if message['role'] == 'user' and not is_result %}
{%- set place.last_user = loop.index0 %}
{%- endif %}
{%- endfor -%}

{{ '<s>' }}
{%- if tools and (not messages or messages[0]['role'] != 'system') %}
{{- '<|im_start|>system\\n' + tool_section() + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- set text = message['content'] or '' %}
{%- if message['role'] == 'system' and loop.first and tools %}
{%- if '<tool_def_sep>' in text %}
{%- set text = text.replace('<tool_def_sep>', tool_section()) %}
{%- else %}
{%- set text = text + '\\n\\n' + tool_section() %}
{%- endif %}
{%- endif %}
{%- if message['role'] == 'tool' %}
{%- set text = text if text is string else text | tojson %}
{%- if loop.first or loop.previtem['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + text + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- elif message['role'] == 'assistant' %}
{%- set thought = message['reasoning_content'] or '' %}
{%- if '</think>' in text %}
{%- set thought = thought or text.split('</think>')[0].split('<think>')[-1] %}
{%- set text = text.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- set thought = thought if loop.index0 > place.last_user else '' %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is false and loop.index0 > place.last_user and not thought %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- generation %}
{%- if thought %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- text }}
{%- for item in message['tool_calls'] or [] %}
{{- '\\n' if text or not loop.first else '' }}
{{- call(item) }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- else %}
{{- '<|im_start|>' + message['role'] + '\\n' + text + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

BUILT_IN = {"minicpm2": MINICPM2, "chatml": CHATML, "minicpm5": MINICPM5}
