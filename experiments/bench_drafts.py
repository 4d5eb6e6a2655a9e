"""Drafters against plain decoding: mean accept length, tokens a second, draft time, FR on and off.

  python -m experiments.bench_drafts --target=runs/a --prompts=data/held --fr=data/text \\
    --draft=eagle:runs/e/draft --draft=eagle3:runs/e3/draft --output=benchmarks/results/drafts

--target as for generate. --prompts: a prepared shard folder (beginnings of its documents) or JSONL
with "turns", "prompt" or "text". --fr: a prepared source whose most frequent tokens are kept, or a
stored index. A draft may have a tree of its own: --draft=small:DIR:3/1/4 (levels, top_k, nodes).
--second=int4:DIR is a second model of the same vocabulary (as --target): it drafts a chain of
--levels tokens, and in a hierarchy chains of --hier_min_length and more out of n-grams.
Every drafter's tokens are compared with plain decoding's; answers end at the target's stop ids.
--seconds=30 measures in pieces: a call stops then, behind one prompt at least, the same call again
goes on (OUTPUT.part.json; refused where weights, prompts, code or machine are not the same).
"""

import pathlib
import sys
import time

from absl import flags

from experiments import _bench_drafts as lib
from experiments import _command, _models
from minicpm_jax import config
from minicpm_jax.core import logging as logging_lib

VALUES = flags.FlagValues()
_OWN = {"flag_values": VALUES}
_COUNT = _OWN | {"lower_bound": 1}
flags.DEFINE_string("target", None, f"Path: {_models.KINDS}.", **_OWN)
flags.DEFINE_string("prompts", None, "Shard folder or JSONL.", **_OWN)
flags.DEFINE_multi_string("draft", [], "NAME:FOLDER[:3/4/12]; repeatable.", **_OWN)
flags.DEFINE_multi_string("second", [], "NAME:MODEL of a second model; repeatable.", **_OWN)
flags.DEFINE_integer("hier_min_length", 6, "Tokens of a hierarchy's chain.", **_COUNT)
flags.DEFINE_string("fr", None, "Shard folder or index of FR-Spec.", **_OWN)
flags.DEFINE_float("fr_share", 0.25, "Share of the vocabulary, with a shard folder.", **_OWN)
flags.DEFINE_integer("levels", 3, "Levels of the tree.", **_OWN)
flags.DEFINE_integer("top_k", 4, "Nodes that a level grows from.", **_OWN)
flags.DEFINE_integer("nodes", 12, "Nodes of the tree, root included.", **_OWN)
flags.DEFINE_list("draft_logit_scale", [], "Of drafts, a row each; default: theirs.", **_OWN)
flags.DEFINE_integer("num_prompts", 16, "Prompts.", **_COUNT)
flags.DEFINE_integer("max_prompt_tokens", 192, "Longer prompts are cut.", **_COUNT)
flags.DEFINE_integer("new_tokens", 64, "Of each prompt.", lower_bound=2, **_OWN)
flags.DEFINE_float("temperature", 0.0, "0 is greedy.", **_OWN)
flags.DEFINE_multi_string("only", [], "Drafters to measure, by name; repeatable.", **_OWN)
flags.DEFINE_float("seconds", 0.0, "Of one call; 0: all prompts in one.", lower_bound=0.0, **_OWN)
flags.DEFINE_string("output", "benchmarks/results/drafts", "Without suffix.", **_OWN)
_ABOUT = ("target", "prompts", "draft", "second", "hier_min_length", "fr", "fr_share", "levels")
_ABOUT += ("top_k", "nodes")
_ABOUT += ("draft_logit_scale", "num_prompts", "max_prompt_tokens", "new_tokens", "temperature")


def _run() -> None:
  began = time.monotonic()
  logging_lib.quiet_libraries()
  model, params, tok = _models.load(VALUES.target, flag="--target")
  sampling = config.SamplingConfig(max_new_tokens=VALUES.new_tokens, temperature=VALUES.temperature)
  prompts = lib.prompts_of(VALUES.prompts, tok, VALUES.num_prompts, VALUES.max_prompt_tokens)
  fr_ids = lib.fr_index(VALUES, model.cfg.vocab_size, tok.stop_ids)
  sizes = dict(num_levels=VALUES.levels, top_k=VALUES.top_k, num_nodes=VALUES.nodes)
  try:
    scales = [float(x) for x in VALUES.draft_logit_scale]
  except ValueError:
    found = VALUES.draft_logit_scale
    raise ValueError(f"--draft_logit_scale: found {found}, expected numbers > 0") from None
  named = lib.drafters(model, params, VALUES.draft, fr_ids, sizes, scales)
  named |= lib.second_models(VALUES.second, sizes, VALUES.hier_min_length)
  lib.check_read(VALUES, model, fr_ids, named)
  unknown = [name for name in VALUES.only if name not in named]
  if unknown:
    raise ValueError(f"--only: found {unknown}, expected some of {list(named)}")
  named = {"plain": None} | {k: x for k, x in named.items() if not VALUES.only or k in VALUES.only}
  about = {name: VALUES[name].value for name in _ABOUT} | {"drafters": list(named)}
  about |= lib.identity(params, named, prompts)
  left = max(VALUES.seconds - (time.monotonic() - began), 1.0) if VALUES.seconds else 0
  pieces = lib.Pieces(pathlib.Path(f"{VALUES.output}.part.json"), about, left)
  more = (tok.stop_ids, pieces, VALUES.max_prompt_tokens)
  measured = lib.measure(model, params, named, prompts, sampling, *more)
  if len(measured) < len(prompts):
    print(f"{len(measured)} of {len(prompts)} prompts measured; the same call again goes on")
    return
  rows = lib.rows(model, params, named, measured)
  for found in rows:
    said = f"{found['drafter']}: {found['tokens_per_second']:.1f} tok/s, a round takes "
    said += f"{found['round_ms']:.1f} ms, {found['round_cpu_ms']:.1f} ms of processor time"
    if "draft_ms" in found:
      said += (
        f", its tree {found['draft_ms']:.2f} ms; speedup {found['speedup']:.2f}, accept length "
      )
      said += f"{found['mean_accept_length']:.2f}, tokens equal plain: "
      said += str(found["tokens_equal_plain"])
    print(said)
  title = (
    f"{model.cfg.name}: temperature {VALUES.temperature:g}, {len(prompts)} prompts of "
    f"{pathlib.Path(VALUES.prompts).name} x {VALUES.new_tokens} tokens"
  )
  result = {"title": title, "fr_size": None if fr_ids is None else len(fr_ids)}
  lib.write(pathlib.Path(f"{VALUES.output}.json"), result | {"rows": rows})
  pieces.path.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("target", "prompts"))


if __name__ == "__main__":
  sys.exit(main())
