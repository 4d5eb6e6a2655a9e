"""Rows of `bench_drafts`: mean accept length, tokens a second and draft time of each drafter."""

import dataclasses
import json
import pathlib
import time
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import _command, _models, _regenerate, _results
from minicpm_jax import ckpt, config
from minicpm_jax.ckpt import bita_io
from minicpm_jax.core import files, pictures
from minicpm_jax.data import packing, shards, sources
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import frspec, generate
from minicpm_jax.infer.drafters import base, bita, chain, eagle, hierarchical, mtp, ngram

Drafter = tuple[Any, Any]
TREE = ("num_levels", "top_k", "num_nodes")


def prompts_of(path: str, tok: Any, num: int, max_tokens: int) -> list[list[int]]:
  """Beginnings of held-out token documents, or prompts of a JSONL file (turns, prompt or text)."""
  if (pathlib.Path(path) / shards.INDEX_FILE).exists():
    found = list(_regenerate.beginnings([path], num, seed=2))
    if not found:
      least = _regenerate.PROMPT_TOKENS
      raise ValueError(f"--prompts: {path}: found no document of {least} tokens, expected one")
    return found
  texts = _regenerate.prompt_texts(path)
  spread = texts[:: max(1, len(texts) // num)][:num]
  return [_regenerate.encode_prompt(tok, text)[:max_tokens] for text in spread]


def fr_index(
  values: flags.FlagValues, vocab_size: int, stop_ids: Sequence[int]
) -> np.ndarray | None:
  """--fr: the most frequent --fr_share of a training source's tokens, or a stored list."""
  path, share = values.fr, values.fr_share
  if path is None:
    _command.refuse_unread(values, ["fr_share"], "no --fr")
    return None
  if not (pathlib.Path(path) / shards.INDEX_FILE).exists():
    _command.refuse_unread(values, ["fr_share"], f"the stored index --fr={path}")
    return frspec.load_index(path)
  source = sources.open_source("fr", path)
  read = (packing.split_mask(source[i]) for i in range(len(source)))
  counts_V = frspec.count_tokens((ids[is_trained] for ids, is_trained in read), vocab_size)
  return frspec.build_index(counts_V, round(share * vocab_size), stop_ids)


def drafters(
  model: Any,
  params: Any,
  named: Sequence[str],
  fr_ids: np.ndarray | None,
  sizes: dict[str, int],
  draft_logit_scales: Sequence[float] = (),
) -> dict[str, Drafter]:
  """Every drafter of this target: n-gram, its MTP module, the given folders; FR on and off.

  draft_logit_scales: of the folders' logits, a drafter for each; none: as each folder says.
  """
  found: dict[str, Drafter] = {
    "ngram": (ngram.NGramDrafter(num_levels=sizes["num_levels"]), ()),
    "ngram wide": (
      ngram.NGramDrafter(num_levels=sizes["num_levels"], num_chains=3, min_match=1),
      (),
    ),
  }
  if model.cfg.mtp is not None:
    found["mtp"] = mtp.make(model, params, **sizes)
    if fr_ids is not None:
      found["mtp, fr"] = mtp.make(model, params, fr_ids=fr_ids, **sizes)
  for text in named:
    name, path, own = _named(text, sizes)
    if bita_io.is_bita(path):
      found[name] = bita.make(ckpt.load_bita(path, model.cfg), model, params)
      continue
    for scale in draft_logit_scales or (None,):
      draft = ckpt.load_draft(path, model.cfg, draft_logit_scale=scale)
      label = name if scale is None else f"{name}, scale {scale:g}"
      found[label] = eagle.make(draft, model, params, **own)
      if fr_ids is not None and draft.cfg.kind != "eagle3":
        found[f"{label}, fr"] = eagle.make(draft, model, params, fr_ids=fr_ids, **own)
  return found


def second_models(
  named: Sequence[str], sizes: dict[str, int], min_length: int
) -> dict[str, Drafter]:
  """A chain from every second model, and the hierarchy that it makes of n-grams."""
  found: dict[str, Drafter] = {}
  num_levels = sizes["num_levels"]
  for text in named:
    name, _, path = text.partition(":")
    if not name or not path:
      raise ValueError(f"--second: found {text!r}, expected NAME:MODEL")
    small, params, _ = _models.load(path)
    found[f"{name}, chain"] = chain.ChainDrafter(small, num_levels), params
    small, params, _ = _models.load(path, num_levels + 1)
    inner = ngram.NGramDrafter(num_levels=num_levels)
    drafter = hierarchical.HierarchicalDrafter(small, inner, min_length)
    found[f"{name}, hier"] = drafter, (params, ())
  return found


def check_read(
  values: flags.FlagValues, model: Any, fr_ids: np.ndarray | None, made: dict[str, Drafter]
) -> None:
  """ValueError for a flag of bench_drafts that none of the drafters it `made` reads."""
  drafts = [d for d, _ in made.values() if isinstance(d, eagle.EagleDrafter)]
  if not drafts:
    _command.refuse_unread(values, ["top_k", "nodes"], "no draft that grows a tree")
  if not values.second:
    _command.refuse_unread(values, ["hier_min_length"], "no second model")
  texts = [text for text in values.draft if not bita_io.is_bita(text.split(":")[1])]
  if not texts:
    _command.refuse_unread(values, ["draft_logit_scale"], "no EAGLE draft")
  if texts and model.cfg.mtp is None and all(text.count(":") == 2 for text in texts):
    _command.refuse_unread(values, ["top_k", "nodes"], "drafts that have trees of their own")
  if fr_ids is not None and not any(name.endswith(", fr") for name in made):
    _command.refuse_unread(values, ["fr"], "no draft that scores with the target's head")


def _named(text: str, sizes: dict[str, int]) -> tuple[str, str, dict[str, int]]:
  """(name, folder, tree) of NAME:FOLDER or NAME:FOLDER:LEVELS/TOP_K/NODES."""
  name, _, rest = text.partition(":")
  path, _, tree = rest.partition(":")
  numbers = tree.split("/") if tree else [str(n) for n in sizes.values()]
  if not name or not path or len(numbers) != len(sizes) or not all(n.isdigit() for n in numbers):
    raise ValueError(f"--draft: found {text!r}, expected NAME:FOLDER[:LEVELS/TOP_K/NODES]")
  return name, path, dict(zip(sizes, map(int, numbers), strict=True))


def draft_ms(drafter: Any, model: Any, params: base.Params, repeats: int = 30) -> float:
  """Median milliseconds of drawing one tree behind 64 committed rows."""
  state = drafter.init_state(model, params, 1, 256)
  draft = jax.jit(drafter.draft)
  args = (params, state, jnp.ones((1,), jnp.int32), jnp.full((1,), 64, jnp.int32))
  jax.block_until_ready(draft(*args))
  taken = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(draft(*args))
    taken.append(time.perf_counter() - began)
  return 1e3 * float(np.median(taken))


Measured = list[dict[str, dict[str, Any]]]  # of every prompt, by drafter


def measure(
  model: Any,
  params: Any,
  named: dict[str, Drafter | None],
  prompts: list[list[int]],
  sampling: config.SamplingConfig,
  stop_ids: Sequence[int] = (),
  pieces: "Pieces | None" = None,
  max_prompt_tokens: int = 0,
) -> Measured:
  """What every drafter (None: plain decoding) did with every prompt, all in turn on each prompt.

  In turn, because a machine's speed drifts by more than drafters differ. A round's processor time
  drifts least: cpu_seconds are those of this process for a request less those of its prefill.
  `pieces` holds what earlier calls measured and says when to stop: then fewer prompts come back.
  """
  pieces = Pieces() if pieces is None else pieces
  # The same for all files of prompts, so that their calls find each other's programs compiled.
  longest = max(max_prompt_tokens, *map(len, prompts)) + sampling.max_new_tokens
  for_trees = generate.for_decoding(model, params, num_rows=2)
  cfg = config.EngineConfig(capacity=longest + 80, min_prefix=-1, rounds_per_dispatch=4)
  engines = {}
  for name, drafter in named.items():
    if drafter is None:
      engines[name] = engine_lib.Engine(model, params, cfg, stop_ids=stop_ids)
    else:
      more = dict(drafter=drafter[0], draft_params=drafter[1], stop_ids=stop_ids)
      engines[name] = engine_lib.Engine(*for_trees, cfg, **more)
  only_prefill = dataclasses.replace(sampling, max_new_tokens=1)
  begun = len(pieces.found)  # one prompt at least: every call goes on, however long loading took
  while len(pieces.found) < len(prompts) and (len(pieces.found) == begun or not pieces.is_over()):
    prompt, found = prompts[len(pieces.found)], {}
    for name, engine in engines.items():
      out, seconds = _timed(engine, prompt, sampling)
      stats = out.stats[0]
      found[name] = {
        "tokens": out.tokens[0],
        "accepted": list(map(int, stats.accepted)),
        "seconds": stats.decode_seconds,
        "cpu_seconds": seconds - _timed(engine, prompt, only_prefill)[1],
      }
    pieces.add(found)
  return pieces.found


def rows(
  model: Any, params: Any, named: dict[str, Drafter | None], measured: Measured
) -> list[dict[str, Any]]:
  """A row a drafter; the first is plain decoding. round_cpu_ms: median of the prompts."""
  found, plain = [], next(iter(named))
  for name, drafter in named.items():
    runs = [one[name] for one in measured]
    accepted = [n for run in runs for n in run["accepted"]]
    if not accepted:
      raise ValueError(f"{name}: found no rounds, expected answers of two tokens and more")
    seconds = sum(run["seconds"] for run in runs)
    cpu_ms = [1e3 * run["cpu_seconds"] / max(1, len(run["accepted"])) for run in runs]
    row = {
      "drafter": name,
      "mean_accept_length": float(np.mean(accepted)),
      "accepted": np.bincount(accepted, minlength=2)[1:].tolist(),
      "tokens_per_second": sum(len(run["tokens"]) - 1 for run in runs) / seconds,
      "round_ms": 1e3 * seconds / len(accepted),
      "round_cpu_ms": float(np.median(cpu_ms)),
      "tokens_equal_plain": None,
    }
    if drafter is not None:
      if isinstance(drafter[0], eagle.EagleDrafter):
        row["tree"] = "/".join(str(getattr(drafter[0], k)) for k in TREE)
      row["speedup"] = row["tokens_per_second"] / found[0]["tokens_per_second"]
      row["tokens_equal_plain"] = all(
        one[name]["tokens"] == one[plain]["tokens"] for one in measured
      )
      row["draft_ms"] = draft_ms(drafter[0], model, base.Params(params, drafter[1]))
    found.append(row)
  return found


def identity(params: Any, named: dict[str, Drafter | None], prompts: list[list[int]]) -> dict:
  """What pieces of one measurement have in common beside its flags, as JSON."""
  root = pathlib.Path(__file__).parents[1]
  code = [root / "experiments/_bench_drafts.py"]
  code += [p for part in ("minicpm_jax", "pallas_kernels") for p in (root / part).rglob("*.py")]
  machine = _results.environment()
  return {
    "target weights": _digest(params),
    "draft weights": {name: _digest(one[1]) for name, one in named.items() if one is not None},
    "prompt ids": zlib.crc32(json.dumps(prompts).encode()),
    "code": zlib.crc32(b"".join(path.read_bytes() for path in sorted(code))),
    "machine": {k: x for k, x in machine.items() if k not in ("load_average", "date")},
  }


def _digest(params: Any) -> int:
  found = 0
  for leaf in jax.tree.leaves(params):
    x = np.ascontiguousarray(leaf)
    found = zlib.crc32(f"{x.dtype} {x.shape}".encode(), found)
    found = zlib.crc32(x.reshape(-1).view(np.uint8), found)
  return found


class Pieces:
  """Prompts measured so far, kept in a file: a long measurement in calls of `seconds` each.

  `about` says what is measured; a file about something else is refused.
  """

  def __init__(
    self, path: pathlib.Path | None = None, about: dict[str, Any] | None = None, seconds: float = 0
  ):
    self.path, self.about, self.found = path, about, []
    self._end = time.monotonic() + seconds if seconds else None
    if path is not None and path.exists():
      held = json.loads(path.read_text())
      if not isinstance(held, dict) or set(held) != {"about", "found"}:
        raise ValueError(f"{path}: found no pieces of a measurement, expected a file of --seconds")
      for name in sorted({*held["about"], *(about or {})}):
        found, expected = (x.get(name) for x in (held["about"], about or {}))
        if found != expected:
          raise ValueError(
            f"{path}: {name}: found {found}, expected {expected} (remove it to begin anew)"
          )
      self.found = held["found"]

  def is_over(self) -> bool:
    return self._end is not None and time.monotonic() > self._end

  def add(self, one: dict[str, dict[str, Any]]) -> None:
    self.found.append(one)
    if self.path is not None:
      files.write_json(self.path, {"about": self.about, "found": self.found})


def _timed(engine: Any, prompt: list[int], sampling: config.SamplingConfig) -> tuple[Any, float]:
  """(answer, processor seconds), again where something was compiled."""
  while True:
    compiled, began = engine.compile_seconds, time.process_time()
    out = engine.generate([prompt], sampling)
    seconds = time.process_time() - began
    if engine.compile_seconds == compiled:
      return out, seconds


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
  """JSON at `path`, a name in .json, and a picture of accept lengths and speeds beside it."""
  result["environment"] = _results.environment()
  files.write_json(path, result)
  rows = result["rows"]
  fig, axes = pictures.figure(2, width=5.5, height=0.4 * len(rows) + 1.6, sharey=True)
  names = [r["drafter"] for r in rows]
  for ax, key in zip(axes, ("mean_accept_length", "tokens_per_second"), strict=True):
    bars = ax.barh(names, [r[key] for r in rows], color="tab:blue")
    ax.bar_label(bars, fmt="%.2f" if key.startswith("mean") else "%.0f", padding=2)
    ax.set(xlabel=key.replace("_", " "))
    ax.margins(x=0.12)
  axes[0].invert_yaxis()
  fig.suptitle(result["title"], fontsize=10)
  pictures.save(fig, path.with_suffix(".png"), dpi=120)
