"""Text from a model on disk: one prompt, or a chat in the terminal.

  python -m experiments.generate --model=DIR_OR_GGUF --prompt="Why is the sky blue?"
  python -m experiments.generate --model=runs/nano@500 --raw --prompt="def add(a, b):"
  python -m experiments.generate --model=SmolLM2-135M-Instruct.Q4_1.gguf --chat --temperature=0.7
  python -m experiments.generate --model=DIR --json_schema=schema.json --draft_kind=ngram

DIR_OR_GGUF is a Hugging Face folder, the folder of a training run (newest checkpoint, or @STEP), or
a GGUF file. A prompt goes through the tokenizer's chat template where it has one, unless --raw
(CPM.cu's --nouse_chat_template). The flags are CPM.cu's, their meaning stands in config/cpmcu.py;
--model, --prompt, --max_new_tokens and --seed are short for model_path, prompt_text, num_generate
and random_seed. Sampling is greedy as in CPM.cu; --generation_config takes what no flag says from
the folder's generation_config.json, as transformers reads it. Text goes to stdout, the summary
block to stderr. In a chat: /reset forgets, Ctrl-C stops the answer, Ctrl-D leaves.
"""

import dataclasses
import sys

from absl import flags

from experiments import _command, _infer, _talk
from minicpm_jax import config
from minicpm_jax.config import cpmcu
from minicpm_jax.core import compilation_cache, host_memory

CHAT_CONTEXT = 8192  # tokens of a chat, where model and memory have as many
ALIASES = {"model": "model_path", "prompt": "prompt_text", "seed": "random_seed"}
ALIASES |= {"max_new_tokens": "num_generate"}
VALUES = flags.FlagValues()
_infer.define(VALUES, cpmcu.SERVE_ONLY)
for _name, _target in ALIASES.items():
  flags.DEFINE_alias(_name, _target, flag_values=VALUES)
flags.DEFINE_string("system", None, "System turn in front.", flag_values=VALUES)
flags.DEFINE_bool("chat", False, "Interactive chat.", flag_values=VALUES)
flags.DEFINE_bool("raw", False, "No chat template.", flag_values=VALUES)


def _check() -> None:
  """Refuses flags that contradict each other."""
  prompts = [n for n in ("prompt_text", "prompt_file") if VALUES[n].present]
  if len(prompts) + VALUES.chat > 1:
    raise ValueError("--prompt, --prompt_file, --chat: found several, expected one of them")
  if VALUES.max_batch != 1 and VALUES["max_batch"].present:
    raise ValueError(f"--max_batch: found {VALUES.max_batch}, expected 1: one prompt is decoded")
  if VALUES.raw and (VALUES.chat or VALUES.system is not None):
    raise ValueError("--raw: found with --chat or --system, expected --prompt alone")


def _run() -> None:
  _check()
  cfg = _infer.read(VALUES)
  with compilation_cache.use(cfg.compilation_cache):
    _answer(cfg)


def _answer(cfg: config.InferConfig) -> None:
  text = cfg.prompt_text
  if cfg.prompt_file is not None:
    text = _infer.read_text("prompt_file", cfg.prompt_file)
  cfg = dataclasses.replace(cfg, use_chat_template=cfg.use_chat_template and not VALUES.raw)
  if VALUES.chat:
    loaded = _infer.load(cfg, max_batch=1, num_tokens=CHAT_CONTEXT)
    cfg = _infer.with_generation(VALUES, cfg, loaded.engine.model.cfg)
    _talk.converse(_talk.Talk(cfg, loaded, VALUES.system))
    return
  # Bytes bound the tokens of the prompt; a little more for the template.
  size = len(text.encode()) + len((VALUES.system or "").encode()) + 256 + cfg.num_generate
  loaded = _infer.load(cfg, max_batch=1, num_tokens=size)
  cfg = _infer.with_generation(VALUES, cfg, loaded.engine.model.cfg)
  tok = loaded.tok
  talk = _talk.Talk(cfg, loaded, VALUES.system)
  if VALUES.system is not None or (tok.chat_template and cfg.use_chat_template):
    talk.say(text)
    return
  if cfg.use_chat_template:
    print("no chat template: the prompt is continued as raw text", file=sys.stderr)
  print(text, end="", flush=True)
  talk.complete(tok.encode(text, add_bos=tok.add_bos))


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv)


if __name__ == "__main__":
  host_memory.keep()
  sys.exit(main())
