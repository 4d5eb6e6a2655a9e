"""What one round of decoding hands to the next, and what a request sets in its row of it.

The state lives on the device and is donated to every function here and in `rounds`.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from minicpm_jax import config
from minicpm_jax.core import rng
from minicpm_jax.infer import answers
from minicpm_jax.infer import sampling as sampling_lib
from minicpm_jax.infer.drafters import base
from minicpm_jax.models import cache as cache_lib

NO_TOKEN = answers.NO_TOKEN
STOP_SLOTS = 16  # stop ids a row may have


@flax.struct.dataclass
class State:
  """Everything that one round hands to the next."""

  cache: Any  # KVCache, one length a row
  draft: Any  # the drafter's
  root_B: Any  # int32
  is_live_B: Any  # bool, rows that decode
  num_emitted_B: Any  # int32
  limit_B: Any  # int32, tokens to emit at most
  stops_BE: Any  # int32, NO_TOKEN = unused
  rope_length_B: Any  # int32, what LongRoPE and dynamic NTK scale for
  seen_BV: Any  # bool, tokens of prompt and output (repetition penalty)
  wants_logprobs_B: Any  # bool
  wants_top_B: Any  # bool, the likeliest tokens too
  sampling: sampling_lib.SamplingState


@flax.struct.dataclass
class RowSettings:
  """What a request sets in its row."""

  start: Any  # int32, cache slots that hold its first tokens already
  limit: Any  # int32
  stops_E: Any  # int32
  rope_length: Any  # int32
  seen_V: Any  # bool
  wants_logprobs: Any  # bool
  wants_top: Any  # bool
  seed: Any  # int64 of numpy
  sampling: sampling_lib.SamplingState  # of one row, without its key


def init_state(
  model: Any, drafter: base.Drafter, params: base.Params, batch_size: int, capacity: int
) -> State:
  B, V = batch_size, model.cfg.vocab_size
  no_sampling = sampling_lib.sampling_state(config.SamplingConfig(), [0] * B)
  return State(
    cache=cache_lib.init(model.cfg, B, capacity, per_row=True),
    draft=drafter.init_state(model, params, B, capacity),
    root_B=jnp.zeros((B,), jnp.int32),
    is_live_B=jnp.zeros((B,), bool),
    num_emitted_B=jnp.zeros((B,), jnp.int32),
    limit_B=jnp.zeros((B,), jnp.int32),
    stops_BE=jnp.full((B, STOP_SLOTS), NO_TOKEN, jnp.int32),
    rope_length_B=jnp.full((B,), capacity, jnp.int32),
    seen_BV=jnp.zeros((B, V), bool),
    wants_logprobs_B=jnp.zeros((B,), bool),
    wants_top_B=jnp.zeros((B,), bool),
    sampling=no_sampling,
  )


@functools.partial(jax.jit, donate_argnames="state")
def admit(state: State, row: Any, new: RowSettings) -> State:
  """Gives a row to a request; the first `new.start` slots of its cache are kept."""
  sampling = new.sampling.replace(key_B=rng.key(new.seed, "sampling")[None])
  return state.replace(
    cache=state.cache.replace(length=state.cache.length.at[row].set(new.start)),
    is_live_B=state.is_live_B.at[row].set(False),
    num_emitted_B=state.num_emitted_B.at[row].set(0),
    limit_B=state.limit_B.at[row].set(new.limit),
    stops_BE=state.stops_BE.at[row].set(new.stops_E),
    rope_length_B=state.rope_length_B.at[row].set(new.rope_length),
    seen_BV=state.seen_BV.at[row].set(new.seen_V),
    wants_logprobs_B=state.wants_logprobs_B.at[row].set(new.wants_logprobs),
    wants_top_B=state.wants_top_B.at[row].set(new.wants_top),
    sampling=jax.tree.map(lambda x, y: x.at[row].set(y[0]), state.sampling, sampling),
  )


@functools.partial(jax.jit, static_argnames="drafter", donate_argnames="state")
def copy_row(drafter: base.Drafter, state: State, source: Any, target: Any) -> State:
  """Row `target` continues like row `source` (prompt cache)."""
  return state.replace(
    cache=cache_lib.copy_row(state.cache, source, target),
    draft=drafter.copy_row(state.draft, source, target),
  )


@functools.partial(jax.jit, donate_argnames="state")
def put_prefix(state: State, row: Any, k: Any, v: Any) -> State:
  """The first slots of a row become the prefix's keys and values [L, P, K, H]; see `admit`."""

  def put(x: Any, rows_PKH: Any) -> Any:
    return x.at[..., row, : rows_PKH.shape[-3], :, :].set(rows_PKH.astype(x.dtype))

  def all_layers(x: Any, rows: Any) -> Any:
    return tuple(map(put, x, rows)) if isinstance(x, tuple) else put(x, rows)

  cache = state.cache
  return state.replace(cache=cache.replace(k=all_layers(cache.k, k), v=all_layers(cache.v, v)))


def window(state: State, first: Any, num_rows: int) -> State:
  """Rows first.. (None: all) of everything but the caches, the drafter's too, which stay whole; see
  `put_window`."""
  part = base.take_rows(state.replace(cache=None, draft=None), first, num_rows)
  return part.replace(cache=state.cache, draft=state.draft)


def put_window(state: State, part: State, first: Any) -> State:
  """`state` with a window of it that rounds have worked on."""
  own = (x.replace(cache=None, draft=None) for x in (state, part))
  return base.put_rows(*own, first).replace(cache=part.cache, draft=part.draft)


@functools.partial(jax.jit, donate_argnames="state")
def release(state: State, row: Any) -> State:
  """The row stops decoding; its cache stays for requests that begin alike."""
  return state.replace(is_live_B=state.is_live_B.at[row].set(False))


@functools.partial(jax.jit, donate_argnames="state")
def resume(state: State, row: Any, num_emitted: Any, tokens_C: Any) -> State:
  """The row decodes on behind tokens that `prefill` appended to it (padded with NO_TOKEN)."""
  ids_C = jnp.where(tokens_C < 0, state.seen_BV.shape[1], tokens_C)
  return state.replace(
    is_live_B=state.is_live_B.at[row].set(True),
    num_emitted_B=state.num_emitted_B.at[row].set(num_emitted),
    seen_BV=state.seen_BV.at[row, ids_C].set(True, mode="drop"),
  )
