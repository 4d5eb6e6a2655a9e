"""Text from a model on disk: one prompt, or a chat in the terminal.

  python -m experiments.generate --model=DIR_OR_GGUF --prompt="Why is the sky blue?"
  python -m experiments.generate --model=runs/nano@500 --raw --prompt="def add(a, b):"
  python -m experiments.generate --model=SmolLM2-135M-Instruct.Q4_1.gguf --chat --temperature=0.7

DIR_OR_GGUF is a Hugging Face folder, the folder of a training run (newest checkpoint, or @STEP), or
a GGUF file. A prompt goes through the tokenizer's chat template where it has one, unless --raw.
Text goes to stdout, a line of counts and rates to stderr. In a chat: /reset forgets, Ctrl-C stops
the answer, Ctrl-D leaves.
"""

import contextlib
import sys
from collections.abc import Generator

from absl import flags

from experiments import _models
from minicpm_jax import config
from minicpm_jax.infer import chat as chat_lib

SAMPLING = {
  "temperature": (flags.DEFINE_float, "0 is greedy."),
  "top_k": (flags.DEFINE_integer, "Keep the k most likely tokens; 0 is off."),
  "top_p": (flags.DEFINE_float, "Keep the most likely tokens up to this mass; 1 is off."),
  "min_p": (flags.DEFINE_float, "Keep tokens above this share of the most likely; 0 is off."),
  "max_new_tokens": (flags.DEFINE_integer, "Tokens of an answer."),
  "seed": (flags.DEFINE_integer, "Of the noise; equal seeds give equal answers."),
}


def parse(argv: list[str]) -> flags.FlagValues:
  """The flags of this script in a registry of its own (one process may import several scripts)."""
  values = flags.FlagValues()
  flags.DEFINE_string("model", None, f"Path: {_models.KINDS}.", flag_values=values)
  flags.DEFINE_string(
    "prompt", None, "Text to answer or, with --raw, to go on.", flag_values=values
  )
  flags.DEFINE_string("system", None, "System turn in front.", flag_values=values)
  flags.DEFINE_bool("chat", False, "Interactive chat.", flag_values=values)
  flags.DEFINE_bool("raw", False, "No chat template.", flag_values=values)
  for name, (define, text) in SAMPLING.items():
    define(name, getattr(config.SamplingConfig(), name), text, flag_values=values)
  if "--help" in argv:
    print(f"{__doc__}\n{values.get_help()}")
    sys.exit(0)
  rest = values(argv)[1:]
  if rest:
    raise ValueError(f"arguments: found {rest[0]!r}, expected flags only")
  if values.model is None:
    raise ValueError(f"--model: found none, expected {_models.KINDS}")
  if values.chat == (values.prompt is not None):
    raise ValueError("--prompt, --chat: found both or neither, expected one of them")
  if values.raw and (values.chat or values.system is not None):
    raise ValueError("--raw: found with --chat or --system, expected --prompt alone")
  return values


def show(pieces: Generator[str]) -> None:
  with contextlib.closing(pieces):
    for piece in pieces:
      print(piece, end="", flush=True)
  print(flush=True)


def converse(chat: chat_lib.Chat) -> None:
  """Reads turns until the end of input; an error or Ctrl-C ends the answer, not the chat."""
  while True:
    try:
      text = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
      print()
      return
    if text == "/reset":
      chat.reset()
    elif text:
      try:
        show(chat.stream(text))
      except KeyboardInterrupt:
        print(" ...")
      except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        continue
      print(chat.stats.line(), file=sys.stderr)


def run(values: flags.FlagValues) -> None:
  sampling = config.SamplingConfig(**{name: values[name].value for name in SAMPLING})
  model, params, tok = _models.load(values.model)
  if values.chat or values.system is not None or (tok.chat_template and not values.raw):
    chat = chat_lib.Chat(model, params, tok, sampling=sampling, system=values.system)
    if values.chat:
      converse(chat)
    else:
      show(chat.stream(values.prompt))
      print(chat.stats.line(), file=sys.stderr)
    return
  if not values.raw:
    print("no chat template: the prompt is continued as raw text", file=sys.stderr)
  stats = chat_lib.Stats()
  prompt = tok.encode(values.prompt, add_bos=tok.add_bos)
  print(values.prompt, end="", flush=True)
  show(chat_lib.stream_text(model, params, tok, prompt, sampling, stats=stats))
  print(stats.line(), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
  try:
    run(parse(sys.argv if argv is None else argv))
  except (ValueError, ImportError, OSError, flags.Error) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
