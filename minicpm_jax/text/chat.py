"""Messages to text to ids: chat templates in jinja2's immutable sandbox, as transformers has them.

Templates see messages, tools, add_generation_prompt, enable_thinking (when given), the special
token texts (bos_token, eos_token, pad_token) and the helpers raise_exception, strftime_now and
`tojson` without HTML escaping; `break`/`continue` and {% generation %} blocks work.
"""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from minicpm_jax.core.extras import require_extra
from minicpm_jax.text import templates
from minicpm_jax.text.tokenizer import Tokenizer

MINICPM2, CHATML, MINICPM5 = templates.MINICPM2, templates.CHATML, templates.MINICPM5

Message = Mapping[str, Any]  # {"role": ..., "content": ...} and what the template reads besides
_MARK = "generation_mark"  # context variable: the text put around a generation block
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplateError(ValueError):
  """A template that does not compile, refused the messages, or cannot serve a loss mask."""


def render(
  messages: Sequence[Message],
  tokenizer_or_template: Tokenizer | str,
  *,
  add_generation_prompt: bool = True,
  tools: Sequence[Mapping[str, Any]] | None = None,
  enable_thinking: bool | None = None,
  **extra: Any,
) -> str:
  """The prompt text. A str is a template (or a name of `templates.BUILT_IN`)."""
  return _render(
    messages,
    tokenizer_or_template,
    "",
    add_generation_prompt=add_generation_prompt,
    tools=tools,
    enable_thinking=enable_thinking,
    **extra,
  )


def render_spans(
  messages: Sequence[Message],
  tokenizer_or_template: Tokenizer | str,
  *,
  add_generation_prompt: bool = False,
  **extra: Any,
) -> tuple[str, list[tuple[int, int]]]:
  """The text and the [start, end) character spans of its {% generation %} blocks."""
  mark = f"\ue000{secrets.token_hex(8)}\ue001"
  marked = _render(
    messages, tokenizer_or_template, mark, add_generation_prompt=add_generation_prompt, **extra
  )
  pieces = marked.split(mark)
  spans, position = [], 0
  for index, piece in enumerate(pieces):
    if index % 2:
      spans.append((position, position + len(piece)))
    position += len(piece)
  return "".join(pieces), spans


def encode_chat(
  messages: Sequence[Message],
  tok: Tokenizer,
  *,
  template: str | None = None,
  add_generation_prompt: bool = True,
  **extra: Any,
) -> list[int]:
  """Prompt ids: one BOS where the model wants it, whether the template writes it or not."""
  text = render(
    messages,
    tok if template is None else template,
    add_generation_prompt=add_generation_prompt,
    **token_texts(tok),
    **extra,
  )
  return tok.encode(text, add_bos=needs_bos(text, tok))


def needs_bos(text: str, tok: Tokenizer) -> bool:
  """Whether a BOS must be put in front of rendered text."""
  bos = token_texts(tok).get("bos_token")
  return tok.add_bos and not (bos and text.startswith(bos))


def token_texts(tok: Tokenizer) -> dict[str, str]:
  """bos_token, eos_token, pad_token as templates see them; absent ones are left out."""
  names = {i: text for text, i in tok.special_tokens.items()}
  ids = {"bos_token": tok.bos_id, "eos_token": tok.eos_id, "pad_token": tok.pad_id}
  return {key: names[i] for key, i in ids.items() if i in names}


def template_text(tokenizer_or_template: Tokenizer | str) -> str:
  """The template itself; an error that names the ways out where a tokenizer has none."""
  if isinstance(tokenizer_or_template, str):
    return templates.BUILT_IN.get(tokenizer_or_template, tokenizer_or_template)
  if tokenizer_or_template.chat_template is None:
    raise ChatTemplateError(
      "this tokenizer has no chat template; expected one in tokenizer_config.json or "
      f"chat_template.jinja, or template= one of {', '.join(templates.BUILT_IN)}"
    )
  return tokenizer_or_template.chat_template


def has_generation_blocks(tokenizer_or_template: Tokenizer | str) -> bool:
  """Whether the template says itself which text is the assistant's."""
  return _GENERATION.search(template_text(tokenizer_or_template)) is not None


def _render(
  messages: Sequence[Message],
  tokenizer_or_template: Tokenizer | str,
  mark: str,
  *,
  enable_thinking: bool | None = None,
  **variables: Any,
) -> str:
  _check_messages(messages)
  if not isinstance(tokenizer_or_template, str):
    variables = token_texts(tokenizer_or_template) | variables
  if enable_thinking is not None:
    variables["enable_thinking"] = enable_thinking
  template = _compile(template_text(tokenizer_or_template))
  try:
    return template.render(messages=[dict(m) for m in messages], **variables, **{_MARK: mark})
  except Exception as error:  # whatever the expressions of a foreign template raise
    raise ChatTemplateError(f"chat template: {type(error).__name__}: {error}") from error


def _check_messages(messages: Sequence[Message]) -> None:
  for index, message in enumerate(messages):
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
      raise ChatTemplateError(
        f"messages[{index}]: found {message!r:.80}, expected a dict with 'role' and 'content'"
      )


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> Any:
  jinja2 = require_extra("jinja2", extra="text")
  try:
    return _environment().from_string(template)
  except jinja2.TemplateSyntaxError as error:
    raise ChatTemplateError(f"chat template, line {error.lineno}: {error.message}") from error


@functools.cache
def _environment() -> Any:
  jinja2 = require_extra("jinja2", extra="text")
  require_extra("jinja2.ext", extra="text")
  sandbox = require_extra("jinja2.sandbox", extra="text")

  class GenerationBlocks(jinja2.ext.Extension):
    """{% generation %}..{% endgeneration %}: the body, between two marks while a mask is made."""

    tags = {"generation"}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      call = self.call_method("marked", [jinja2.nodes.ContextReference()])
      return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def marked(self, context, caller):
      mark = context.get(_MARK, "")
      return mark + caller() + mark

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = tojson
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
  return environment
