"""What the engine runs on the device: prefill of a chunk, one round, several rounds (inference.md).

A round drafts a tree, verifies it with one forward of the target and commits the accepted path.
Plain decoding is a tree of the root alone. All functions are of static shape; the state is donated.
The root is sampled but not yet in the cache; its position is the row's length.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from minicpm_jax import config
from minicpm_jax.infer import answers, constrained
from minicpm_jax.infer import sampling as sampling_lib
from minicpm_jax.infer import state as state_lib
from minicpm_jax.infer import tree as tree_lib
from minicpm_jax.infer.drafters import base
from minicpm_jax.models import cache as cache_lib

NO_TOKEN = answers.NO_TOKEN


@dataclasses.dataclass(frozen=True)
class Known:
  """What the host knows of all live rows, so that a round need not branch on it.

  A GPU asks the host at every branch (`lax.cond`), with all work before it done: in every layer,
  for the switch between dense and sparse attention. is_bare: greedy without penalty, nobody wants
  the likeliest tokens. is_long: with the root, every sequence has sparse.dense_len tokens.
  """

  is_bare: bool = False
  is_long: bool = False


def _rope_length(cfg: config.ModelConfig, length_B: Any) -> Any:
  """None where the model does not ask for it: then the tables need no data."""
  return length_B if cfg.rope.kind in ("dynamic", "longrope") else None


_STATIC = ("model", "drafter", "span", "known")


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def prefill(
  model: Any,
  drafter: base.Drafter,
  params: base.Params,
  state: state_lib.State,
  tokens_1C: Any,
  row: Any,
  num_real: Any,
  total: Any,
  next_id: Any,
  mask_1W: Any,
  *,
  span: int,
  known: Known = Known(),
) -> tuple[state_lib.State, answers.Answer]:
  """One chunk of a prompt of `total` tokens, padded to C; samples the root where next_id < 0.

  next_id: the token after this chunk, NO_TOKEN for the last one. mask_1W: bits of the tokens that
  may be the root.
  """
  start = state.cache.length[row]
  step = cache_lib.Step(num_new_B=num_real[None], row=row, total_B=total[None], span=span)
  out = model.apply(
    {"params": params.target},
    tokens_1C,
    cache=state.cache,
    step=step.replace(is_long=known.is_long),
    rope_length=_rope_length(model.cfg, state.rope_length_B[row][None]),
    tap_layers=drafter.tap_layers,
    return_logits=False,
  )
  last = jax.lax.dynamic_slice_in_dim(out.hidden, num_real - 1, 1, axis=1)
  logits_1V = model.apply({"params": params.target}, last, method="unembed")[:, 0]
  sampling = jax.tree.map(lambda x: x[row][None], state.sampling)
  token_1 = sampling_lib.sample(
    constrained.apply_bitmask(logits_1V, mask_1W),
    sampling,
    (start + num_real)[None],
    lambda: state.seen_BV[row][None],
  )
  is_last = next_id < 0
  root = jnp.where(is_last, token_1[0], next_id)
  following_1C = jnp.concatenate((tokens_1C[:, 1:], tokens_1C[:, :1]), axis=1)
  following_1C = following_1C.at[0, num_real - 1].set(root)
  new = base.Committed(
    tokens_BT=tokens_1C,
    next_BT=following_1C,
    features_BTD=out.taps if drafter.tap_layers else out.hidden,
    start_B=start[None],
    num_B=num_real[None],
    row=row,
  )
  is_open = is_last & ~jnp.any(root == state.stops_BE[row]) & (state.limit_B[row] > 1)
  logprob_1 = sampling_lib.logprobs(logits_1V, token_1)
  top_ids_1K, top_1K = answers.likeliest(logits_1V, state.wants_top_B[row] & is_last)
  state = state.replace(
    cache=out.cache,
    draft=drafter.prefill(params._replace(span=span), state.draft, new),
    root_B=state.root_B.at[row].set(root),
    is_live_B=state.is_live_B.at[row].set(is_open),
    num_emitted_B=state.num_emitted_B.at[row].set(is_last.astype(jnp.int32)),
    seen_BV=state.seen_BV.at[row, root].set(True),
  )
  token = jnp.where(is_last, root, NO_TOKEN)
  return state, answers.Answer(
    tokens_BRA=token[None, None, None],
    logprobs_BRA=logprob_1[:, None, None],
    top_ids_BRAK=top_ids_1K[:, None, None],
    top_logprobs_BRAK=top_1K[:, None, None],
    is_bad_B=~jnp.all(jnp.isfinite(jnp.max(logits_1V, axis=1, keepdims=True)), axis=1),
  )


def _draft(drafter, params: base.Params, state: state_lib.State, span: int, first: Any = None):
  params = params._replace(span=span, row=first)
  length_B = cache_lib.lengths(state.cache, _rows(state, first))
  tree, draft = drafter.draft(params, state.draft, state.root_B, length_B)
  return tree, state.replace(draft=draft)


def _rows(state: state_lib.State, first: Any) -> cache_lib.Step:
  """The rows of the cache that the state is of: all, or a window from `first` on."""
  return cache_lib.Step(row=first, num_rows=state.root_B.shape[0])


def _round(model, drafter, params, state: state_lib.State, span, known: Known, first: Any = None):
  """(state after a round, its Answer)."""
  tree, state = _draft(drafter, params, state, span, first)
  D = drafter.num_levels
  if not getattr(drafter, "may_pass", False):
    return _verify(model, drafter, params, state, tree, None, span, D, known, first)

  def plainly(state):
    root = base.Tree(
      tok_BP=tree.tok_BP[:, :1],
      parent_BP=tree.parent_BP[:, :1],
      depth_BP=tree.depth_BP[:, :1],
      anc_BPP=tree.anc_BPP[:, :1, :1],
    )
    state, short = _verify(model, drafter, params, state, root, None, span, 0, known, first)
    return state, answers.put(nothing, 0, short)

  def whole(state):
    return _verify(model, drafter, params, state, tree, None, span, D, known, first)

  is_any = jnp.any((tree.tok_BP[:, 1:] >= 0) & state.is_live_B[:, None])
  nothing = answers.no_answer(state.root_B.shape[0], 1, D, model.cfg.vocab_size)
  out = _if(is_any, whole, (state, nothing))
  return _if(~is_any, plainly, out)


def _if(is_wanted: Any, function: Any, given: Any) -> Any:
  """function(given[0]) or `given`; as a loop of at most one turn, because `lax.cond` would copy the
  cache where a loop writes it in place (XLA on CPU)."""

  def body(carry):
    return jnp.zeros((), bool), *function(carry[1])

  return jax.lax.while_loop(lambda carry: carry[0], body, (is_wanted, *given))[1:]


def _verify(
  model,
  drafter,
  params,
  state: state_lib.State,
  tree: base.Tree,
  mask_BPW,
  span,
  num_levels,
  known: Known = Known(),
  first: Any = None,
):
  """(state after the round, its Answer)."""
  cfg, D = model.cfg, num_levels
  B, P = tree.tok_BP.shape
  step = _rows(state, first).replace(span=span, is_long=known.is_long)
  length_B = cache_lib.lengths(state.cache, step)
  out = _forward(model, drafter, params, state, tree, step)
  logits_NV = jnp.reshape(out.logits, (B * P, -1))
  masked_NV = logits_NV
  if mask_BPW is not None:
    masked_NV = constrained.apply_bitmask(logits_NV, jnp.reshape(mask_BPW, (B * P, -1)))
  if known.is_bare:
    y_N = jnp.argmax(masked_NV, axis=1).astype(jnp.int32)
  else:
    y_N = sampling_lib.sample(
      masked_NV,
      state.sampling.rows(P),
      jnp.reshape(length_B[:, None] + tree.depth_BP + 1, (-1,)),
      lambda: tree_lib.seen_by_nodes(state.seen_BV, tree, D),
    )
  acc_B, path_BA, new_BA = tree_lib.match(tree, jnp.reshape(y_N, (B, P)), D)
  acc_B, is_live_B = _cut(state, acc_B, new_BA)
  steps_1A = jnp.arange(D + 1, dtype=jnp.int32)[None, :]
  emitted_BA = jnp.where(steps_1A < acc_B[:, None], new_BA, NO_TOKEN)
  last_B = jnp.take_along_axis(new_BA, jnp.maximum(acc_B - 1, 0)[:, None], axis=1)[:, 0]
  features = out.taps if drafter.tap_layers else out.hidden
  riders_BMD = None
  if M := base.num_riders(drafter):
    end_B1 = jnp.take_along_axis(path_BA, jnp.maximum(acc_B - 1, 0)[:, None], axis=1)
    at_BM = P + M * end_B1 + jnp.arange(M, dtype=jnp.int32)[None, :]
    riders_BMD = jnp.take_along_axis(out.hidden, at_BM[:, :, None], axis=1)
  new = base.Committed(
    tokens_BT=jnp.take_along_axis(jnp.maximum(tree.tok_BP, 0), path_BA, axis=1),
    next_BT=new_BA,
    features_BTD=jnp.take_along_axis(features, path_BA[:, :, None], axis=1),
    start_B=length_B,
    num_B=acc_B,
    row=first,
    riders_BMD=riders_BMD,
  )
  path_NA = path_BA + P * jnp.arange(B, dtype=jnp.int32)[:, None]

  path_N = jnp.reshape(path_NA, (-1,))

  def logprobs():
    return sampling_lib.logprobs(logits_NV[path_N], jnp.reshape(new_BA, (-1,)))

  is_running_B = state.is_live_B
  if known.is_bare:
    logprobs_N = logprobs()
  else:
    wanted = jnp.any(state.wants_logprobs_B & is_running_B)
    logprobs_N = jax.lax.cond(wanted, logprobs, lambda: jnp.zeros((B * (D + 1),), jnp.float32))
  rows_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
  seen_ids_BA = jnp.where(emitted_BA < 0, state.seen_BV.shape[1], emitted_BA)
  root_logits_B = jnp.max(jnp.reshape(logits_NV, (B, P, -1))[:, 0], axis=-1)
  is_bad_B = ~jnp.isfinite(root_logits_B) & state.is_live_B
  state = state.replace(
    cache=cache_lib.commit(cfg, out.cache, path_BA, acc_B, step),
    draft=drafter.commit(params._replace(span=span), state.draft, new),
    root_B=jnp.where(acc_B > 0, last_B, state.root_B),
    is_live_B=is_live_B,
    num_emitted_B=state.num_emitted_B + acc_B,
    seen_BV=state.seen_BV.at[rows_B1, seen_ids_BA].set(True, mode="drop"),
  )
  is_top_wanted = False if known.is_bare else jnp.any(state.wants_top_B & is_running_B)
  top_ids_NK, top_NK = answers.likeliest(logits_NV[path_N], is_top_wanted)
  return state, answers.Answer(
    tokens_BRA=emitted_BA[:, None],
    logprobs_BRA=jnp.reshape(logprobs_N, (B, 1, D + 1)),
    top_ids_BRAK=jnp.reshape(top_ids_NK, (B, 1, D + 1, -1)),
    top_logprobs_BRAK=jnp.reshape(top_NK, (B, 1, D + 1, -1)),
    is_bad_B=is_bad_B,
  )


def _forward(model, drafter, params, state: state_lib.State, tree: base.Tree, step) -> Any:
  """The target's output at the nodes, `hidden` also at what rides on them."""
  tokens_BR, more = jnp.maximum(tree.tok_BP, 0), {}
  anc_BRR, depth_BR, num_riders = tree.anc_BPP, tree.depth_BP, base.num_riders(drafter)
  if num_riders:
    P = tokens_BR.shape[1]
    rows = drafter.ride(params, tree)
    anc_BRR, depth_BR, more = rows.anc_BRR, rows.depth_BR, {"ahead": rows.ahead}
    tokens_BR = jnp.pad(tokens_BR, ((0, 0), (0, num_riders * P)))
  out = model.apply(
    {"params": params.target},
    tokens_BR,
    cache=state.cache,
    step=step.replace(anc_BTT=anc_BRR, depth_BT=depth_BR),
    rope_length=_rope_length(model.cfg, state.rope_length_B),
    tap_layers=drafter.tap_layers,
    return_logits=not num_riders,
    **more,
  )
  if not num_riders:
    return out
  logits_BPV = model.apply({"params": params.target}, out.hidden[:, :P], method="unembed")
  return out.replace(logits=logits_BPV)


