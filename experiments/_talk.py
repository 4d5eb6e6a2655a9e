"""A conversation in the terminal: prompts in, shown answers and summary blocks out."""

import contextlib
import sys
from collections.abc import Generator

from experiments import _infer
from minicpm_jax import config
from minicpm_jax.infer import chat as chat_lib
from minicpm_jax.infer import engine
from minicpm_jax.text import chat as chat_text


def show(pieces: Generator[str], *, use_stream: bool = True) -> str:
  """Prints an answer as it comes, or at its end; the text."""
  said = []
  with contextlib.closing(pieces):
    for piece in pieces:
      said.append(piece)
      if use_stream:
        print(piece, end="", flush=True)
  print("" if use_stream else "".join(said), flush=True)
  return "".join(said)


class Talk:
  """Prompts to shown answers, with the conversation so far."""

  def __init__(self, cfg: config.InferConfig, loaded: _infer.Loaded, system: str | None):
    self.cfg, self.loaded = cfg, loaded
    self.first = [{"role": "system", "content": system}] if system else []
    self.messages = list(self.first)
    self.sampling = _infer.sampling(cfg)

  def say(self, text: str) -> None:
    turn = {"role": "user", "content": text}
    model, tok = self.loaded.engine.model, self.loaded.tok
    template = chat_lib.template_for(model.cfg, tok)
    prompt = chat_text.encode_chat([*self.messages, turn], tok, template=template)
    said = self.complete(prompt)
    self.messages += [turn, {"role": "assistant", "content": said}]

  def complete(self, prompt: list[int]) -> str:
    stats: list[engine.Stats] = []
    mask = _infer.constraint(self.cfg, self.loaded)
    pieces = _infer.answer(self.loaded, prompt, self.sampling, stats, mask)
    said = show(pieces, use_stream=self.cfg.use_stream)
    print(_colour(summary(stats[0]), self.cfg), file=sys.stderr)
    return said


def summary(stats: engine.Stats) -> str:
  """The block of CPM.cu (inference.md 19): lengths, times, rates, mean accept length."""
  decoded = max(stats.new_tokens - 1, 0)  # the first token comes out of the prefill
  computed = stats.prompt_tokens - stats.cached_tokens
  rows = [
    ("prefill length", f"{stats.prompt_tokens} tokens ({stats.cached_tokens} from the cache)"),
    ("prefill time", f"{stats.prefill_seconds:.3f} s"),
    ("prefill speed", f"{computed / max(stats.prefill_seconds, 1e-9):.1f} tok/s"),
    ("mean accept length", f"{max(stats.mean_accepted, 1.0):.2f}"),
    ("decode length", f"{stats.new_tokens} tokens"),
    ("decode time", f"{stats.decode_seconds:.3f} s"),
    ("decode speed", f"{decoded / max(stats.decode_seconds, 1e-9):.1f} tok/s"),
    ("compile time", f"{stats.compile_seconds:.1f} s (in no rate)"),
  ]
  return "\n".join(f"{name + ':':20}{value}" for name, value in rows)


def _colour(text: str, cfg: config.InferConfig) -> str:
  return text if cfg.plain_output or not sys.stderr.isatty() else f"\x1b[2m{text}\x1b[0m"


def converse(talk: Talk) -> None:
  """Reads turns until the end of input; an error or Ctrl-C ends the answer, not the chat."""
  while True:
    try:
      text = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
      print()
      return
    if text == "/reset":
      talk.messages = list(talk.first)
    elif text:
      try:
        talk.say(text)
      except KeyboardInterrupt:
        print(" ...")
      except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
