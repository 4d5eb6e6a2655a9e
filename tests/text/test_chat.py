"""Chat templates: the fixtures of models.md 8, transformers' renderer, the sandbox."""

import json

import pytest

from minicpm_jax.text import chat, templates, tokenizer

pytest.importorskip("jinja2")
pytest.importorskip("sentencepiece")

HELLO = [
  {"role": "system", "content": "You are a helpful assistant"},
  {"role": "user", "content": "Hello"},
  {"role": "assistant", "content": "Hi there"},
]
TOOLS = [
  {"type": "function", "function": {"name": "weather", "description": "天气 <now> & 'then'"}},
  {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
]


def call(name, **arguments):
  return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture(scope="module")
def minicpm4(shared_dir):
  return tokenizer.load_tokenizer(shared_dir / "models/minicpm4-0.5b-tokenizer")


def test_minicpm2_fixture():
  """llama.cpp's fixture for MiniCPM-1/2."""
  text = chat.render(HELLO, chat.MINICPM2)
  assert text == "You are a helpful assistant<用户>Hello<AI>Hi there"
  turns = [{"role": "user", "content": " a \n"}, {"role": "assistant", "content": " b "}]
  assert chat.render(turns * 2, "minicpm2") == "<用户>a<AI>b<用户>a<AI>b"


@pytest.mark.smoke
@pytest.mark.parametrize("is_prompt", [True, False])
def test_chatml(minicpm4, is_prompt):
  expected = (
    "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there<|im_end|>\n"
  ) + "<|im_start|>assistant\n" * is_prompt
  for source in (chat.CHATML, minicpm4):
    assert chat.render(HELLO, source, add_generation_prompt=is_prompt) == expected


def test_bos_once(minicpm4):
  """From the tokenizer for ChatML, from the template for MiniCPM5; never twice."""
  user = [{"role": "user", "content": "hi"}]
  ids = [73441, 1836, 5, 6920, 73440, 5, 73441, 43686, 5]  # README of the tokenizer
  assert chat.encode_chat(user, minicpm4) == [1, *ids]
  assert chat.encode_chat(user, minicpm4, template=chat.MINICPM5) == [1, *ids]
  with_bos = "{{ bos_token }}{{ messages[0].content }}"
  assert chat.encode_chat(user, minicpm4, template=with_bos) == [1, 6920]


def test_no_bos_for_a_model_without(shared_dir):
  tok = tokenizer.load_tokenizer(shared_dir / "models/smollm2-135m-instruct")
  user = [{"role": "user", "content": "hi"}]
  text = chat.render(user, tok)
  assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
  assert chat.encode_chat(user, tok) == tok.encode(text)


# ------------------------------------------------------------------------------- MiniCPM5


def minicpm5(messages, **kwargs):
  return chat.render(messages, chat.MINICPM5, **kwargs)


def test_minicpm5_plain_turns():
  assert minicpm5(HELLO) == (
    "<s><|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there<|im_end|>\n"
    "<|im_start|>assistant\n"
  )


@pytest.mark.parametrize(
  "enable_thinking, tail", [(None, ""), (True, ""), (False, "<think>\n\n</think>\n\n")]
)
def test_minicpm5_generation_prompt(enable_thinking, tail):
  text = minicpm5(HELLO[:2], enable_thinking=enable_thinking)
  assert text.endswith("Hello<|im_end|>\n<|im_start|>assistant\n" + tail)


@pytest.mark.parametrize(
  "system, expected",
  [
    (None, "{tools}"),
    ("Be brief.", "Be brief.\n\n{tools}"),
    ("A\n<tool_def_sep>\nB", "A\n{tools}\nB"),
  ],
)
def test_minicpm5_tools_section(system, expected):
  section = "\n".join(["<tools>", *(json.dumps(t, ensure_ascii=False) for t in TOOLS), "</tools>"])
  messages = [] if system is None else [{"role": "system", "content": system}]
  text = minicpm5([*messages, {"role": "user", "content": "q"}], tools=TOOLS)
  turn = expected.replace("{tools}", section)
  assert text == (
    f"<s><|im_start|>system\n{turn}<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
    "<|im_start|>assistant\n"
  )


def test_minicpm5_calls():
  """CDATA for text with <, & or a newline; Python str() for everything that is no text."""
  message = {
    "role": "assistant",
    "content": "Let me see.",
    "tool_calls": [
      call("f", a="plain", b="x < y", c="a & b", d="two\nlines"),
      call("g", t=True, n=None, d={"k": ["v", 1]}, i=3, x=0.5),
      {"name": "h", "arguments": {}},
    ],
  }
  text = minicpm5([{"role": "user", "content": "q"}, message], add_generation_prompt=False)
  expected = (
    'Let me see.\n<function name="f"><param name="a">plain</param>'
    '<param name="b"><![CDATA[x < y]]></param><param name="c"><![CDATA[a & b]]></param>'
    '<param name="d"><![CDATA[two\nlines]]></param></function>\n'
    '<function name="g"><param name="t">True</param><param name="n">None</param>'
    "<param name=\"d\">{'k': ['v', 1]}</param><param name=\"i\">3</param>"
    '<param name="x">0.5</param></function>\n<function name="h"></function><|im_end|>\n'
  )
  assert text.split("<|im_start|>assistant\n")[1] == expected
  silent = minicpm5([{"role": "user", "content": "q"}, message | {"content": None}])
  assert '<|im_start|>assistant\n<function name="f">' in silent


def test_minicpm5_tool_results_merge():
  messages = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "", "tool_calls": [call("f"), call("g")]},
    {"role": "tool", "content": "1"},
    {"role": "tool", "content": {"two": "2"}},
    {"role": "assistant", "content": "done"},
    {"role": "tool", "content": "3"},
  ]
  text = minicpm5(messages, add_generation_prompt=False)
  assert text.endswith(
    "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n"
    '{"two": "2"}\n</tool_response><|im_end|>\n<|im_start|>assistant\ndone<|im_end|>\n'
    "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
  )


