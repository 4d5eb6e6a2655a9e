"""A batch of prompts to the end, or as it comes: the engine behind two functions.

Every call makes an engine of the size it needs; a given `engine` keeps its cache between calls, so
that prompts which begin alike are not prefilled again. Output is a function of (prompt, seed)
alone: see `sampling`.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import config
from minicpm_jax.core import huge_pages, types
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import requests
from minicpm_jax.infer.drafters import base
from minicpm_jax.models import convert, joined, transformer
from minicpm_jax.quant import qtensor, tree

MAX_ROUNDS = 16  # rounds in the answer of one dispatch
NO_TOKEN = engine_lib.NO_TOKEN  # what a finished row emits

Generation = engine_lib.Generation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
  """What one dispatch emitted. `NO_TOKEN` marks rows that had finished before."""

  tokens_BR: np.ndarray  # int32
  logprobs_BR: np.ndarray  # float32, model's own (no temperature, no filter)
  seconds: float  # waited for it, compilation excluded; the first chunk is the prefill
  compile_seconds: float


def for_decoding(
  model: transformer.Transformer,
  params: types.Params,
  num_rows: int = 1,
  *,
  donate: bool = False,
) -> tuple[transformer.Transformer, types.Params]:
  """The form that decodes fastest here; call once. On a TPU nothing changes.

  num_rows: that a step multiplies, rows of the batch times nodes of a draft tree. donate: `params`
  are given up; their arrays are deleted as soon as the next form of them is there, so that two
  copies of the weights are never kept.

  On a GPU: layers unrolled (under the scan XLA copies every layer's weights out of the stack at
  every token, three times the traffic) and projections of one input joined, in their own dtype;
  scales of quantised weights as float32, as their kernels read them.
  On a CPU: layers unrolled (1.3 to 2 times faster than the scan), floats as float32 (bfloat16
  matrix-vector products are 5 to 16 times slower; environment.md section 8), projections of one
  input joined (`models.joined`, which also goes back), stored outputs first for one row and inputs
  first for more (a step of 4 rows of a 135M model takes a quarter less processor time so, of 12 a
  fifth, of one a tenth more), and the weights in memory of large pages (`core.huge_pages`).
  Quantised weights keep their codes, packed where the packed matmuls serve them, int8 for several
  rows with their outputs first.
  """
  if is_scanned():
    return model, params
  cfg = model.cfg
  follow = _replaced if donate else lambda old, new: new
  if cfg.scan_layers:
    cfg, split = convert.unstack_layers(cfg, params)
    params = follow(params, split)
  if jax.default_backend() == "gpu":
    params = follow(params, tree.map_qtensors(_packed, joined.join_projections(cfg, params)))
    wide = lambda qt: qt.replace(scale=jnp.asarray(qt.scale, jnp.float32))  # noqa: E731
    cfg = dataclasses.replace(cfg, remat="none")
    return transformer.Transformer(cfg), follow(params, tree.map_qtensors(wide, params))
  widen = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
  params = follow(params, jax.tree.map(lambda x: widen(jnp.asarray(x)), params))
  if num_rows > 1:  # they may have had the form for one
    params = follow(params, joined.split_projections(cfg, params))
  packed = functools.partial(_packed, num_rows=num_rows)
  params = follow(params, tree.map_qtensors(packed, joined.join_projections(cfg, params)))
  if num_rows == 1:
    params = follow(params, joined.store_by_output(cfg, params))
  params = follow(params, huge_pages.place(params))
  cfg = dataclasses.replace(cfg, dtype="f32", param_dtype="f32", remat="none")
  return transformer.Transformer(cfg), params


def _replaced(old: types.Params, new: types.Params) -> types.Params:
  """`new`, after the arrays of `old` that it does not share have been deleted."""
  kept = {at for leaf in jax.tree.leaves(new) for at in _addresses(leaf)}
  for leaf in {id(leaf): leaf for leaf in jax.tree.leaves(old)}.values():  # some lie at two places
    if isinstance(leaf, jax.Array) and kept.isdisjoint(_addresses(leaf)):
      leaf.delete()
  return new


def _addresses(leaf: types.AnyArray) -> list[int]:
  if not isinstance(leaf, jax.Array):
    return []
  return [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]


def is_scanned() -> bool:
  """Whether stacked layers decode fastest here."""
  return jax.default_backend() not in ("cpu", "gpu")


def _packed(qt: qtensor.QTensor, num_rows: int = 1) -> qtensor.QTensor:
  """Packed codes are what the matmuls of few rows read fastest, act order with sorted groups; int8
  ones of several rows on a CPU: outputs first, for products of integers."""
  if num_rows > 1 and jax.default_backend() == "cpu" and qtensor.can_store_by_output(qt):
    return qtensor.store_by_output(qt)
  qt = qt if qt.lead else qtensor.sort_groups(qt)
  is_served = qtensor.has_packed_matmul(qt.replace(is_packed=True))
  return qtensor.pack(qt) if is_served else qt


def bucket(num_tokens: int) -> int:
  """The next of 16, 24, 32, 48, 64, 96, ...: at most a third is padding, few shapes compile."""
  size = 16
  while size < num_tokens:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return size


def make_engine(
  model: transformer.Transformer,
  params: types.Params,
  num_prompts: int,
  capacity: int,
  *,
  rounds_per_dispatch: int = 1,
  drafter: base.Drafter | None = None,
  draft_params: types.Params | tuple = (),
) -> engine_lib.Engine:
  """An engine with a row for each prompt."""
  cfg = config.EngineConfig(
    capacity=capacity, max_batch=num_prompts, rounds_per_dispatch=rounds_per_dispatch
  )
  return engine_lib.Engine(model, params, cfg, drafter=drafter, draft_params=draft_params)


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
  engine: engine_lib.Engine | None = None,
) -> Iterator[Chunk]:
  """Chunks as they come: first the tokens of the prefill, then `rounds_per_dispatch` at a time.

  `capacity` is the number of cache slots (default: a bucket that fits). `seeds` gives every row its
  own noise (default: `sampling.seed` for all, so equal prompts give equal answers). LongRoPE and
  dynamic NTK scale for each prompt + max_new_tokens, from the first token on. `engine`: one with a
  row for each prompt, which then decides capacity and rounds; it keeps what it has read.
  """
  longest = _check_prompts(model.cfg, prompts)
  if not 0 < rounds_per_dispatch <= MAX_ROUNDS:
    raise ValueError(f"rounds_per_dispatch: found {rounds_per_dispatch}, expected 1..{MAX_ROUNDS}")
  seeds = [sampling.seed] * len(prompts) if seeds is None else list(seeds)
  if len(seeds) != len(prompts):
    raise ValueError(f"seeds: found {len(seeds)}, expected one for each of {len(prompts)} prompts")
  needed = longest + sampling.max_new_tokens - 1  # the last new token is never written
  capacity = engine.cfg.capacity if engine is not None else capacity
  if capacity is not None and needed > capacity:
    raise ValueError(
      f"capacity: found {capacity} cache slots, expected at least {needed} for a prompt of "
      f"{longest} tokens and max_new_tokens {sampling.max_new_tokens}"
    )
  if engine is None:
    capacity = bucket(needed + 1) if capacity is None else max(capacity, longest + 1)
    more = dict(rounds_per_dispatch=rounds_per_dispatch)
    engine = make_engine(model, params, len(prompts), capacity, **more)
  requests = [
    engine_lib.Request(
      list(prompt), dataclasses.replace(sampling, seed=seed), list(stop_ids), want_logprobs=True
    )
    for prompt, seed in zip(prompts, seeds, strict=True)
  ]
  yield from _chunks(engine, requests)


def _chunks(engine: engine_lib.Engine, requests: Sequence[engine_lib.Request]) -> Iterator[Chunk]:
  """Runs the requests side by side."""
  clock, compiled = time.perf_counter(), engine.compile_seconds
  uids = engine.add_all(requests)
  open_uids = set(uids)
  try:
    engine.fill()  # all prompts first: then the rows go in step
    while open_uids:
      events: dict[int, engine_lib.Event] = {}
      for event in engine.step():
        if event.id in open_uids:
          before = events.get(event.id)
          events[event.id] = event if before is None else _joined(before, event)
      open_uids -= {uid for uid, event in events.items() if event.finish_reason is not None}
      if not events:
        continue
      width = max(len(event.tokens) for event in events.values())
      tokens_BR = np.full((len(uids), width), NO_TOKEN, np.int32)
      logprobs_BR = np.zeros((len(uids), width), np.float32)
      for b, uid in enumerate(uids):
        if uid in events:
          tokens_BR[b, : len(events[uid].tokens)] = events[uid].tokens
          logprobs_BR[b, : len(events[uid].logprobs)] = events[uid].logprobs
      compile_seconds, now = engine.compile_seconds - compiled, time.perf_counter()
      seconds = max(0.0, now - clock - compile_seconds)
      clock, compiled = now, engine.compile_seconds
      yield Chunk(
        tokens_BR=tokens_BR,
        logprobs_BR=logprobs_BR,
        seconds=seconds,
        compile_seconds=compile_seconds,
      )
  finally:
    for uid in open_uids:
      engine.cancel(uid)


def _joined(first: engine_lib.Event, second: engine_lib.Event) -> engine_lib.Event:
  tokens, logprobs = first.tokens + second.tokens, first.logprobs + second.logprobs
  return dataclasses.replace(second, tokens=tokens, logprobs=logprobs)


def generate(
  model: transformer.Transformer,
  params: types.Params,
  prompts: Sequence[Sequence[int]],
  sampling: config.SamplingConfig,
  *,
  stop_ids: Sequence[int] = (),
  capacity: int | None = None,
  seeds: Sequence[int] | None = None,
  engine: engine_lib.Engine | None = None,
) -> Generation:
  """Decodes a batch to the end; arguments as in `stream`."""
  chunks = stream(
    model,
    params,
    prompts,
    sampling,
    stop_ids=stop_ids,
    capacity=capacity,
    seeds=seeds,
    rounds_per_dispatch=MAX_ROUNDS,
    engine=engine,
  )
  tokens, logprobs = [[] for _ in prompts], [[] for _ in prompts]
  for chunk in chunks:
    for b, r in zip(*np.nonzero(chunk.tokens_BR != NO_TOKEN), strict=True):
      tokens[b].append(int(chunk.tokens_BR[b, r]))
      logprobs[b].append(float(chunk.logprobs_BR[b, r]))
  stops = {*stop_ids, *(() if engine is None else engine.stop_ids)}
  reasons = ["stop" if row[-1] in stops else "length" for row in tokens]
  return Generation(tokens=tokens, logprobs=logprobs, finish_reason=reasons)


def _check_prompts(cfg: config.ModelConfig, prompts: Sequence[Sequence[int]]) -> int:
  """Length of the longest prompt; refuses empty prompts and ids outside the vocabulary."""
  if not len(prompts):
    raise ValueError("prompts: found none, expected at least one")
  for i, prompt in enumerate(prompts):
    name = f"prompts[{i}]"
    engine_lib.check_prompt(name, requests.token_ids(name, prompt), cfg.vocab_size)
  return max(map(len, prompts))
