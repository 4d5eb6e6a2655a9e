"""Training rows from conversations: ids and a loss mask that is 1 on what the assistant says.

The row is cut at the borders of the assistant's turns and every part is tokenised on its own, so
the ids in front of a trained turn are those that the model sees as its prompt when it generates.
"""

from collections.abc import Sequence
from typing import Any

from minicpm_jax.text import chat
from minicpm_jax.text.tokenizer import Tokenizer


def encode_with_mask(
  messages: Sequence[chat.Message],
  tok: Tokenizer,
  *,
  template: str | None = None,
  **extra: Any,
) -> tuple[list[int], list[int]]:
  """(ids, mask): assistant tokens and their end token have mask 1, everything else 0.

  The turns come from the template's {% generation %} blocks; without such blocks from rendering
  the conversation turn by turn, which a template that rewrites earlier turns does not allow
  (ChatTemplateError). Where the last assistant turn has no end token of its own (MiniCPM-1/2:
  `finetune/finetune.py` of the release), EOS is appended and trained.
  """
  source = tok if template is None else template
  extra = chat.token_texts(tok) | extra
  if chat.has_generation_blocks(source):
    text, spans = chat.render_spans(messages, source, **extra)
  else:
    text, spans = _spans_by_prefix(messages, source, tok, extra)
  if not spans and any(m["role"] == "assistant" for m in messages):
    raise chat.ChatTemplateError("chat template: renders nothing for the assistant's turns")
  ids, mask, position = [], [], 0
  if chat.needs_bos(text, tok):
    ids, mask = [tok.bos_id], [0]
  for start, end in spans:
    for part, value in ((text[position:start], 0), (text[start:end], 1)):
      part_ids = tok.encode(part)
      ids += part_ids
      mask += [value] * len(part_ids)
    position = end
  tail = tok.encode(text[position:])
  if spans and messages[-1]["role"] == "assistant" and not tail:
    ends = {*tok.special_tokens.values(), *tok.stop_ids}
    if tok.eos_id is not None and not (ids and ids[-1] in ends):
      return [*ids, tok.eos_id], [*mask, 1]
  return ids + tail, mask + [0] * len(tail)


def _spans_by_prefix(
  messages: Sequence[chat.Message], source: Tokenizer | str, tok: Tokenizer, extra: dict[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
  """Text and assistant spans from the differences between renderings of longer and longer rows."""
  text = chat.render(messages, source, add_generation_prompt=False, **extra)
  ends = [name for name, i in tok.special_tokens.items() if i in tok.stop_ids]
  spans = []
  for index, message in enumerate(messages):
    if message["role"] != "assistant":
      continue
    prompt = chat.render(messages[:index], source, add_generation_prompt=True, **extra)
    upto = chat.render(messages[: index + 1], source, add_generation_prompt=False, **extra)
    if not (upto.startswith(prompt) and text.startswith(upto)):
      whole, part = (upto, prompt) if not upto.startswith(prompt) else (text, upto)
      raise chat.ChatTemplateError(
        f"chat template: not prefix-stable at messages[{index}], so turns cannot be told apart: "
        f"found {_first_difference(whole, part)!r}, expected the row to go on from "
        f"{part[-40:]!r}; use a template with {{% generation %}} blocks (templates.BUILT_IN)"
      )
    turn = upto[len(prompt) :]
    found = [turn.rfind(end) + len(end) for end in ends if end in turn]
    spans.append((len(prompt), len(prompt) + max(found, default=len(turn))))
  return text, spans


def _first_difference(whole: str, part: str) -> str:
  pairs = zip(whole, part, strict=False)
  at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(whole), len(part)))
  return whole[at : at + 40]