def _cut(state: state_lib.State, acc_B, new_BA):
  """(tokens emitted, rows that go on): cut after the first stop id and at the limit."""
  steps_1A = jnp.arange(new_BA.shape[1], dtype=jnp.int32)[None, :]
  is_stop_BA = jnp.any(new_BA[:, :, None] == state.stops_BE[:, None, :], axis=2)
  until_BA = jnp.where(is_stop_BA, steps_1A + 1, new_BA.shape[1])
  acc_B = jnp.minimum(acc_B, jnp.min(until_BA, axis=1))
  acc_B = jnp.minimum(acc_B, state.limit_B - state.num_emitted_B)
  acc_B = jnp.where(state.is_live_B, acc_B, 0)
  is_stopped_B = jnp.any(is_stop_BA & (steps_1A < acc_B[:, None]), axis=1)
  is_open_B = state.is_live_B & ~is_stopped_B & (state.num_emitted_B + acc_B < state.limit_B)
  return acc_B, is_open_B


@functools.partial(
  jax.jit, static_argnames=(*_STATIC, "rounds", "num_rows"), donate_argnames="state"
)
def run(
  model: Any,
  drafter: base.Drafter,
  params: base.Params,
  state: state_lib.State,
  first: Any = None,
  *,
  span: int,
  rounds: int,
  known: Known = Known(),
  num_rows: int = 0,
) -> tuple[state_lib.State, answers.Answer]:
  """`rounds` rounds, fewer when no row is live. With `first`: of `num_rows` rows from there on, for
  drafters that are `by_row`; all live ones must be among them."""
  part = state_lib.window(state, first, num_rows)
  part, answer = _run(model, drafter, params, part, first, span, rounds, known)
  return state_lib.put_window(state, part, first), answer


