"""The bars of the engine on one accelerator (inference.md 19), behind `bench_decode --suite=gpu`.

Random weights in the shape of MiniCPM4-8B, made on the device in the decoding form; contexts are
random keys with the compressed ones that belong to them, so nothing is prefilled. Programs are the
engine's own (`infer.rounds`), one row, and answers are read one dispatch behind as the engine does.
The weights say token t + 1 after token t with certainty, whatever the rounding: `Forced` can
therefore propose right and wrong tokens at will, and verification accepts what it accepts.
"""

import dataclasses
import functools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _forced
from minicpm_jax import config
from minicpm_jax.config.quant import HEAD, PROJECTIONS
from minicpm_jax.core import trees, types
from minicpm_jax.infer import constrained, frspec, rounds
from minicpm_jax.infer import state as state_lib
from minicpm_jax.infer.drafters import base, eagle
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.models import joined, transformer, zoo
from minicpm_jax.nn import sparse_cache, sparse_grid
from minicpm_jax.quant import qtensor, tree
from pallas_kernels.sparse_topk import xla as topk_xla

QUANT = {
  "bf16": None,
  "int4": ("int4", 128),
  "int4_head": ("int4", 128),  # the head too, for the draft as well
  "ternary": ("ternary", -1),
}
TILE = 128  # outputs of the kernels' tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Of a run: contexts in tokens, tree sizes, dispatches in one timing, timings."""

  model: config.ModelConfig
  short: int = 1024
  long: tuple[int, ...] = (32768, 131072)
  prompt: int = 32768
  chunk: int = 2048
  room: int = 1024  # slots behind a context
  nodes: dict[str, tuple[int, ...]] = dataclasses.field(
    default_factory=lambda: {
      "bf16": (4, 8, 12, 16, 32),
      "int4": (12, 32),
      "int4_head": (12,),
      "ternary": (12,),
    }
  )
  group: int | None = None  # of int4; None = 128
  calls: int = 24
  repeats: int = 3


def sizes(shape: str) -> Sizes:
  sparse = config.SparseAttentionConfig()
  if shape == "minicpm4_8b":
    cfg = zoo.minicpm4_8b(dtype="bf16", param_dtype="bf16", scan_layers=False, sparse=sparse)
    return Sizes(model=cfg)
  if shape != "tiny":
    raise ValueError(f"--shape: found {shape!r}, expected 'minicpm4_8b' or 'tiny' with --suite=gpu")
  sparse = dataclasses.replace(sparse, window_size=64, topk=4, dense_len=128)
  cfg = config.ModelConfig(
    name="tiny",
    vocab_size=160,
    model_dim=64,
    mlp_dim=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=4096,
    tie_embeddings=False,
    scan_layers=False,
    sparse=sparse,
  )
  more = dict(short=64, long=(256,), prompt=192, chunk=64, room=128, calls=2, repeats=1, group=32)
  return Sizes(model=cfg, nodes=dict.fromkeys(QUANT, (12,)), **more)


# --- Weights and contexts ------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _noise(salt: Any, size: Any, *, shape: tuple[int, ...], dtype: Any) -> Any:
  """Uniform in +-size, or random bytes: a hash of the place, much cheaper than jax.random."""
  place, stride = jnp.zeros(shape, jnp.uint32) + salt * jnp.uint32(0x9E3779B9), 1
  for axis in range(len(shape) - 1, -1, -1):
    at = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    place, stride = place + at * jnp.uint32(stride), stride * shape[axis] % 2**32
  x = place * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 15)) * jnp.uint32(0xC2B2AE35)
  x = (x ^ (x >> 13)) * jnp.uint32(0x27D4EB2F)
  x ^= x >> 16
  if dtype == jnp.uint8:
    return x.astype(jnp.uint8)
  unit = (x >> 8).astype(jnp.float32) * (2.0**-23) - 1.0
  return (unit * size).astype(dtype)


def _random_leaf(salt: int, path: Any, leaf: Any) -> Any:
  name, shape = jax.tree_util.keystr(path), leaf.shape
  if "'o'" in name or "'down'" in name:
    small, num_in = 1e-3, math.prod(shape[:-1])  # branches that cannot outvote the embedding
  else:
    small, num_in = 1.0, shape[0]
  if name.endswith(".scale"):  # of codes; their own deviation is about 4.6, or 0.8 of ternary ones
    return jnp.full(shape, small * 0.2 * 4096**-0.5, leaf.dtype)
  if len(shape) == 1:
    return jnp.ones(shape, leaf.dtype)
  size = 1.7 * small * (1.0 if "embedding" in name else num_in**-0.5)
  return _noise(np.uint32(salt), np.float32(size), shape=shape, dtype=leaf.dtype)


def _made(abstract: Any) -> Any:
  leaves, form = jax.tree_util.tree_flatten_with_path(abstract)
  return form.unflatten([_random_leaf(i, *leaf) for i, leaf in enumerate(leaves)])


