"""Classic speculative sampling: a draft model that samples, the target accepts (inference.md 6).

Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318): the output has the law of
plain sampling from the target, whatever the draft. Unlike the engine's coupled sampling, which
gives the same tokens as plain sampling, this uses independent noise. p and q are the distributions
after temperature and filters. All noise comes in as numbers, so that the rules are functions that a
test can enumerate; `generate` draws it by absolute position.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minicpm_jax import config
from minicpm_jax.core import types
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import requests
from minicpm_jax.infer import sampling as sampling_lib
from minicpm_jax.infer.drafters import base
from minicpm_jax.models import cache as cache_lib
from minicpm_jax.models import transformer

Siblings = Literal["iid", "without_replacement", "deterministic"]


# --- The rules -----------------------------------------------------------------------------------


def residual(p_BV: Float[Array, "B V"], q_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
  """norm(max(p - q, 0)), what a rejected position is sampled from; p where no mass is left."""
  rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
  mass_B1 = jnp.sum(rest_BV, axis=1, keepdims=True)
  return jnp.where(mass_B1 > 0, rest_BV / jnp.where(mass_B1 > 0, mass_B1, 1.0), p_BV)


def verify_chain(
  drafted_BL: Int[Array, "B L"],
  q_BLV: Float[Array, "B L V"],
  p_BAV: Float[Array, "B A V"],
  accept_BL: Float[Array, "B L"],
  last_BA: Float[Array, "B A"],
) -> tuple[Int[Array, " B"], Int[Array, "B A"]]:
  """(num_B, tokens_BA): the first num_B tokens of each row are emitted, 1..L + 1 of them.

  drafted_BL[:, i] was drawn from q_BLV[:, i]; p_BAV[:, i] is the target's law at that position, A =
  L + 1. Position i is accepted iff accept * q(x) < p(x); the token after the accepted ones comes
  from the residual, or from p[L] when all were accepted, as the inverse CDF at last_BA[:, num - 1].
  accept_BL and last_BA are independent uniforms in [0, 1).
  """
  B, L = drafted_BL.shape
  V = p_BAV.shape[-1]
  if q_BLV.shape != (B, L, V) or p_BAV.shape != (B, L + 1, V):
    raise ValueError(
      f"q_BLV, p_BAV: found shapes {q_BLV.shape} and {p_BAV.shape}, expected {(B, L, V)} and "
      f"{(B, L + 1, V)}"
    )
  px_BL, qx_BL = (
    jnp.take_along_axis(x, drafted_BL[:, :, None], axis=2)[:, :, 0] for x in (p_BAV[:, :L], q_BLV)
  )
  is_ok_BL = accept_BL * qx_BL < px_BL
  num_ok_B = jnp.sum(jnp.cumprod(is_ok_BL.astype(jnp.int32), axis=1), axis=1)
  at_B11 = num_ok_B[:, None, None]
  p_BV = jnp.take_along_axis(p_BAV, at_B11, axis=1)[:, 0]
  q_BAV = jnp.pad(q_BLV, ((0, 0), (0, 1), (0, 0)))  # beyond the chain: nothing was proposed
  q_BV = jnp.take_along_axis(q_BAV, at_B11, axis=1)[:, 0]
  u_B = jnp.take_along_axis(last_BA, num_ok_B[:, None], axis=1)[:, 0]
  last_B = sampling_lib.inverse_cdf(residual(p_BV, q_BV), u_B)
  tokens_BA = jnp.pad(drafted_BL, ((0, 0), (0, 1)))
  steps_1A = jnp.arange(L + 1, dtype=jnp.int32)[None, :]
  tokens_BA = jnp.where(steps_1A == num_ok_B[:, None], last_B[:, None], tokens_BA)
  return num_ok_B + 1, tokens_BA.astype(jnp.int32)


def verify_siblings(
  drafted_BC: Int[Array, "B C"],
  q_BV: Float[Array, "B V"],
  p_BV: Float[Array, "B V"],
  accept_BC: Float[Array, "B C"],
  last_B: Float[Array, " B"],
  rule: Siblings,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
  """(index of the accepted candidate or -1, emitted token) of C candidates for one position.

  iid: all drawn from q; a rejection leaves norm(max(p - q, 0)) of the target. without_replacement:
  q also loses the rejected token. deterministic: the candidates are a function of the prefix (top-k
  of a draft): x is accepted with probability p(x), else p loses it.
  """
  target_BV, proposal_BV = p_BV, q_BV
  chosen_B = jnp.full(p_BV.shape[:1], -1, jnp.int32)
  if rule not in get_args(Siblings):
    raise ValueError(f"rule: found {rule!r}, expected one of {', '.join(get_args(Siblings))}")
  for c in range(drafted_BC.shape[1]):
    x_B1 = drafted_BC[:, c : c + 1]
    is_x_BV = jnp.arange(p_BV.shape[1])[None, :] == x_B1
    px_B = jnp.take_along_axis(target_BV, x_B1, axis=1)[:, 0]
    if rule == "deterministic":
      is_ok_B = accept_BC[:, c] < px_B
      after_BV = _normalised(jnp.where(is_x_BV, 0.0, target_BV), target_BV)
    else:
      qx_B = jnp.take_along_axis(proposal_BV, x_B1, axis=1)[:, 0]
      is_ok_B = accept_BC[:, c] * qx_B < px_B
      after_BV = residual(target_BV, proposal_BV)
      if rule == "without_replacement":
        proposal_BV = _normalised(jnp.where(is_x_BV, 0.0, proposal_BV), proposal_BV)
    is_open_B = chosen_B < 0
    chosen_B = jnp.where(is_open_B & is_ok_B, c, chosen_B)
    target_BV = jnp.where((is_open_B & ~is_ok_B)[:, None], after_BV, target_BV)
  drawn_B = sampling_lib.inverse_cdf(target_BV, last_B)
  taken_B = jnp.take_along_axis(drafted_BC, jnp.maximum(chosen_B, 0)[:, None], axis=1)[:, 0]
  return chosen_B, jnp.where(chosen_B < 0, drawn_B, taken_B).astype(jnp.int32)


def _normalised(x_BV: Array, instead_BV: Array) -> Array:
  mass_B1 = jnp.sum(x_BV, axis=1, keepdims=True)
  return jnp.where(mass_B1 > 0, x_BV / jnp.where(mass_B1 > 0, mass_B1, 1.0), instead_BV)


def expected_tokens(acceptance: float, num_drafted: int) -> float:
  """(1 - a^(L+1)) / (1 - a): mean tokens of a round with constant acceptance rate a."""
  if not 0 <= acceptance <= 1:
    raise ValueError(f"acceptance: found {acceptance}, expected a rate in [0, 1]")
  if num_drafted < 0:
    raise ValueError(f"num_drafted: found {num_drafted}, expected a number >= 0")
  if acceptance == 1:
    return num_drafted + 1.0
  return (1 - acceptance ** (num_drafted + 1)) / (1 - acceptance)


# --- Decoding ------------------------------------------------------------------------------------


@flax.struct.dataclass
class _State:
  """Both caches hold the same tokens; the root is sampled and in neither."""

  target: Any  # KVCache
  draft: Any  # KVCache
  root_B: Any  # int32


class Pair:
  """A target and a draft model of one vocabulary, for `generate`."""

  def __init__(
    self,
    model: transformer.Transformer,
    params: types.Params,
    draft_model: transformer.Transformer,
    draft_params: types.Params,
    *,
    num_drafted: int = 4,
  ):
    if model.cfg.vocab_size != draft_model.cfg.vocab_size:
      raise ValueError(
        f"draft_model: found vocabulary {draft_model.cfg.vocab_size}, expected the target's "
        f"{model.cfg.vocab_size}"
      )
    base.check_params(model.cfg, params, "params")
    base.check_params(draft_model.cfg, draft_params, "draft_params")
    if num_drafted < 1:
      raise ValueError(f"num_drafted: found {num_drafted}, expected >= 1")
    self.models, self.params = (model, draft_model), (params, draft_params)
    self.num_drafted = num_drafted

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    sampling: config.SamplingConfig,
    *,
    draft_sampling: config.SamplingConfig | None = None,
    stop_ids: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
  ) -> engine_lib.Generation:
    """Output with the law of plain sampling from the target; `stats[b].accepted` per round.

    draft_sampling: temperature and filters of the draft (default: the target's); any of them
    changes speed only. Repetition penalties are refused (they are the engine's).
    """
    draft_sampling = sampling if draft_sampling is None else draft_sampling
    for name, cfg in (("sampling", sampling), ("draft_sampling", draft_sampling)):
      if cfg.repetition_penalty != 1:
        raise ValueError(
          f"{name}.repetition_penalty: found {cfg.repetition_penalty}, expected 1 (use the engine)"
        )
    if not len(prompts):
      raise ValueError("prompts: found none, expected at least one")
    prompts = [requests.token_ids(f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)]
    for i, prompt in enumerate(prompts):
      requests.check_prompt(f"prompts[{i}]", prompt, self.models[0].cfg.vocab_size)
    seeds = [sampling.seed] * len(prompts) if seeds is None else list(seeds)
    if len(seeds) != len(prompts):
      raise ValueError(
        f"seeds: found {len(seeds)}, expected one for each of {len(prompts)} prompts"
      )
    settings = tuple(sampling_lib.sampling_state(c, seeds) for c in (sampling, draft_sampling))
    longest = max(map(len, prompts))
    unit = math.lcm(*(1 if m.cfg.sparse is None else m.cfg.sparse.block_size for m in self.models))
    capacity = -(-(longest + sampling.max_new_tokens + self.num_drafted + 1) // unit) * unit
    tokens_BT = np.zeros((len(prompts), longest), np.int32)
    for b, prompt in enumerate(prompts):
      tokens_BT[b, : len(prompt)] = prompt
    lengths_B = np.asarray([len(p) for p in prompts], np.int32)
    state = _prefill(self.models, self.params, tokens_BT, lengths_B, capacity=capacity)
    tokens: list[list[int]] = [[] for _ in prompts]
    stats = [engine_lib.Stats(prompt_tokens=len(p)) for p in prompts]
    reasons: list[Any] = [None] * len(prompts)
    while any(reason is None for reason in reasons):
      state, num_B, new_BA = _round(self.models, self.params, state, settings, self.num_drafted)
      num_B, new_BA = np.asarray(num_B), np.asarray(new_BA)
      for b, reason in enumerate(reasons):
        if reason is None:
          stats[b].accepted.append(int(num_B[b]))
          reasons[b] = _take(tokens[b], new_BA[b, : num_B[b]], stop_ids, sampling.max_new_tokens)
    for row, stat in zip(tokens, stats, strict=True):
      stat.new_tokens = len(row)
    return engine_lib.Generation(
      tokens=tokens, logprobs=[[] for _ in prompts], finish_reason=reasons, stats=stats
    )


def _take(row: list[int], new_A: np.ndarray, stop_ids: Sequence[int], limit: int) -> str | None:
  """Appends until a stop id or the limit; the reason to end, if any."""
  for token in map(int, new_A):
    row.append(token)
    if token in stop_ids:
      return "stop"
    if len(row) == limit:
      return "length"
  return None


def _forward(model, params, tokens_BT, cache, step=None):
  """(logits, cache with tokens_BT in it)."""
  rope_length = None
  if model.cfg.rope.kind in ("dynamic", "longrope"):
    rope_length = jnp.full(tokens_BT.shape[:1], cache.capacity, jnp.int32)
  step = cache_lib.Step() if step is None else step
  out = model.apply({"params": params}, tokens_BT, cache=cache, step=step, rope_length=rope_length)
  return out.logits, out.cache


@functools.partial(jax.jit, static_argnames=("models", "capacity"))
def _prefill(models, params, tokens_BT, lengths_B, *, capacity: int) -> _State:
  """Everything but the last token of each prompt, which is the first root."""
  B = tokens_BT.shape[0]
  caches = []
  for model, p in zip(models, params, strict=True):
    cache = cache_lib.init(model.cfg, B, capacity, per_row=True)
    # A sparse model decides by the whole prompt of each row, not by the padded width.
    step = cache_lib.Step(num_new_B=lengths_B - 1, total_B=lengths_B)
    caches.append(_forward(model, p, tokens_BT, cache, step)[1])
  root_B = jnp.take_along_axis(tokens_BT, lengths_B[:, None] - 1, axis=1)[:, 0]
  return _State(*caches, root_B)


@functools.partial(jax.jit, static_argnames=("models", "num_drafted"), donate_argnames="state")
def _round(models, params, state: _State, settings, num_drafted: int):
  """(state, emitted tokens a row, the tokens)."""
  L, length_B = num_drafted, state.target.length
  B = length_B.shape[0]
  noise_BA3 = _noise(settings[0].key_B, length_B, L + 1)

  def draft_one(carry, u_B):
    cache, token_B = carry
    logits_B1V, cache = _forward(models[1], params[1], token_B[:, None], cache)
    q_BV = sampling_lib.distribution(logits_B1V[:, 0], settings[1])
    return (cache, sampling_lib.inverse_cdf(q_BV, u_B)), (q_BV, token_B)

  # One step more than is drafted, so that the draft's cache never lacks an accepted token.
  carry = (state.draft, state.root_B)
  (draft, _), (q_ABV, fed_AB) = jax.lax.scan(draft_one, carry, noise_BA3[:, :, 0].T)
  # A tree of one chain: each token attends as if it were decoded alone (sparse targets).
  path_BA = jnp.broadcast_to(jnp.arange(L + 1, dtype=jnp.int32)[None], (B, L + 1))
  anc_BAA = jnp.broadcast_to(jnp.tril(jnp.ones((L + 1, L + 1), bool))[None], (B, L + 1, L + 1))
  step = cache_lib.Step(anc_BTT=anc_BAA, depth_BT=path_BA)
  logits_BAV, target = _forward(models[0], params[0], fed_AB.T, state.target, step)
  p_NV = sampling_lib.distribution(
    jnp.reshape(logits_BAV, (B * (L + 1), -1)), settings[0].rows(L + 1)
  )
  num_B, new_BA = verify_chain(
    fed_AB[1:].T,
    jnp.moveaxis(q_ABV[:L], 0, 1),
    jnp.reshape(p_NV, logits_BAV.shape),
    noise_BA3[:, :L, 1],
    noise_BA3[:, :, 2],
  )
  root_B = jnp.take_along_axis(new_BA, num_B[:, None] - 1, axis=1)[:, 0]
  target = cache_lib.commit(models[0].cfg, target, path_BA, num_B)
  state = _State(target, draft.replace(length=length_B + num_B), root_B)
  return state, num_B, new_BA


def _noise(key_B: Array, length_B: Int[Array, " B"], num: int) -> Float[Array, "B A 3"]:
  """Independent uniforms for the tokens at length + 1, ...: to draft, to accept, to sample last."""
  positions_BA = length_B[:, None] + 1 + jnp.arange(num, dtype=jnp.int32)[None, :]

  def one(key, position):
    return jax.random.uniform(jax.random.fold_in(key, position), (3,))

  return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(key_B, positions_BA)
