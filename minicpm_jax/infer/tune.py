"""How many tree nodes pay on this device (SpecMQuant's rule; inference.md 12).

A bigger tree is accepted further and costs more to verify. With T_t the time of a plain step,
T_v(n) that of verifying n nodes, T_d that of drafting and tau(n) the mean accept length, the best n
maximises tau(n) T_t / (T_d + T_v(n)). Times are measured here; tau is replayed: a sampled text does
not depend on the tree (coupled noise), so one pass that drafts a tree of every size at every
position of a finished text tells where each size would have gone.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax.core import types
from minicpm_jax.infer import tree as tree_lib
from minicpm_jax.infer.drafters import base
from minicpm_jax.models import cache as cache_lib
from minicpm_jax.models import transformer

SIZES = (4, 8, 12, 16, 24, 32, 48, 60)


@dataclasses.dataclass(frozen=True)
class TreeCost:
  """What a tree of `num_nodes` costs and brings; 1 node is plain decoding."""

  num_nodes: int
  draft_ms: float  # T_d: drafting a tree and committing its path
  verify_ms: float  # T_v(n)
  accept_length: float  # tau(n)
  speedup: float  # over plain decoding, everything else left out


def sizes_for(drafter: Any, sizes: Sequence[int] = SIZES) -> dict[int, Any]:
  """{n: the drafter with n nodes}, for the sizes that its levels and top-k allow."""
  if not any(f.name == "num_nodes" for f in dataclasses.fields(drafter)):
    raise ValueError(
      f"drafter: found {type(drafter).__name__}, whose tree has one size, expected one with a "
      "num_nodes field (EAGLE, EAGLE-3, MTP)"
    )
  most = min(base.MAX_NODES, 1 + drafter.top_k + (drafter.num_levels - 1) * drafter.top_k**2)
  fitting = sorted({n for n in sizes if drafter.num_levels < n <= most})
  if not fitting:
    raise ValueError(
      f"sizes: found {tuple(sizes)}, expected one in {drafter.num_levels + 1}..{most} "
      f"({drafter.num_levels} levels of top_k {drafter.top_k})"
    )
  return {n: dataclasses.replace(drafter, num_nodes=n) for n in fitting}


# --- Accept lengths ------------------------------------------------------------------------------


def accept_lengths(
  model: transformer.Transformer,
  params: base.Params,
  drafters: dict[int, Any],
  texts: Sequence[Sequence[int]],
  num_prompt: Sequence[int],
) -> dict[int, float]:
  """tau of every drafter of `sizes_for` on texts that the target wrote (prompt and output, tokens).

  num_prompt[i] tokens of texts[i] are prompt; rounds start behind the first token of the output, as
  in the engine.
  """
  totals = dict.fromkeys(drafters, (0, 0))
  num_rounds = max(len(text) - start for text, start in zip(texts, num_prompt, strict=True))
  width = max(num_prompt) + max(num_rounds, 1)
  for text, start in zip(texts, num_prompt, strict=True):
    if not 0 < start < len(text) - 1:
      raise ValueError(
        f"num_prompt: found {start} for a text of {len(text)} tokens, expected 1..{len(text) - 2}"
      )
    tokens_T = np.full(width, base.CUT, np.int32)
    tokens_T[: len(text)] = text
    replayed = _replay(model, tuple(drafters.values()), num_rounds, params, tokens_T, start)
    acc_RN = np.asarray(replayed)
    for i, n in enumerate(drafters):
      at, rounds, tokens = start, 0, 0
      while at < len(text) - 1:
        new = min(int(acc_RN[at - start, i]), len(text) - 1 - at)
        at, rounds, tokens = at + new, rounds + 1, tokens + new
      totals[n] = (totals[n][0] + rounds, totals[n][1] + tokens)
  return {n: tokens / rounds for n, (rounds, tokens) in totals.items()}


@functools.partial(jax.jit, static_argnames=("model", "drafters", "num_rounds"))
def _replay(model, drafters, num_rounds: int, params: base.Params, tokens_T, start):
  """int32 [R, N]: tokens that a round whose root stands at start + r emits, by drafter.

  The drafters differ in their number of nodes alone, so their trees are cut from one beam.
  """
  T, first = tokens_T.shape[0], drafters[0]
  inputs_1T = jnp.maximum(tokens_T, 0)[None]
  out = model.apply(
    {"params": params.target},
    inputs_1T,
    tap_layers=first.tap_layers,
    return_logits=False,
  )
  features_1TD = out.taps if first.tap_layers else out.hidden
  state = first.init_state(model, params, 1, T + base.MAX_NODES)
  ahead = max(d.num_levels for d in drafters) + 1
  padded = jnp.concatenate((tokens_T, jnp.full((ahead + 1,), base.CUT, jnp.int32)))

  start_B = jnp.full((1,), start, jnp.int32)
  prompt = base.Committed(
    tokens_BT=inputs_1T,
    next_BT=jnp.maximum(padded[1 : T + 1], 0)[None],
    features_BTD=features_1TD,
    start_B=jnp.zeros((1,), jnp.int32),
    num_B=start_B,
  )

  def accepted(tree: base.Tree, at) -> Any:
    """Nodes that say what the text says, with all nodes above them; the deepest counts."""
    tok, depth, anc = tree.tok_BP[0], tree.depth_BP[0], tree.anc_BPP[0]
    is_said = (tok == padded[at + depth]) & (tok >= 0)
    is_ok = jnp.all(~anc | is_said[None, :], axis=1)
    return jnp.max(jnp.where(is_ok, depth, 0)) + 1

  def one(state, at):
    root_B, length_B = jnp.maximum(tokens_T[at], 0)[None], at[None]
    found = first.candidates(params, state, root_B, length_B)
    trees = [tree_lib.build(root_B, *found, d.num_nodes) for d in drafters]
    acc_N = [accepted(tree, at) for tree in trees]
    new = base.Committed(
      tokens_BT=root_B[None],
      next_BT=jnp.maximum(padded[at + 1], 0)[None, None],
      features_BTD=jax.lax.dynamic_slice_in_dim(features_1TD, at, 1, axis=1),
      start_B=length_B,
      num_B=jnp.ones((1,), jnp.int32),
    )
    return first.commit(params, state, new), jnp.stack(acc_N).astype(jnp.int32)

  state = first.commit(params, state, prompt)
  return jax.lax.scan(one, state, start + jnp.arange(num_rounds, dtype=jnp.int32))[1]


# --- Times ---------------------------------------------------------------------------------------


def measure(
  model: transformer.Transformer,
  params: base.Params,
  drafters: dict[int, Any],
  *,
  length: int = 256,
  repeats: int = 15,
  plain: types.Params | None = None,
) -> tuple[dict[int, float], dict[int, float]]:
  """(verify ms, draft ms) by number of nodes, medians of interleaved runs; verify has 1 as well.

  A step reads `length` committed slots, forms all logits and commits the path. plain: the target's
  parameters in the form for one row, where they have one.
  """
  verify = {1: _verify_step(model, params.target if plain is None else plain, 1, length)}
  verify |= {n: _verify_step(model, params.target, n, length) for n in drafters}
  draft = {n: _draft_step(model, params, drafter, length) for n, drafter in drafters.items()}
  return _medians(verify, repeats), _medians(draft, repeats)


def _medians(runs: dict[int, Callable[[], None]], repeats: int) -> dict[int, float]:
  for run in runs.values():
    run()  # compiles
  taken = {n: [] for n in runs}
  for _ in range(repeats):
    for n, run in runs.items():
      began = time.perf_counter()
      run()
      taken[n].append(time.perf_counter() - began)
  return {n: 1e3 * float(np.median(seconds)) for n, seconds in taken.items()}


def _verify_step(
  model: transformer.Transformer, params: types.Params, num_nodes: int, length: int
) -> Callable[[], None]:
  """One forward of a flat tree behind `length` slots, the cache donated from run to run."""
  parent = jnp.zeros((1, num_nodes), jnp.int32)
  depth_BT = jnp.minimum(jnp.arange(num_nodes, dtype=jnp.int32), 1)[None]
  anc_BTT = jnp.eye(num_nodes, dtype=bool)[None].at[:, :, 0].set(True)

  def step(params, cache):
    tree = cache_lib.Step(anc_BTT=anc_BTT, depth_BT=depth_BT)
    out = model.apply({"params": params}, parent, cache=cache, step=tree)
    tokens = jnp.argmax(out.logits, axis=-1).astype(jnp.int32)
    # As in a round the path is known after the forward; else XLA would copy the cache twice.
    path = jnp.minimum(parent, tokens)
    return tokens, cache_lib.commit(model.cfg, out.cache, path, jnp.zeros((1,), jnp.int32))

  jitted = jax.jit(step, donate_argnums=1)
  cache = cache_lib.init(model.cfg, 1, length + base.MAX_NODES, per_row=True)
  holder = [cache.replace(length=jnp.full((1,), length, jnp.int32))]

  def run() -> None:
    tokens, holder[0] = jitted(params, holder[0])
    jax.block_until_ready(tokens)

  return run


def _draft_step(
  model: transformer.Transformer, params: base.Params, drafter: Any, length: int
) -> Callable[[], None]:
  """Drafting a tree behind `length` slots and committing a path."""
  A = drafter.num_levels + 1
  width = len(drafter.tap_layers) or 1
  shape = (1, A, width * model.cfg.model_dim)

  def step(params, state):
    root_B, length_B = jnp.ones((1,), jnp.int32), jnp.full((1,), length, jnp.int32)
    tree, state = drafter.draft(params, state, root_B, length_B)
    new = base.Committed(
      tokens_BT=tree.tok_BP[:, :A],
      next_BT=jnp.zeros((1, A), jnp.int32),
      features_BTD=jnp.zeros(shape, jnp.float32),
      start_B=length_B,
      num_B=jnp.ones((1,), jnp.int32),
    )
    return tree.tok_BP, drafter.commit(params, state, new)

  jitted = jax.jit(step, donate_argnums=1)
  holder = [drafter.init_state(model, params, 1, length + base.MAX_NODES)]

  def run() -> None:
    tokens, holder[0] = jitted(params, holder[0])
    jax.block_until_ready(tokens)

  return run


# --- The choice ----------------------------------------------------------------------------------


def costs(
  verify_ms: dict[int, float], draft_ms: dict[int, float], accept_length: dict[int, float]
) -> list[TreeCost]:
  """A row of every size, plain decoding first."""
  for what, ms, sizes in (
    ("verify_ms", verify_ms, {1, *accept_length}),
    ("draft_ms", draft_ms, set(accept_length)),
  ):
    missing = sorted(n for n in sizes if not ms.get(n, -1) >= 0)
    if missing:
      raise ValueError(f"{what}: found no time of {missing} nodes, expected milliseconds >= 0")
  plain = verify_ms[1]
  rows = [TreeCost(1, 0.0, plain, 1.0, 1.0)]
  for n, tau in sorted(accept_length.items()):
    if not draft_ms[n] + verify_ms[n] > 0:
      raise ValueError(f"verify_ms: found 0 for {n} nodes, expected milliseconds > 0")
    speedup = tau * plain / (draft_ms[n] + verify_ms[n])
    rows.append(TreeCost(n, draft_ms[n], verify_ms[n], tau, speedup))
  return rows


def best(rows: Sequence[TreeCost]) -> TreeCost:
  """The row with the largest speedup, the smaller tree among equals."""
  if not rows:
    raise ValueError("rows: found none, expected those of `costs`")
  return max(rows, key=lambda row: (row.speedup, -row.num_nodes))