def weights(size: Sizes, kind: str) -> tuple[config.ModelConfig, types.Params, Any, types.Params]:
  """(target's config, parameters, draft's config, parameters) in the form of `for_decoding`."""
  cfg, quant, has_low_head = size.model, None, kind.endswith("_head")
  if QUANT[kind] is not None:
    scheme, group = QUANT[kind]
    group = size.group or group if group > 0 else group
    more = dict(weights="packed", scale_dtype="f32")
    include = (PROJECTIONS, HEAD) if has_low_head else (PROJECTIONS,)
    quant = config.QuantConfig(scheme=scheme, group_size=group, include=include, **more)
  if has_low_head:  # whole tiles of outputs: nothing is padded in a step
    cfg = dataclasses.replace(cfg, vocab_multiple=TILE)
  cfg = dataclasses.replace(cfg, quant=quant)
  shapes, _ = transformer.abstract_params(transformer.Transformer(cfg))
  params = _made(jax.eval_shape(lambda p: joined.join_projections(cfg, p), shapes))
  after = jax.jit(lambda table_VD: jnp.roll(table_VD, 1, axis=0).T)
  params["lm_head"]["kernel"] = after(params["embed"]["embedding"])
  if has_low_head:
    params = tree.quantize_head(params, quant.scheme, quant.group_size)
  draft_cfg = draft_lib.for_target(cfg, "minicpm", window_size=1024)
  if quant is not None:
    draft_cfg = draft_lib.quantized(draft_cfg, quant.group_size, "packed", scheme=quant.scheme)
  draft = _made(draft_lib.abstract_params(draft_cfg)[0])
  wide = lambda qt: qt.replace(scale=qt.scale.astype(jnp.float32))  # noqa: E731
  draft = {"model": tree.map_qtensors(wide, draft), "head_DR": None, "ids_R": None}
  return cfg, params, draft_cfg, draft


def with_fr(params: base.Params, vocab_size: int, share: float = 0.25) -> base.Params:
  """The same with FR-Spec: the draft scores `share` of the vocabulary, ids that are random."""
  head_DV, num = params.target["lm_head"]["kernel"], int(share * vocab_size)
  if qtensor.is_qtensor(head_DV) and num > TILE:
    num = num // TILE * TILE
  ids_R = np.random.default_rng(0).permutation(vocab_size)[:num]
  ids_R = np.sort(ids_R).astype(np.int32)
  head_DR = jax.jit(lambda head_DV: frspec.fr_head(head_DV, ids_R))(head_DV)
  return params._replace(draft=params.draft | {"head_DR": head_DR, "ids_R": jnp.asarray(ids_R)})


def context(model: Any, drafter: Any, params: base.Params, length: int, slots: int) -> Any:
  """The engine's state with `length` committed tokens of random keys in one row that decodes."""
  state = state_lib.init_state(model, drafter, params, 1, slots)
  salts = iter(range(10**6, 2 * 10**6))

  def noise(x: Any) -> Any:
    return _noise(np.uint32(next(salts)), np.float32(1.7), shape=x.shape, dtype=x.dtype)

  cache = state.cache
  cache = cache.replace(k=jax.tree.map(noise, cache.k), v=jax.tree.map(noise, cache.v))
  for level, scale in sparse_cache.LEVELS.items() if cache.fine is not None else ():
    made = functools.partial(_compressed, rule=sparse_grid.rule_of(model.cfg.sparse), scale=scale)
    cache = cache.replace(**{level: jax.tree.map(made, cache.k, getattr(cache, level))})
  full = lambda value, dtype: jnp.full((1,), value, dtype)  # noqa: E731
  return state.replace(
    cache=cache.replace(length=full(length, jnp.int32)),
    draft=_forced.with_context(state.draft, length, noise),
    root_B=full(5, jnp.int32),
    is_live_B=full(True, bool),
    limit_B=full(2**30, jnp.int32),
  )


@functools.partial(jax.jit, static_argnames=("rule", "scale"))
def _compressed(k_BSKH: Any, old: Any, *, rule: Any, scale: int) -> Any:
  keys = topk_xla.compress(k_BSKH, rule, scale).astype(old.dtype)
  return jax.lax.dynamic_update_slice_in_dim(old, keys[:, : old.shape[1]], 0, axis=1)


def dense(cfg: config.ModelConfig) -> config.ModelConfig:
  return dataclasses.replace(cfg, sparse=None)


def bytes_a_step(program: "Program") -> int:
  """Of everything that a plain step must read: parameters but the input embedding, keys, values."""
  cfg, target = program.model.cfg, program.params.target
  width = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim
  width *= jnp.dtype(types.dtype_of(cfg.dtype)).itemsize
  return trees.nbytes(target) - trees.nbytes(target["embed"]) + width * program.length


# --- Programs ------------------------------------------------------------------------------------


