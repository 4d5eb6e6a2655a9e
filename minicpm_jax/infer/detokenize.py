"""Token ids to text piece by piece: no broken characters, nothing lost, nothing said twice."""

import codecs
from collections.abc import Sequence

from minicpm_jax.text import tokenizer


class StreamDecoder:
  """Text of a growing token sequence; the pieces joined are `tok.decode(ids)`.

  A token may end inside a multi-byte character; those bytes wait for the next token. Bytes that no
  continuation can complete come out as U+FFFD at once.
  """

  def __init__(self, tok: tokenizer.Tokenizer, *, skip_special: bool = True):
    self._tok = tok
    self._skip_special = skip_special
    self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    self._strip_space = getattr(tok, "strips_first_space", False)

  def push(self, ids: Sequence[int]) -> str:
    """The text that `ids` complete, maybe empty."""
    return self._emit(self._tok.decode_bytes(ids, skip_special=self._skip_special), final=False)

  def finish(self) -> str:
    """What was held back: U+FFFD if the sequence ended inside a character, else nothing."""
    return self._emit(b"", final=True)

  def _emit(self, data: bytes, *, final: bool) -> str:
    text = self._decoder.decode(data, final=final)
    if self._strip_space and text:
      self._strip_space = False
      text = text.removeprefix(" ")
    return text