@pytest.mark.parametrize("is_field", [True, False], ids=["reasoning_content", "inline"])
def test_minicpm5_thinking_is_dropped_before_the_last_user_turn(is_field):
  def thinking(text, **extra):
    thought, content = {"reasoning_content": "why"}, text
    if not is_field:
      thought, content = {}, f"<think>\nwhy\n</think>\n\n{text}"
    return {"role": "assistant", "content": content} | thought | extra

  kept = "<|im_start|>assistant\n<think>\nwhy\n</think>\n\n"
  messages = [
    {"role": "user", "content": "one"},
    thinking("first"),
    {"role": "user", "content": "two"},
    thinking("", tool_calls=[call("f")]),
    {"role": "tool", "content": "1"},
    thinking("second"),
  ]
  text = minicpm5(messages, add_generation_prompt=False)
  assert "one<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>" in text
  assert f"two<|im_end|>\n{kept}<function" in text
  assert f"</tool_response><|im_end|>\n{kept}second<|im_end|>" in text
  wrapped = {"role": "user", "content": "<tool_response>\n1\n</tool_response>"}
  assert minicpm5([*messages[:4], wrapped, *messages[5:]]).count("why") == 2
  assert "why" not in minicpm5([*messages, {"role": "user", "content": "three"}])


def test_minicpm5_arguments_as_text_are_refused():
  bad = {"name": "f", "arguments": '{"a": 1}'}
  messages = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [bad]}]
  with pytest.raises(chat.ChatTemplateError, match="arguments is text, expected a dict"):
    minicpm5(messages)


# --------------------------------------------------------------- the environment itself

TRICKY = """\
{%- set found = namespace(n=0) %}
{% for m in messages %}
    {% if m.role == 'system' %}
        {% continue %}
    {% endif %}
  {{- m | tojson }} {{ m | tojson(indent=2, sort_keys=True) }}
    {% set found.n = found.n + 1 %}
    {% if found.n > 1 %}{% break %}{% endif %}
  {% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{% endgeneration %}
{% endif %}
{% endfor %}
{{ found.n }}|{{ bos_token }}|{{ tools | length if tools else 'none' }}|{{ missing }}|
{{- strftime_now('%Y') }}
"""


@pytest.mark.oracle
@pytest.mark.parametrize("template", [*templates.BUILT_IN.values(), TRICKY])
@pytest.mark.parametrize("is_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_transformers_renders_the_same(template, is_prompt, tools):
  utils = pytest.importorskip("transformers.utils.chat_template_utils")
  messages = [*HELLO, {"role": "user", "content": "<b>\"é\"</b> & 你好 'x'\n"}]
  [expected], spans = utils.render_jinja_template(
    [messages],
    chat_template=template,
    tools=tools,
    add_generation_prompt=is_prompt,
    return_assistant_tokens_mask="generation %}" in template,
    bos_token="<s>",
  )
  kwargs = {"add_generation_prompt": is_prompt, "tools": tools, "bos_token": "<s>"}
  assert chat.render(messages, template, **kwargs) == expected
  text, ours = chat.render_spans(messages, template, **kwargs)
  assert text == expected
  assert ours == [tuple(s) for s in (spans or [[]])[0]]


@pytest.mark.parametrize(
  "template",
  [
    "{{ messages.append({}) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% include 'other' %}",
  ],
)
def test_sandbox(template):
  with pytest.raises(chat.ChatTemplateError):
    chat.render(HELLO, template)


def test_sandbox_hides_internals():
  assert chat.render(HELLO, "[{{ raise_exception.__globals__ }}]") == "[]"


@pytest.mark.parametrize(
  "template, messages, match",
  [
    ("{{ raise_exception('only two roles') }}", HELLO, "only two roles"),
    ("a\n{% for %}", HELLO, "line 2"),
    (chat.CHATML, [{"role": "user", "content": None}], "TypeError"),
    (chat.CHATML, [{"content": "x"}], r"messages\[0\]: found {'content': 'x'}"),
  ],
)
def test_errors(template, messages, match):
  with pytest.raises(chat.ChatTemplateError, match=match):
    chat.render(messages, template)


@pytest.mark.parametrize("body", ["{{ 1 / 0 }}", "{{ messages[5].x.y }}", "{{ range(10**9) }}"])
def test_whatever_a_template_raises_is_an_error_of_the_template(body):
  with pytest.raises(chat.ChatTemplateError, match="chat template: "):
    chat.render([{"role": "user", "content": "a"}], body)


def test_tokenizer_without_template():
  tok = tokenizer.train_bpe(["abc"], 300, special_tokens=("<s>", "</s>"))
  with pytest.raises(
    chat.ChatTemplateError, match="no chat template; expected .* minicpm2, chatml"
  ):
    chat.render(HELLO, tok)
