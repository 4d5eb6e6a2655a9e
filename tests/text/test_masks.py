"""Loss masks: what is trained, where EOS stands, and that prompts match those of inference."""

import dataclasses

import pytest

from minicpm_jax.text import chat, masks, tokenizer

pytest.importorskip("jinja2")
pytest.importorskip("sentencepiece")

CONVERSATION = [
  {"role": "system", "content": "Be kind."},
  {"role": "user", "content": "One?"},
  {"role": "assistant", "content": "1"},
  {"role": "user", "content": "Two?"},
  {"role": "assistant", "content": "\n2 and\nmore"},
]
PLAIN_CHATML = (  # no {% generation %} block: the turns have to be found by rendering prefixes
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def minicpm4(shared_dir):
  return tokenizer.load_tokenizer(shared_dir / "models/minicpm4-0.5b-tokenizer")


@pytest.fixture(scope="module")
def minicpm2(minicpm4):
  """MiniCPM-1/2 traits (EOS is </s>) on the MiniCPM4 vocabulary."""
  traits = dataclasses.replace(
    minicpm4.traits, eos_id=2, stop_ids=(2,), chat_template=chat.MINICPM2
  )
  from minicpm_jax.text.sentencepiece_tokenizer import SentencePieceTokenizer

  return SentencePieceTokenizer(
    minicpm4.model, minicpm4.added_tokens, minicpm4.special_tokens, traits
  )


def parts(tok, ids, mask):
  """[(is trained, text), ...] of the runs of equal mask."""
  runs = []
  for token_id, value in zip(ids, mask, strict=True):
    text = tok.decode([token_id], skip_special=False)
    if runs and runs[-1][0] == value:
      runs[-1] = (value, runs[-1][1] + text)
    else:
      runs.append((value, text))
  return runs


@pytest.mark.smoke
@pytest.mark.parametrize("template", [None, chat.CHATML, PLAIN_CHATML])
def test_chatml_trains_content_and_im_end(minicpm4, template):
  ids, mask = masks.encode_with_mask(CONVERSATION, minicpm4, template=template)
  assert parts(minicpm4, ids, mask) == [
    (
      0,
      "<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
      "<|im_start|>assistant\n",
    ),
    (1, "1<|im_end|>"),
    (0, "\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"),
    (1, "\n2 and\nmore<|im_end|>"),
    (0, "\n"),
  ]


def test_minicpm2_row(minicpm2):
  """`finetune.py` of the release: bos, user masked, assistant trained, EOS trained at the end."""
  ids, mask = masks.encode_with_mask(CONVERSATION, minicpm2)
  expected, trained = [1], [0]
  for text, value in [
    ("Be kind.<用户>One?<AI>", 0),
    ("1", 1),
    ("<用户>Two?<AI>", 0),
    ("2 and\nmore", 1),
  ]:
    expected += minicpm2.encode(text)
    trained += [value] * len(minicpm2.encode(text))
  assert ids == [*expected, 2]
  assert mask == [*trained, 1]


@pytest.mark.parametrize("name", ["minicpm2", "minicpm4"])
def test_prompt_is_the_one_of_inference(request, name):
  """The ids before the last answer are what `encode_chat` gives the model when it answers."""
  tok = request.getfixturevalue(name)
  ids, mask = masks.encode_with_mask(CONVERSATION[:3], tok)
  prompt = chat.encode_chat(CONVERSATION[:2], tok)
  assert ids[: len(prompt)] == prompt
  assert mask[: len(prompt) + 1] == [0] * len(prompt) + [1]


def test_minicpm5_row(minicpm4):
  tools = [{"name": "f"}]
  messages = [
    {"role": "user", "content": "q"},
    {
      "role": "assistant",
      "content": "",
      "reasoning_content": "hm",
      "tool_calls": [{"name": "f", "arguments": {"a": 1}}],
    },
    {"role": "tool", "content": "ok"},
    {"role": "assistant", "content": "done"},
  ]
  row = masks.encode_with_mask(messages, minicpm4, template=chat.MINICPM5, tools=tools)
  trained = [text for value, text in parts(minicpm4, *row) if value]
  call = '<function name="f"><param name="a">1</param></function>'
  assert trained == [f"<think>\nhm\n</think>\n\n{call}<|im_end|>", "done<|im_end|>"]


def test_minicpm5_without_thinking_keeps_the_empty_block_in_the_prompt(minicpm4):
  messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
  kwargs = {"template": chat.MINICPM5, "enable_thinking": False}
  ids, mask = masks.encode_with_mask(messages, minicpm4, **kwargs)
  prompt = chat.encode_chat(messages[:1], minicpm4, **kwargs)
  assert ids[: len(prompt)] == prompt
  assert [text for value, text in parts(minicpm4, ids, mask) if value] == ["a<|im_end|>"]


def test_a_row_that_ends_with_the_user_trains_the_earlier_turns_only(minicpm2):
  ids, mask = masks.encode_with_mask(CONVERSATION[:4], minicpm2)
  assert parts(minicpm2, ids, mask)[1:] == [(1, "1"), (0, "<用户>Two?<AI>")]


def test_nothing_to_train(minicpm4):
  ids, mask = masks.encode_with_mask(CONVERSATION[:2], minicpm4)
  assert sum(mask) == 0
  assert len(ids) == len(mask) > 5


def test_template_that_rewrites_earlier_turns_is_refused(minicpm4):
  template = (
    "{% for m in messages %}{{ m.role + ': ' }}"
    "{{ m.content if loop.last or m.role != 'assistant' else 'dropped' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
  )
  with pytest.raises(chat.ChatTemplateError, match=r"not prefix-stable at messages\[2\]") as caught:
    masks.encode_with_mask(CONVERSATION, minicpm4, template=template)
  assert "generation %} blocks" in str(caught.value)


def test_template_without_the_prompt_of_the_turn_is_refused(minicpm4):
  template = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[other]' }}{% endif %}"
  )
  with pytest.raises(chat.ChatTemplateError, match="not prefix-stable"):
    masks.encode_with_mask(CONVERSATION[:3], minicpm4, template=template)


def test_template_whose_blocks_never_render_is_refused(minicpm4):
  template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}{% generation %}x{% endgeneration %}{% endif %}"  # noqa: E501
  with pytest.raises(chat.ChatTemplateError, match="renders nothing for the assistant"):
    masks.encode_with_mask(CONVERSATION, minicpm4, template=template)
