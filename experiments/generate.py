"""Text from a model on disk: one prompt, or a chat in the terminal.

  python -m experiments.generate --model=DIR_OR_GGUF --prompt="Why is the sky blue?"
  python -m experiments.generate --model=runs/nano@500 --raw --prompt="def add(a, b):"
  python -m experiments.generate --model=SmolLM2-135M-Instruct.Q4_1.gguf --chat --temperature=0.7
  python -m experiments.generate --model=DIR --json_schema=schema.json --draft_kind=ngram

DIR_OR_GGUF is a Hugging Face folder, the folder of a training run (newest checkpoint, or @STEP), or
a GGUF file. A prompt goes through the tokenizer's chat template where it has one, unless --raw
(CPM.cu's --nouse_chat_template). The flags are CPM.cu's, their meaning stands in config/cpmcu.py;
--model, --prompt, --max_new_tokens and --seed are short for model_path, prompt_text, num_generate
and random_seed. Text goes to stdout, the summary block to stderr. In a chat: /reset forgets, Ctrl-C
stops the answer, Ctrl-D leaves.
"""

import dataclasses
import pathlib
import sys

from absl import flags

from experiments import _command, _infer, _talk
from minicpm_jax import config
from minicpm_jax.config import cpmcu
from minicpm_jax.core import compilation_cache

CHAT_CONTEXT = 8192  # tokens of a chat, where model and memory have as many
ALIASES = {"model": "model_path", "prompt": "prompt_text", "seed": "random_seed"}
ALIASES |= {"max_new_tokens": "num_generate"}


def parse(argv: list[str]) -> flags.FlagValues:
  """The flags of this script in a registry of its own (one process may import several scripts)."""
  values = flags.FlagValues()
  _infer.define(values, cpmcu.SERVE_ONLY)
  for name, target in ALIASES.items():
    flags.DEFINE_alias(name, target, flag_values=values)
  flags.DEFINE_string("system", None, "System turn in front.", flag_values=values)
  flags.DEFINE_bool("chat", False, "Interactive chat.", flag_values=values)
  flags.DEFINE_bool("raw", False, "No chat template.", flag_values=values)
  _command.parse(values, argv, __doc__)
  prompts = [n for n in ("prompt_text", "prompt_file") if values[n].present]
  if len(prompts) + values.chat > 1:
    raise ValueError("--prompt, --prompt_file, --chat: found several, expected one of them")
  if values.max_batch != 1 and values["max_batch"].present:
    raise ValueError(f"--max_batch: found {values.max_batch}, expected 1: one prompt is decoded")
  if values.raw and (values.chat or values.system is not None):
    raise ValueError("--raw: found with --chat or --system, expected --prompt alone")
  return values


def run(values: flags.FlagValues) -> None:
  cfg = _infer.read(values)
  with compilation_cache.use(cfg.compilation_cache):
    _answer(values, cfg)


def _answer(values: flags.FlagValues, cfg: config.InferConfig) -> None:
  text = cfg.prompt_text
  if cfg.prompt_file is not None:
    text = pathlib.Path(cfg.prompt_file).read_text()
  cfg = dataclasses.replace(cfg, use_chat_template=cfg.use_chat_template and not values.raw)
  if values.chat:
    loaded = _infer.load(cfg, max_batch=1, num_tokens=CHAT_CONTEXT)
    _talk.converse(_talk.Talk(cfg, loaded, values.system))
    return
  # Bytes bound the tokens of the prompt; a little more for the template.
  size = len(text.encode()) + len((values.system or "").encode()) + 256 + cfg.num_generate
  loaded = _infer.load(cfg, max_batch=1, num_tokens=size)
  tok = loaded.tok
  talk = _talk.Talk(cfg, loaded, values.system)
  if values.system is not None or (tok.chat_template and cfg.use_chat_template):
    talk.say(text)
    return
  if cfg.use_chat_template:
    print("no chat template: the prompt is continued as raw text", file=sys.stderr)
  print(text, end="", flush=True)
  talk.complete(tok.encode(text, add_bos=tok.add_bos))


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.guard(__file__, lambda: run(parse(sys.argv if argv is None else argv)))


if __name__ == "__main__":
  sys.exit(main())