def _run(model, drafter, params, state: state_lib.State, first, span, rounds, known: Known):
  def one(state):
    return _round(model, drafter, params, state, span, known, first)

  if rounds == 1:
    return one(state)

  def body(carry):
    i, state, answer = carry
    # Unpacked weights must not become loop invariants: XLA would store them as floats.
    held, state = jax.lax.optimization_barrier((params, state))
    state, new = _round(model, drafter, held, state, span, known, first)
    return i + 1, state, answers.put(answer, i, new)

  answer = answers.no_answer(
    state.root_B.shape[0], rounds, drafter.num_levels, model.cfg.vocab_size
  )
  begin = (jnp.zeros((), jnp.int32), state, answer)
  is_on = lambda carry: (carry[0] < rounds) & jnp.any(carry[1].is_live_B)  # noqa: E731
  _, state, answer = jax.lax.while_loop(is_on, body, begin)
  return state, answer


_HALF = ("model", "drafter", "span", "num_rows")


@functools.partial(jax.jit, static_argnames=_HALF, donate_argnames="state")
def draft(
  model: Any,
  drafter: base.Drafter,
  params: base.Params,
  state: state_lib.State,
  root_mask_BW: Any,
  first: Any = None,
  *,
  span: int,
  num_rows: int = 0,
) -> tuple[state_lib.State, base.Tree]:
  """First half of a round, for the host to look at the tree (constraints); rows as in `run`.

  root_mask_BW: bits of the tokens that may follow the root, known before the tree is.
  """
  del model  # the drafter knows its own; here because `Engine._call` gives it to all
  part = state_lib.window(state, first, num_rows)
  tree, part = _draft(drafter, params._replace(root_mask_BW=root_mask_BW), part, span, first)
  return state.replace(draft=part.draft), tree


@functools.partial(jax.jit, static_argnames=_HALF, donate_argnames="state")
def verify(
  model: Any,
  drafter: base.Drafter,
  params: base.Params,
  state: state_lib.State,
  tree: base.Tree,
  mask_BPW: Any,
  first: Any = None,
  *,
  span: int,
  num_rows: int = 0,
) -> tuple[state_lib.State, answers.Answer]:
  """Second half: mask_BPW holds the bits of the tokens that may follow each node."""
  part = state_lib.window(state, first, num_rows)
  more = (tree, mask_BPW, span, drafter.num_levels, Known(), first)
  part, answer = _verify(model, drafter, params, part, *more)
  return state_lib.put_window(state, part, first), answer