class Program:
  """`rounds.run` of one drafter on one context, compiled by whoever asks first."""

  def __init__(self, size: Sizes, cfg, params, drafter, length: int, num_rounds: int = 1):
    self.model, self.drafter, self.params = transformer.Transformer(cfg), drafter, params
    self.size, self.length, self.slots = size, length, -(-(length + size.room) // 1024) * 1024
    self.num_rounds = num_rounds
    is_long = cfg.sparse is not None and length >= cfg.sparse.dense_len
    state = jax.eval_shape(lambda p: context(self.model, drafter, p, length, self.slots), params)
    self._lowered = rounds.run.lower(
      *(self.model, drafter, params, state),
      span=self.slots,
      rounds=num_rounds,
      known=rounds.Known(is_bare=True, is_long=is_long),
    )

  def compile(self) -> float:
    began = time.perf_counter()
    self.run = self._lowered.compile()
    return time.perf_counter() - began

  def time(self, pattern: tuple[int, ...] = (1, 1)) -> tuple[float, float]:
    """(seconds a round, tokens a round): the median of runs, host one answer behind."""
    state = context(self.model, self.drafter, self.params, self.length, self.slots)
    state = state.replace(draft=_forced.with_pattern(state.draft, pattern))
    state, answer = self.run(self.params, state)
    jax.block_until_ready(answer)
    taken, tokens, calls = [], 0, max(1, self.size.calls // self.num_rounds)
    for _ in range(self.size.repeats):
      began, before = time.perf_counter(), None
      for _ in range(calls):
        state, answer = self.run(self.params, state)
        tokens += 0 if before is None else _count(before)
        before = answer
      tokens += _count(before)
      taken.append((time.perf_counter() - began) / (calls * self.num_rounds))
    num_rounds = self.size.repeats * calls * self.num_rounds
    return statistics.median(taken), tokens / num_rounds


class Chunk:
  """`rounds.prefill` of the `size.chunk` tokens of a prompt that end with its token `length`."""

  def __init__(self, size: Sizes, cfg, params, length: int):
    self.model, self.params, self.drafter = transformer.Transformer(cfg), params, base.NoDrafter()
    self.size, self.length, self.num = size, length, size.chunk
    self.slots = -(-(length + size.repeats * self.num) // 1024) * 1024
    one, mask_1W = np.int32(1), jnp.full((1, constrained.mask_width(cfg.vocab_size)), -1, jnp.int32)
    tokens_1C = jnp.arange(self.num, dtype=jnp.int32)[None] % cfg.vocab_size
    total = np.int32(self.slots)  # further chunks follow
    self._args = (tokens_1C, np.int32(0), np.int32(self.num), total, one, mask_1W)
    is_long = cfg.sparse is not None and self.slots >= cfg.sparse.dense_len
    self._lowered = rounds.prefill.lower(
      *(self.model, self.drafter, params, jax.eval_shape(self._context, params), *self._args),
      span=self.slots,
      known=rounds.Known(is_long=is_long),
    )

  def _context(self, params: Any) -> Any:
    return context(self.model, self.drafter, params, self.length - self.num, self.slots)

  compile = Program.compile

  def time(self) -> float:
    """Seconds of a chunk, the median of those that follow the first."""
    state, taken = self._context(self.params), []
    for i in range(1 + self.size.repeats):
      began = time.perf_counter()
      state, answer = self.run(self.params, state, *self._args)
      if jax.device_get(answer.is_bad_B).any():
        raise FloatingPointError("found non-finite logits, expected finite")
      taken += [time.perf_counter() - began] if i else []
    return statistics.median(taken)


def _count(answer: Any) -> int:
  tokens, is_bad = jax.device_get((answer.tokens_BRA, answer.is_bad_B))
  if is_bad.any():
    raise FloatingPointError("found non-finite logits, expected finite")
  return int((tokens != state_lib.NO_TOKEN).sum())


class DraftStep:
  """Drafting a tree of `num_levels` levels and committing a path, without the target."""

  def __init__(self, size: Sizes, cfg, params, draft_cfg, num_levels: int):
    self.size, self.params = size, params
    self.drafter = eagle.EagleDrafter(draft_cfg, num_levels=num_levels)
    self.make = functools.partial(
      context, transformer.Transformer(cfg), self.drafter, length=size.short, slots=2 * size.short
    )
    state = jax.eval_shape(lambda p: self.make(p).draft, params)
    self._lowered = jax.jit(self._step, donate_argnums=1).lower(params, state)

  def _step(self, params: Any, state: Any) -> tuple[Any, Any]:
    A, D = self.drafter.num_levels + 1, self.drafter.cfg.layer.model_dim
    length_B = jnp.full((1,), self.size.short, jnp.int32)
    tree_, state = self.drafter.draft(params, state, jnp.ones((1,), jnp.int32), length_B)
    new = base.Committed(
      tokens_BT=tree_.tok_BP[:, :A],
      next_BT=tree_.tok_BP[:, :A],
      features_BTD=jnp.ones((1, A, D), state.feature_BD.dtype),
      start_B=length_B,
      num_B=jnp.ones((1,), jnp.int32),
    )
    return tree_.tok_BP, self.drafter.commit(params, state, new)

  compile = Program.compile

  def time(self) -> float:
    state, taken = self.make(self.params).draft, []
    for i in range(1 + self.size.repeats):
      began = time.perf_counter()
      for _ in range(self.size.calls):
        tokens, state = self.run(self.params, state)
      jax.block_until_ready(tokens)
      taken += [(time.perf_counter() - began) / self.size.calls] if i else []
    return statistics.median(taken)
