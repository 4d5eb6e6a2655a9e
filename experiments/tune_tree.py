"""Which tree size pays for this target, this draft and this device (SpecMQuant's rule).

  python -m experiments.tune_tree --target=runs/a --draft=mtp --prompts=data/held
  python -m experiments.tune_tree --target=MODEL.gguf --draft=eagle:DIR --prompts=prompts.jsonl \\
    --fr=SHARDS --spec_num_iter=6 --spec_topk_per_iter=10 --output=runs/tree

Writes OUTPUT.json and OUTPUT.png: verification and draft time, mean accept length and speedup of
every size, and the flags for generate and serve. Run it on an otherwise idle machine.
"""

import dataclasses
import pathlib
import sys

from absl import flags

from experiments import _bench_drafts, _command, _models, _results
from minicpm_jax import ckpt, config
from minicpm_jax.core import files, pictures
from minicpm_jax.core import logging as logging_lib
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import generate, tune
from minicpm_jax.infer.drafters import base, eagle, mtp

VALUES = flags.FlagValues()
_OWN, _COUNT = {"flag_values": VALUES}, {"flag_values": VALUES, "lower_bound": 1}
flags.DEFINE_string("target", None, f"Path: {_models.KINDS}.", **_OWN)
flags.DEFINE_string("draft", "mtp", "'mtp' (the target's own module) or NAME:FOLDER.", **_OWN)
flags.DEFINE_string("prompts", None, "Shard folder or JSONL.", **_OWN)
flags.DEFINE_string("fr", None, "Shard folder or index of FR-Spec.", **_OWN)
flags.DEFINE_float("fr_share", 0.25, "Share of the vocabulary, with a shard folder.", **_OWN)
flags.DEFINE_integer("num_prompts", 16, "Prompts.", **_COUNT)
flags.DEFINE_integer("max_prompt_tokens", 192, "Longer prompts are cut.", **_COUNT)
flags.DEFINE_integer("new_tokens", 64, "Of each prompt.", lower_bound=2, **_OWN)
flags.DEFINE_float("temperature", 0.0, "0 is greedy.", **_OWN)
flags.DEFINE_integer("length", 256, "Context at which steps are timed.", **_COUNT)
flags.DEFINE_integer("repeats", 15, "Timed runs of every size.", **_COUNT)
flags.DEFINE_integer("spec_num_iter", 6, "Levels of the tree.", **_OWN)
flags.DEFINE_integer("spec_topk_per_iter", 10, "Nodes that a level grows from.", **_OWN)
flags.DEFINE_list("sizes", [str(n) for n in tune.SIZES], "Tree sizes, root included.", **_OWN)
flags.DEFINE_string("output", "benchmarks/results/tune_tree", "Without suffix.", **_OWN)


def _run() -> None:
  logging_lib.quiet_libraries()
  model, params, tok = _models.load(VALUES.target, flag="--target")
  shape = dict(num_levels=VALUES.spec_num_iter, top_k=VALUES.spec_topk_per_iter)
  shape["num_nodes"] = shape["num_levels"] + 1
  name, _, path = VALUES.draft.partition(":")
  if (name == "mtp") == bool(path):
    raise ValueError(f"--draft: found {VALUES.draft!r}, expected 'mtp' or NAME:FOLDER")
  fr_ids = _bench_drafts.fr_index(VALUES, model.cfg.vocab_size, tok.stop_ids)
  if path:
    draft = ckpt.load_draft(path, model.cfg)
    drafter, draft_params = eagle.make(draft, model, params, fr_ids=fr_ids, **shape)
  else:
    drafter, draft_params = mtp.make(model, params, fr_ids=fr_ids, **shape)
  drafters = tune.sizes_for(drafter, [int(n) for n in VALUES.sizes if n.isdigit()])
  bad = [n for n in VALUES.sizes if not n.isdigit() or int(n) not in drafters]
  if bad and VALUES["sizes"].present:
    raise ValueError(
      f"--sizes: found {', '.join(bad)}, expected more nodes than the {drafter.num_levels} of "
      f"--spec_num_iter, and no more than levels of {drafter.top_k} (--spec_topk_per_iter) have"
    )
  most = (VALUES.num_prompts, VALUES.max_prompt_tokens)
  prompts = _bench_drafts.prompts_of(VALUES.prompts, tok, *most)
  sampling = config.SamplingConfig(max_new_tokens=VALUES.new_tokens, temperature=VALUES.temperature)
  sizes = config.EngineConfig(capacity=max(map(len, prompts)) + VALUES.new_tokens + 16)
  out = engine_lib.Engine(model, params, sizes).generate(prompts, sampling)
  pairs = [(p, t) for p, t in zip(prompts, out.tokens, strict=True) if len(t) > 1]
  model, params = generate.for_decoding(model, params)
  both = base.Params(generate.for_decoding(model, params, num_rows=2)[1], draft_params)
  lengths = tune.accept_lengths(
    model, both, drafters, [[*p, *t] for p, t in pairs], [len(p) for p, _ in pairs]
  )
  sizes = dict(length=VALUES.length, repeats=VALUES.repeats)
  times = tune.measure(model, both, drafters, plain=params, **sizes)
  rows = tune.costs(*times, lengths)
  chosen = tune.best(rows)
  path = pathlib.Path(f"{VALUES.output}.json")
  result = {
    "target": model.cfg.name,
    "draft": name,
    "fr_size": None if fr_ids is None else len(fr_ids),
    **shape,
    "num_nodes": chosen.num_nodes,
    "rows": [dataclasses.asdict(row) for row in rows],
    "environment": _results.environment(),
  }
  files.write_json(path, result)
  _plot(rows, path.with_suffix(".png"))
  print("nodes  verify ms  draft ms  accept length  speedup")
  for r in rows:
    times = f"{r.num_nodes:5d}  {r.verify_ms:9.2f}  {r.draft_ms:8.2f}"
    print(f"{times}  {r.accept_length:13.2f}  {r.speedup:7.2f}")
  use = f"--spec_tree_size={chosen.num_nodes}" if chosen.num_nodes > 1 else "no speculation"
  print(f"best here: {use}")


def _plot(rows: list[tune.TreeCost], path: pathlib.Path) -> None:
  figure, axes = pictures.figure(3, width=3, height=3.2)
  for axis, field in zip(axes, ("verify_ms", "accept_length", "speedup"), strict=True):
    axis.plot([r.num_nodes for r in rows], [getattr(r, field) for r in rows], "o-")
    axis.set(xlabel="tree nodes", title=field.replace("_", " "), ylim=(0, None))
  pictures.save(figure, path)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("target", "prompts"))


if __name__ == "__main__":
  sys.exit(main())
