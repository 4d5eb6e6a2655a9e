"""Plain autoregressive decoding: one jitted prefill, one jitted loop of rounds on the device.

Prompts of unequal length are padded on the left, so that all rows share the next cache slot. The
root token (sampled, not yet in the cache) travels with the cache; a round feeds it and samples the
next. The host asks for rounds and reads the answer of the request before, so the device never waits
for it. Output is a function of (prompt, seed) alone: see `sampling`. Chunked prefill, span buckets
and speculation belong to the engine (inference.md), not here.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from minicpm_jax import config
from minicpm_jax.core import types
from minicpm_jax.infer import sampling as sampling_lib
from minicpm_jax.models import cache as cache_lib
from minicpm_jax.models import convert, transformer

MAX_ROUNDS = 16  # token slots in the answer of one dispatch
NO_TOKEN = -1  # what a finished row emits
STOP_SLOTS = 8  # stop ids are padded to a multiple of this


@flax.struct.dataclass
class DecodeState:
  """What one round hands to the next; donated."""

  cache: Any  # KVCache
  token_B: Any  # int32, sampled, not in the cache
  position_B: Any  # int32, absolute position of that token
  is_done_B: Any  # bool
  count: Any  # int32 scalar, tokens emitted so far


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
  """What one dispatch emitted. `NO_TOKEN` marks rows that had finished before."""

  tokens_BR: np.ndarray  # int32
  logprobs_BR: np.ndarray  # float32, model's own (no temperature, no filter)
  seconds: float  # waited for it, compilation excluded; the first chunk is the prefill
  compile_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """New tokens of every prompt, the stop token included; log-probabilities of the bare model."""

  tokens: list[list[int]]
  logprobs: list[list[float]]
  finish_reason: list[Literal["stop", "length"]]


def for_decoding(
  model: transformer.Transformer, params: types.Params
) -> tuple[transformer.Transformer, types.Params]:
  """The form that decodes fastest here; call once. On CPU: unrolled layers, float32.

  Unrolled is 1.3 to 2 times faster than the scan on CPU, and bfloat16 matrix-vector products are 5
  to 16 times slower than float32 (environment.md section 8). Elsewhere nothing changes.
  """
  if jax.default_backend() != "cpu":
    return model, params
  cfg = model.cfg
  if cfg.scan_layers:
    cfg, params = convert.unstack_layers(cfg, params)
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  cfg = dataclasses.replace(cfg, dtype="f32", param_dtype="f32", remat="none")
  return transformer.Transformer(cfg), params


def bucket(num_tokens: int) -> int:
  """The next of 16, 24, 32, 48, 64, 96, ...: at most a third is padding, few shapes compile."""
  size = 16
  while size < num_tokens:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return size


def _rope_length(cfg: config.ModelConfig, num_tokens: int) -> int | None:
  """Static length that LongRoPE and dynamic NTK scale for, in as few values as they can tell."""
  if cfg.rope.kind == "longrope" and cfg.rope.short_factor != cfg.rope.long_factor:
    original = cfg.rope.original_max_position
    return original if num_tokens <= original else original + 1
  if cfg.rope.kind == "dynamic":
    return max(cfg.max_position, bucket(num_tokens))
  return None


@functools.partial(jax.jit, static_argnames=("model", "capacity", "rope_length"))
def _prefill(model, params, tokens_BT, segment_ids_BT, sampling, stops_E, *, capacity, rope_length):
  """(state, tokens_B1, logprobs_B1) after the prompts: the first new token of every row."""
  lengths_B = jnp.sum(segment_ids_BT, axis=1)
  cache = cache_lib.init(model.cfg, tokens_BT.shape[0], capacity)
  out = model.apply(
    {"params": params},
    tokens_BT,
    jnp.maximum(jnp.cumsum(segment_ids_BT, axis=1) - 1, 0),
    segment_ids_BT,
    cache,
    rope_length=rope_length,
    return_logits=False,
  )
  logits_B1V = model.apply({"params": params}, out.hidden[:, -1:], method="unembed")
  token_B = sampling_lib.sample(logits_B1V[:, 0], sampling, lengths_B)
  state = DecodeState(
    cache=out.cache,
    token_B=token_B,
    position_B=lengths_B,
    is_done_B=_is_stop(token_B, stops_E),
    count=jnp.ones((), jnp.int32),
  )
  return state, token_B[:, None], sampling_lib.logprobs(logits_B1V[:, 0], token_B)[:, None]


@functools.partial(jax.jit, static_argnames=("model", "rope_length"), donate_argnames="state")
def _decode(model, params, state, sampling, stops_E, rounds, max_new_tokens, *, rope_length):
  """Up to `rounds` rounds, fewer when all rows are done; (state, tokens_BR, logprobs_BR)."""
  B = state.token_B.shape[0]

  def is_running(carry):
    state, i, _, _ = carry
    is_open = jnp.logical_not(jnp.all(state.is_done_B)) & (state.count < max_new_tokens)
    return (i < rounds) & is_open

  def one_round(carry):
    state, i, tokens_BR, logprobs_BR = carry
    out = model.apply(
      {"params": params},
      state.token_B[:, None],
      state.position_B[:, None],
      jnp.ones((B, 1), jnp.int32),
      state.cache,
      rope_length=rope_length,
    )
    logits_BV, position_B = out.logits[:, 0], state.position_B + 1
    token_B = sampling_lib.sample(logits_BV, sampling, position_B)
    emitted_B = jnp.where(state.is_done_B, NO_TOKEN, token_B)
    tokens_BR = tokens_BR.at[:, i].set(emitted_B)
    logprobs_BR = logprobs_BR.at[:, i].set(sampling_lib.logprobs(logits_BV, token_B))
    state = DecodeState(
      cache=out.cache,
      token_B=token_B,
      position_B=position_B,
      is_done_B=state.is_done_B | _is_stop(token_B, stops_E),
      count=state.count + 1,
    )
    return state, i + 1, tokens_BR, logprobs_BR

  tokens_BR = jnp.full((B, MAX_ROUNDS), NO_TOKEN, jnp.int32)
  logprobs_BR = jnp.zeros((B, MAX_ROUNDS), jnp.float32)
  carry = (state, jnp.zeros((), jnp.int32), tokens_BR, logprobs_BR)
  state, _, tokens_BR, logprobs_BR = jax.lax.while_loop(is_running, one_round, carry)
  return state, tokens_BR, logprobs_BR


def _is_stop(token_B: Int[Array, "B"], stops_E: Int[Array, "E"]) -> Bool[Array, "B"]:
  return jnp.any(token_B[:, None] == stops_E[None, :], axis=1)


def stream(
  model: transformer.Transformer,
  params: types.Params,
  prompts: Sequence[Sequence[int]],
  sampling: config.SamplingConfig,
  *,
  stop_ids: Sequence[int] = (),
  capacity: int | None = None,
  seeds: Sequence[int] | None = None,
  rounds_per_dispatch: int = 1,
) -> Iterator[Chunk]:
  """Chunks as they come: first the tokens of the prefill, then `rounds_per_dispatch` at a time.

  `capacity` is the number of cache slots (default: a bucket that fits). `seeds` gives every row its
  own noise (default: `sampling.seed` for all, so equal prompts give equal answers). LongRoPE and
  dynamic NTK scale for the longest prompt + max_new_tokens, from the first token on.
  """
  longest = _check_prompts(model.cfg, prompts)
  if not 0 < rounds_per_dispatch <= MAX_ROUNDS:
    raise ValueError(f"rounds_per_dispatch: found {rounds_per_dispatch}, expected 1..{MAX_ROUNDS}")
  seeds = [sampling.seed] * len(prompts) if seeds is None else list(seeds)
  if len(seeds) != len(prompts):
    raise ValueError(f"seeds: found {len(seeds)}, expected one for each of {len(prompts)} prompts")
  padded, capacity = _sizes(model.cfg, longest, sampling.max_new_tokens, capacity)
  tokens_BT, segment_ids_BT = _pad_left(prompts, padded)
  settings = sampling_lib.sampling_state(sampling, seeds)
  stops_E = _stop_array(stop_ids)
  static = {"rope_length": _rope_length(model.cfg, longest + sampling.max_new_tokens)}

  args = (model, params, tokens_BT, segment_ids_BT, settings, stops_E)
  compile_seconds = _compile(_prefill, *args, capacity=capacity, **static)
  clock = time.perf_counter()
  state, *answer = _prefill(*args, capacity=capacity, **static)
  chunk, clock = _fetch(answer, clock, compile_seconds)
  yield chunk
  if sampling.max_new_tokens == 1:
    return

  budget = (jnp.int32(rounds_per_dispatch), jnp.int32(sampling.max_new_tokens))
  args = (settings, stops_E, *budget)
  compile_seconds = _compile(_decode, model, params, state, *args, **static)
  clock = time.perf_counter()
  pending = None
  is_open = True
  while is_open:
    # After the last token the dispatch ahead runs no round: the device knows that it is done.
    state, *answer = _decode(model, params, state, *args, **static)
    if pending is not None:
      chunk, clock = _fetch(pending, clock, compile_seconds)
      compile_seconds = 0.0
      is_open = chunk.tokens_BR.shape[1] > 0
      if is_open:
        yield chunk
    pending = answer


def generate(
  model: transformer.Transformer,
  params: types.Params,
  prompts: Sequence[Sequence[int]],
  sampling: config.SamplingConfig,
  *,
  stop_ids: Sequence[int] = (),
  capacity: int | None = None,
  seeds: Sequence[int] | None = None,
) -> Generation:
  """Decodes a batch to the end; arguments as in `stream`."""
  rounds = MAX_ROUNDS
  chunks = stream(
    model,
    params,
    prompts,
    sampling,
    stop_ids=stop_ids,
    capacity=capacity,
    seeds=seeds,
    rounds_per_dispatch=rounds,
  )
  tokens, logprobs = [[] for _ in prompts], [[] for _ in prompts]
  for chunk in chunks:
    for b, r in zip(*np.nonzero(chunk.tokens_BR != NO_TOKEN), strict=True):
      tokens[b].append(int(chunk.tokens_BR[b, r]))
      logprobs[b].append(float(chunk.logprobs_BR[b, r]))
  reasons = ["stop" if row[-1] in stop_ids else "length" for row in tokens]
  return Generation(tokens=tokens, logprobs=logprobs, finish_reason=reasons)


# --- Host side --------------------------------------------------------------------------------


def _check_prompts(cfg: config.ModelConfig, prompts: Sequence[Sequence[int]]) -> int:
  """Length of the longest prompt; refuses empty prompts and ids outside the vocabulary."""
  if not prompts:
    raise ValueError("prompts: found none, expected at least one")
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise ValueError(f"prompts[{i}]: found no token, expected at least one (a BOS will do)")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= cfg.vocab_size:
      found = low if low < 0 else high
      raise ValueError(f"prompts[{i}]: found token {found}, expected 0..{cfg.vocab_size - 1}")
  return max(map(len, prompts))


def _sizes(cfg, longest: int, max_new_tokens: int, capacity: int | None) -> tuple[int, int]:
  """(prompt columns, cache slots). The last new token is never written to the cache."""
  num_later = max_new_tokens - 1
  needed = longest + num_later
  if capacity is None:
    capacity = bucket(bucket(longest) + num_later)
    if cfg.sparse is not None and needed < cfg.sparse.dense_len:
      capacity = min(capacity, cfg.sparse.dense_len - 1)  # padding must not cost us the dense form
  if needed > capacity:
    raise ValueError(
      f"capacity: found {capacity} cache slots, expected at least {needed} for a prompt of "
      f"{longest} tokens and max_new_tokens {max_new_tokens}"
    )
  return min(bucket(longest), capacity - num_later), capacity


def _pad_left(prompts: Sequence[Sequence[int]], width: int) -> tuple[Array, Array]:
  tokens_BT = np.zeros((len(prompts), width), np.int32)
  segment_ids_BT = np.zeros_like(tokens_BT)
  for b, prompt in enumerate(prompts):
    tokens_BT[b, width - len(prompt) :] = prompt
    segment_ids_BT[b, width - len(prompt) :] = 1
  return jnp.asarray(tokens_BT), jnp.asarray(segment_ids_BT)


def _stop_array(stop_ids: Sequence[int]) -> Int[Array, "E"]:
  size = max(1, -(-len(stop_ids) // STOP_SLOTS)) * STOP_SLOTS
  stops_E = np.full(size, NO_TOKEN, np.int32)
  stops_E[: len(stop_ids)] = list(stop_ids)
  return jnp.asarray(stops_E)


def _compile(function: Any, *args: Any, **kwargs: Any) -> float:
  """Compiles ahead of the call (which then finds it); seconds spent."""
  start = time.perf_counter()
  function.lower(*args, **kwargs).compile()
  return time.perf_counter() - start


def _fetch(answer: Sequence[Array], clock: float, compile_seconds: float) -> tuple[Chunk, float]:
  """Waits for (tokens, logprobs), drops rounds that did not run; (chunk, time now)."""
  tokens_BR, logprobs_BR = map(np.asarray, answer)
  num_rounds = int(np.sum(np.any(tokens_BR != NO_TOKEN, axis=0)))
  tokens_BR, logprobs_BR = tokens_BR[:, :num_rounds], logprobs_BR[:, :num_rounds]
  is_bad_BR = np.isnan(logprobs_BR) & (tokens_BR != NO_TOKEN)
  if is_bad_BR.any():
    row = int(np.argmax(is_bad_BR.any(axis=1)))
    raise ValueError(f"prompts[{row}]: found non-finite logits, expected finite (broken weights?)")
  now = time.perf_counter()
  chunk = Chunk(
    tokens_BR=tokens_BR,
    logprobs_BR=logprobs_BR,
    seconds=now - clock,
    compile_seconds=compile_seconds,
  )
  return chunk, now
