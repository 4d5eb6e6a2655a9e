"""Token ids to text piece by piece: no broken characters, nothing lost, nothing said twice.

`StreamDecoder` turns tokens into text, `StopStrings` finds the end in the text, `TextStream` is
both with stop ids and the finish reason; Chat and the server use the last.
"""

import codecs
from collections.abc import Collection, Sequence
from typing import Literal

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


class StopStrings:
  """Stop strings in text that comes in pieces; what may be the start of one is held back.

  The text ends where the first stop string is complete (of several that end there, the longest
  counts), whatever the pieces are. The stop string itself is not part of the text. One text is one
  stop string.
  """

  def __init__(self, stops: Sequence[str]):
    stops = [stops] if isinstance(stops, str) else stops
    if not all(isinstance(stop, str) and stop for stop in stops):
      raise ValueError(f"stop: found {list(stops)!r}, expected texts that are not empty")
    self._stops = tuple(stops)
    self._held = ""
    self.found: str | None = None  # the stop string that ended the text
    self.rest = ""  # what came after it in the last piece

  def push(self, text: str) -> str:
    """The text that can be said now; nothing once a stop string has been found."""
    if self.found is not None:
      self.rest += text
      return ""
    text = self._held + text
    hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
    if hits:
      end, start, self.found = min(hits)
      self._held, self.rest = "", text[end:]
      return text[:start]
    size = max((_overlap(text, stop) for stop in self._stops), default=0)
    self._held = text[len(text) - size :]
    return text[: len(text) - size]

  def finish(self) -> str:
    """What was held back and turned out to be text."""
    held, self._held = self._held, ""
    return held


def _overlap(text: str, stop: str) -> int:
  """Length of the longest proper prefix of `stop` that `text` ends with."""
  for size in range(min(len(stop) - 1, len(text)), 0, -1):
    if text.endswith(stop[:size]):
      return size
  return 0


class TextStream:
  """The text of one answer: tokens in, text out, until a stop id or a stop string.

  `kept_special` are special tokens that belong to the text (markers of tool calls); the others are
  not shown. `num_tokens` counts what was taken, the ending token included; tokens that come after
  the end are not.
  """

  def __init__(
    self,
    tok: tokenizer.Tokenizer,
    *,
    stop_ids: Collection[int] = (),
    stop: Sequence[str] = (),
    kept_special: Collection[int] = (),
  ):
    self._decoder = StreamDecoder(tok, skip_special=False)
    self._stops = StopStrings(stop)
    self._stop_ids = frozenset(stop_ids)
    self._hidden = frozenset(tok.special_tokens.values()) - frozenset(kept_special)
    self.num_tokens = 0
    self.finish_reason: Literal["stop", "length"] | None = None
    self.stop_string: str | None = None

  def push(self, ids: Sequence[int]) -> str:
    """The text that `ids` complete, up to the end of the answer."""
    text = ""
    for token in ids:
      if self.finish_reason is not None:
        break
      self.num_tokens += 1
      if token in self._stop_ids:
        text += self.finish("stop")
      elif token not in self._hidden:
        text += self._take(self._decoder.push([token]))
    return text

  def finish(self, reason: Literal["stop", "length"]) -> str:
    """Ends the answer from outside (no more tokens); the text held back so far."""
    if self.finish_reason is not None:
      return ""
    text = self._take(self._decoder.finish())
    if self.finish_reason is None:
      self.finish_reason = reason
      text += self._stops.finish()
    return text

  def _take(self, text: str) -> str:
    text = self._stops.push(text)
    if self._stops.found is not None:
      self.finish_reason, self.stop_string = "stop", self._stops.found
    return text
