"""Drafters against plain decoding: mean accept length, tokens a second, draft time, FR on and off.

  python -m experiments.bench_drafts --target=runs/a --prompts=data/held --fr=data/text \\
    --draft=eagle:runs/e/draft --draft=eagle3:runs/e3/draft --output=benchmarks/results/drafts

--target as for generate. --prompts: a prepared shard folder (beginnings of its documents) or JSONL
with "turns", "prompt" or "text". --fr: a prepared source whose most frequent tokens are kept, or a
stored index. A draft may have a tree of its own: --draft=small:DIR:3/1/4 (levels, top_k, nodes).
Every drafter's tokens are compared with plain decoding's.
"""

import pathlib
import sys

from absl import flags

from experiments import _bench_drafts as lib
from experiments import _command, _models
from minicpm_jax import config
from minicpm_jax.core import logging as logging_lib


def parse(argv: list[str]) -> flags.FlagValues:
  values = flags.FlagValues()
  define = {"flag_values": values}
  count = define | {"lower_bound": 1}
  flags.DEFINE_string("target", None, f"Path: {_models.KINDS}.", **define)
  flags.DEFINE_string("prompts", None, "Shard folder or JSONL.", **define)
  flags.DEFINE_multi_string("draft", [], "NAME:FOLDER[:3/4/12]; repeatable.", **define)
  flags.DEFINE_string("fr", None, "Shard folder or index of FR-Spec.", **define)
  flags.DEFINE_float("fr_share", 0.25, "Share of the vocabulary, with a shard folder.", **define)
  flags.DEFINE_integer("levels", 3, "Levels of the tree.", **define)
  flags.DEFINE_integer("top_k", 4, "Nodes that a level grows from.", **define)
  flags.DEFINE_integer("nodes", 12, "Nodes of the tree, root included.", **define)
  flags.DEFINE_list("draft_logit_scale", [], "Of drafts, a row each; default: theirs.", **define)
  flags.DEFINE_integer("num_prompts", 16, "Prompts.", **count)
  flags.DEFINE_integer("max_prompt_tokens", 192, "Longer prompts are cut.", **count)
  flags.DEFINE_integer("new_tokens", 64, "Of each prompt.", lower_bound=2, **define)
  flags.DEFINE_float("temperature", 0.0, "0 is greedy.", **define)
  flags.DEFINE_string("output", "benchmarks/results/drafts", "Without suffix.", **define)
  return _command.parse(values, argv, __doc__, needed=("target", "prompts"))


def run(values: flags.FlagValues) -> None:
  model, params, tok = _models.load(values.target)
  sampling = config.SamplingConfig(max_new_tokens=values.new_tokens, temperature=values.temperature)
  prompts = lib.prompts_of(values.prompts, tok, values.num_prompts, values.max_prompt_tokens)
  fr_ids = lib.fr_index(values, model.cfg.vocab_size, tok.stop_ids)
  sizes = dict(num_levels=values.levels, top_k=values.top_k, num_nodes=values.nodes)
  try:
    scales = [float(x) for x in values.draft_logit_scale]
  except ValueError:
    found = values.draft_logit_scale
    raise ValueError(f"--draft_logit_scale: found {found}, expected numbers > 0") from None
  named = lib.drafters(model, params, values.draft, fr_ids, sizes, scales)
  lib.check_read(values, model, fr_ids, named)
  rows = lib.rows(model, params, {"plain": None, **named}, prompts, sampling)
  for found in rows:
    said = f"{found['drafter']}: {found['tokens_per_second']:.1f} tok/s, a round takes "
    said += f"{found['round_ms']:.1f} ms, {found['round_cpu_ms']:.1f} ms of processor time"
    if "draft_ms" in found:
      said += f", its tree {found['draft_ms']:.2f} ms; accept length "
      said += f"{found['mean_accept_length']:.2f}, tokens equal plain: "
      said += str(found["tokens_equal_plain"])
    print(said)
  title = (
    f"{model.cfg.name}: tree {values.levels}/{values.top_k}/{values.nodes}, temperature "
    f"{values.temperature:g}, {len(prompts)} prompts x {values.new_tokens} tokens"
  )
  result = {"title": title, **sizes, "fr_size": None if fr_ids is None else len(fr_ids)}
  lib.write(pathlib.Path(f"{values.output}.json"), result | {"rows": rows})


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  logging_lib.quiet_libraries()
  return _command.guard(__file__, lambda: run(parse(sys.argv if argv is None else argv)))


if __name__ == "__main__":
  sys.exit(main())
