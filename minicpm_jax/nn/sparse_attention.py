"""InfLLM v2 trainable sparse attention (MiniCPM4 section 2.1, arXiv 2509.24663).

Stage 0 averages keys over windows, stage 1 ranks blocks of keys for every query and key head, stage
2 is one softmax over the tokens of the chosen blocks; no parameters. Both published selection rules
and both normalisers are in `SparseAttentionConfig`. The selection is a constant for gradients and
carries the name `SELECTION`, which remat policies save.

Documents of a packed row share one grid of windows and blocks when they start at multiples of
`cfg.alignment` (data.align). Rows where they do not are served by implementation "ref", which holds
T x S arrays; under jit, where nobody can look, the others answer such documents with NaN.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from minicpm_jax.config import SparseAttentionConfig
from minicpm_jax.nn import sparse_grid
from pallas_kernels.common import spec
from pallas_kernels.flash import api as flash
from pallas_kernels.sparse_attention import api as sparse_attention
from pallas_kernels.sparse_attention import ref as attention_ref
from pallas_kernels.sparse_decode import api as sparse_decode
from pallas_kernels.sparse_topk import api as sparse_topk
from pallas_kernels.sparse_topk import nodes as nodes_lib
from pallas_kernels.sparse_topk import ref as topk_ref
from pallas_kernels.sparse_topk import rule as rules
from pallas_kernels.sparse_topk import xla as topk_xla

SELECTION = "sparse_selection"
Implementation = spec.Implementation
HostOrDevice = Array | np.ndarray


# --- The stages ----------------------------------------------------------------------------------


def compress(
  k_BSKH: Float[Array, "B S K H"],
  cfg: SparseAttentionConfig,
  level: Literal["fine", "coarse"],
  segment_ids: sparse_grid.Ids | None = None,
) -> Float[Array, "B C K H"]:
  """Means of the complete windows of a level (section 4); 0 where a window crosses documents."""
  rule, scale = sparse_grid.rule_of(cfg), 1 if level == "fine" else rules.COARSE
  keys_BCKH = topk_xla.compress(k_BSKH, rule, scale)
  if segment_ids is None:
    return keys_BCKH
  first_C = scale * rule.kernel_stride * np.arange(keys_BCKH.shape[1])
  ids_BS = jnp.asarray(segment_ids)
  head_BC, tail_BC = ids_BS[:, first_C], ids_BS[:, first_C + scale * rule.kernel_size - 1]
  is_one_BC = (head_BC == tail_BC) & (head_BC != 0)
  return jnp.where(is_one_BC[:, :, None, None], keys_BCKH, 0)


def select_from_keys(
  q_BTNH: Float[Array, "B T N H"],
  fine_BFKH: Float[Array, "B F K H"],
  coarse_BCKH: Float[Array, "B C K H"],
  cfg: SparseAttentionConfig,
  grid: sparse_grid.Grid,
  num_slots: int,
  implementation: Implementation = "auto",
  nodes: nodes_lib.Nodes | None = None,
) -> tuple[Int[Array, "B K T W"], Int[Array, "B K T"]]:
  """(ids on the row's grid, counts); dense documents list all their blocks.

  nodes: the queries are those of a draft tree, on a grid with its positions.
  """
  rule = sparse_grid.rule_of(cfg)

  # A grid's offset is that of a device's first query: nodes take the row's committed tokens along.
  behind = None if nodes is None else (grid.offset, jax.lax.stop_gradient(nodes))
  leaves, structure = jax.tree.flatten(behind)

  def local(q, fine, coarse, *rest):
    *leaves, grid = rest
    behind = jax.tree.unflatten(structure, leaves)
    q_offset, nodes = (grid.offset, None) if behind is None else behind
    return sparse_topk.select_blocks(
      q,
      fine,
      coarse,
      rule=rule,
      num_slots=num_slots,
      q_offset=q_offset,
      start_BT=grid.start_BT,
      implementation=implementation,
      nodes=nodes,
    )

  stop = jax.lax.stop_gradient
  args = (stop(q_BTNH), stop(fine_BFKH), stop(coarse_BCKH), *leaves)
  names = (sparse_grid.QUERIES, sparse_grid.KEYS, sparse_grid.KEYS)
  names += sparse_grid.NODES if leaves else ()
  out_names = (sparse_grid.LISTS, sparse_grid.COUNTS)
  ids, counts = sparse_grid.on_mesh(local, grid, args, names, out_names)
  if grid.is_dense_BT is None:
    return ids, counts
  width = max(rule.num_selected, min(rule.num_blocks(num_slots), rule.num_blocks(cfg.dense_len)))
  pos_BT = grid.pos_BT if nodes is None else nodes.pos_BT
  every, num_every = topk_xla.all_blocks(pos_BT, grid.start_BT, rule, width)
  ids = jnp.pad(ids, ((0, 0), (0, 0), (0, 0), (0, width - ids.shape[3])), constant_values=-1)
  is_dense = grid.is_dense_BT[:, None, :]
  ids = jnp.where(is_dense[..., None], every[:, None], ids)
  return ids, jnp.where(is_dense, num_every[:, None], counts)


def attend_blocks(
  q_BTNH: Float[Array, "B T N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKV: Float[Array, "B S K V"],
  ids_BKTW: Int[Array, "B K T W"],
  counts_BKT: Int[Array, "B K T"],
  cfg: SparseAttentionConfig,
  grid: sparse_grid.Grid,
  implementation: Implementation = "auto",
) -> Float[Array, "B T N V"]:
  """Stage 2 over lists made by `select_from_keys` on this grid (section 9).

  A few queries against a cache go to `sparse_decode`, which reads it where it lies.
  """
  is_cached = grid.is_cached or grid.base_B is not None
  is_decoding = is_cached and q_BTNH.shape[1] <= sparse_attention.FEW

  def local(q, k, v, ids, counts, grid):
    more = dict(block_size=cfg.block_size, q_offset=grid.offset, start_BT=grid.start_BT)
    more["implementation"] = implementation
    if is_decoding:
      return (sparse_decode.decode_blocks(q, k, v, ids, base_B=grid.base_B, **more)[0],)
    if grid.base_B is not None:
      k, v = _roll(k, grid.base_B), _roll(v, grid.base_B)
    more["num_local"] = sparse_grid.rule_of(cfg).num_local
    return (sparse_attention.attend_blocks(q, k, v, ids, counts, **more)[0],)

  args = (q_BTNH, k_BSKH, v_BSKV, ids_BKTW, counts_BKT)
  keys, lists = sparse_grid.KEYS, sparse_grid.LISTS
  names = (sparse_grid.QUERIES, keys, keys, lists, sparse_grid.COUNTS)
  (out_BTNV,) = sparse_grid.on_mesh(local, grid, args, names, (sparse_grid.QUERIES,))
  if grid.is_off_BT is None:
    return out_BTNV
  return jnp.where(grid.is_off_BT[:, :, None, None], jnp.nan, out_BTNV)


def _roll(x_BSKH, base_B):
  """x[b, base_b + s] at s; what lies past the end repeats the last slot (nothing looks there)."""
  slots_BS = base_B[:, None] + jnp.arange(x_BSKH.shape[1], dtype=jnp.int32)[None, :]
  slots_BS = jnp.minimum(slots_BS, x_BSKH.shape[1] - 1)
  return jax.vmap(lambda x_SKH, at_S: x_SKH[at_S])(x_BSKH, slots_BS)


def sparse_attend(
  q_BTNH: Float[Array, "B T N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKV: Float[Array, "B S K V"],
  cfg: SparseAttentionConfig,
  grid: sparse_grid.Grid,
  compressed: tuple[Float[Array, "B F K H"], Float[Array, "B C K H"]] | None = None,
  nope: tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]] | None = None,
  *,
  implementation: Implementation = "auto",
) -> Float[Array, "B T N V"]:
  """All stages on a grid. `compressed`: cached (fine, coarse); `nope`: (q, k) before RoPE."""
  q_score, k_score = (q_BTNH, k_BSKH) if nope is None else nope
  if compressed is None:
    k_score = jax.lax.stop_gradient(k_score)
    compressed = tuple(compress(k_score, cfg, level) for level in ("fine", "coarse"))
  S = k_BSKH.shape[1]
  ids, counts = select_from_keys(q_score, *compressed, cfg, grid, S, implementation)
  ids, counts = checkpoint_name(ids, SELECTION), checkpoint_name(counts, SELECTION)
  return attend_blocks(q_BTNH, k_BSKH, v_BSKV, ids, counts, cfg, grid, implementation)


# --- Public --------------------------------------------------------------------------------------


def select_blocks(
  q_BTNH: Float[HostOrDevice, "B T N H"],
  k_BSKH: Float[HostOrDevice, "B S K H"],
  cfg: SparseAttentionConfig,
  *,
  q_offset: sparse_grid.Scalar = 0,
  segment_ids: sparse_grid.Ids | None = None,
  implementation: Implementation = "auto",
) -> tuple[Int[Array, "B K T W"], Int[Array, "B K T"]]:
  """(block ids, ascending, -1 = none; counts) of every query and key head (sections 4 to 7).

  Query t stands at slot q_offset + t. Block ids count from the start of the query's document.
  segment_ids: of the S slots, 0 = padding. `dense_len` plays no part. With `use_nope`, q and k are
  those before RoPE. implementation "auto": what serves the device, "ref" for documents that are
  seen to be off the grid; "ref" holds T x S arrays and takes documents anywhere. Under jit, where
  nobody can look, the queries of documents off the grid get no blocks from the others.
  """
  q_BTNH, k_BSKH = jnp.asarray(q_BTNH), jnp.asarray(k_BSKH)
  q_offset, cfg = _known(q_offset), dataclasses.replace(cfg, dense_len=-1)
  _check_shapes(q_BTNH, k_BSKH, q_offset, segment_ids)
  grid = _grid(q_BTNH, k_BSKH, cfg, q_offset, None, segment_ids)
  if _is_ref(implementation, grid):
    rule = sparse_grid.rule_of(cfg)
    return topk_ref.select_ref(q_BTNH, k_BSKH, grid.pos_BT, grid.start_BT, rule)
  compressed = [compress(k_BSKH, cfg, level) for level in ("fine", "coarse")]
  S = k_BSKH.shape[1]
  ids, counts = select_from_keys(q_BTNH, *compressed, cfg, grid, S, implementation)
  first_BT = jnp.where(grid.start_BT < rules.NOWHERE, grid.start_BT // cfg.block_size, 0)
  ids = jnp.where(ids >= 0, ids - first_BT[:, None, :, None], -1)
  if grid.is_off_BT is None:
    return ids, counts
  is_off = grid.is_off_BT[:, None]
  return jnp.where(is_off[..., None], -1, ids), jnp.where(is_off, 0, counts)


def infllm_attention(
  q_BTNH: Float[HostOrDevice, "B T N H"],
  k_BSKH: Float[HostOrDevice, "B S K H"],
  v_BSKH: Float[HostOrDevice, "B S K V"],
  cfg: SparseAttentionConfig,
  *,
  q_offset: sparse_grid.Scalar = 0,
  kv_length: sparse_grid.Scalar | None = None,
  segment_ids: sparse_grid.Ids | None = None,
  implementation: Implementation = "auto",
  nope: tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]] | None = None,
  switch: Literal["sequence", "batch"] = "sequence",
) -> Float[Array, "B T N V"]:
  """Causal attention, sparse for sequences of at least `cfg.dense_len` tokens, dense below.

  Query t stands at slot q_offset + t and sees keys up to its own. The length that decides is
  kv_length (default q_offset + T), or that of each document where segment_ids (of the S slots, 0 =
  padding, output 0) are given; `switch` "batch": one long document makes all sparse. Slots at or
  beyond kv_length are unused, and queries there give 0. `nope`: q and k before RoPE, needed with
  `cfg.use_nope`. Gradients reach q, k and v; the selection is a constant (section 11).
  implementation: as in `select_blocks`; a named one that cannot serve the call raises. Where the
  static length makes all dense, "ref" and "xla" are those of dense attention and the sparse
  kernels' names mean "auto".
  """
  q_BTNH, k_BSKH, v_BSKH = jnp.asarray(q_BTNH), jnp.asarray(k_BSKH), jnp.asarray(v_BSKH)
  q_offset, kv_length = _known(q_offset), _known(kv_length)
  _check_shapes(q_BTNH, k_BSKH, q_offset, segment_ids, v_BSKH, kv_length)
  _check_names(implementation, switch)
  if cfg.use_nope:
    _check_nope(nope, q_BTNH, k_BSKH)
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  if 0 in q_BTNH.shape[:2]:  # no backend has a program for nothing
    return jnp.zeros((*q_BTNH.shape[:3], v_BSKH.shape[3]), v_BSKH.dtype)
  length = q_offset + T if kv_length is None else kv_length
  if not (isinstance(length, int) and length >= S):  # 0 * nan is nan: unused slots may hold any
    is_used_BS = jnp.arange(S)[None, :] < jnp.reshape(jnp.asarray(length), (-1, 1))
    clear = lambda x: jnp.where(is_used_BS[:, :, None, None], x, 0)  # noqa: E731
    k_BSKH, v_BSKH = clear(k_BSKH), clear(v_BSKH)
    nope = None if nope is None else (nope[0], clear(nope[1]))
  if sparse_grid.is_always_dense(cfg, length if isinstance(length, int) else S):
    slots_BT = jnp.reshape(jnp.asarray(q_offset), (-1, 1)) + jnp.arange(T)[None, :]
    slots_BT = jnp.broadcast_to(slots_BT, q_BTNH.shape[:2])
    ids_BT = None
    if segment_ids is not None:
      segment_ids = sparse_grid.documents(jnp.asarray(segment_ids))
      ids_BT = jnp.take_along_axis(segment_ids, slots_BT, 1)
    out_BTNV = flash.flash_attention(
      q_BTNH,
      k_BSKH,
      v_BSKH,
      q_offset=q_offset,
      kv_length=kv_length,
      q_segment_ids_BT=ids_BT,
      kv_segment_ids_BS=segment_ids,
      implementation=implementation if implementation in ("ref", "xla") else "auto",
    )
    if kv_length is None:
      return out_BTNV
    is_used_BT = slots_BT < jnp.reshape(jnp.asarray(kv_length), (-1, 1))
    return jnp.where(is_used_BT[:, :, None, None], out_BTNV, 0)
  grid = _grid(q_BTNH, k_BSKH, cfg, q_offset, kv_length, segment_ids, switch)
  if isinstance(length, int) and segment_ids is None:
    grid = grid.replace(is_dense_BT=None)  # the static length has decided: sparse
  nope = nope if cfg.use_nope else None
  if _is_ref(implementation, grid):
    return attend_anywhere(q_BTNH, k_BSKH, v_BSKH, cfg, grid, nope)
  args = (q_BTNH, k_BSKH, v_BSKH, cfg, grid)
  return sparse_attend(*args, nope=nope, implementation=implementation)


def attend_anywhere(
  q_BTNH: Float[Array, "B T N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKV: Float[Array, "B S K V"],
  cfg: SparseAttentionConfig,
  grid: sparse_grid.Grid,
  nope: tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]] | None = None,
) -> Float[Array, "B T N V"]:
  """The definition with T x S arrays; documents may start at any slot."""
  q_score, k_score = jax.lax.stop_gradient((q_BTNH, k_BSKH) if nope is None else nope)
  rule, (pos_BT, start_BT) = sparse_grid.rule_of(cfg), (grid.pos_BT, grid.start_BT)
  ids, _ = topk_ref.select_ref(q_score, k_score, pos_BT, start_BT, rule)
  S = k_BSKH.shape[1]
  mask_BKTS = attention_ref.block_mask(ids, pos_BT, start_BT, S, cfg.block_size)
  if grid.is_dense_BT is not None:
    slots_11S = jnp.arange(S)[None, None, :]
    past_BTS = (slots_11S <= pos_BT[:, :, None]) & (slots_11S >= start_BT[:, :, None])
    mask_BKTS = mask_BKTS | (past_BTS & grid.is_dense_BT[:, :, None])[:, None]
  return attention_ref.attend_ref(q_BTNH, k_BSKH, v_BSKV, mask_BKTS)[0]


def _known(number: sparse_grid.Scalar | None) -> sparse_grid.Scalar | None:
  """numpy's integers as Python's: checked, and static for what follows."""
  return int(number) if isinstance(number, np.integer) else number


def _grid(q_BTNH, k_BSKH, cfg, q_offset, kv_length, segment_ids, switch="sequence"):
  (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
  return sparse_grid.make_grid(
    cfg, T, S, B, q_offset=q_offset, kv_length=kv_length, segment_ids_BS=segment_ids, switch=switch
  )


def _is_ref(implementation: Implementation, grid: sparse_grid.Grid) -> bool:
  """True for "ref" and, with "auto", for documents that are seen to be off the grid."""
  if implementation == "ref":
    return True
  if grid.is_off_BT is None or isinstance(grid.is_off_BT, jax.core.Tracer):
    return False
  is_off = bool(jnp.any(grid.is_off_BT))
  if is_off and implementation != "auto":
    raise NotImplementedError(
      "segment_ids: found documents off the grid, expected starts at multiples of "
      "cfg.alignment (pack with data.align), or implementation 'ref'"
    )
  return is_off


def _check_nope(nope, q_BTNH, k_BSKH) -> None:
  found = None if nope is None else tuple(np.shape(x) for x in nope)
  expected = (q_BTNH.shape, k_BSKH.shape)
  if found != expected:
    raise ValueError(
      f"nope: found shapes {found}, expected (q, k) before RoPE of shapes {expected}, because "
      "cfg.use_nope is set"
    )


def _check_shapes(q_BTNH, k_BSKH, q_offset, segment_ids, v_BSKH=None, kv_length=None) -> None:
  for name, x in (("q", q_BTNH), ("k", k_BSKH), ("v", v_BSKH)):
    if x is not None and x.ndim != 4:
      raise ValueError(f"{name}: found shape {x.shape}, expected [batch, tokens, heads, width]")
  (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
  if K == 0 or H == 0:
    raise ValueError(f"k: found {K} heads of width {H}, expected 1 and more")
  if k_BSKH.shape != (B, S, K, H):
    raise ValueError(f"k: found shape {k_BSKH.shape}, expected {(B, S, K, H)}, by q")
  if v_BSKH is not None and v_BSKH.shape[:3] != (B, S, K):
    raise ValueError(f"v: found shape {v_BSKH.shape}, expected {(B, S, K)} and a width, by k")
  if N % K:
    raise ValueError(f"q: found {N} heads, expected a multiple of the {K} key heads")
  if T > S:
    raise ValueError(f"k: found {S} keys, expected at least as many as the {T} queries")
  bounds = (("q_offset", q_offset, S - T), ("kv_length", kv_length, S))
  for name, number, most in bounds:
    is_integer = number is None or jnp.issubdtype(jnp.result_type(number), jnp.integer)
    if not is_integer or np.shape(number) not in ((), (B,)):
      raise ValueError(f"{name}: found {number}, expected an integer, or {B}: one a row")
    if isinstance(number, jax.core.Tracer) or not getattr(number, "is_fully_addressable", True):
      continue
    known = 0 if number is None else np.asarray(number)
    if np.any((known < 0) | (known > most)):
      raise ValueError(f"{name}: found {number}, expected 0..{most} ({S} keys, {T} queries)")
  if segment_ids is None:
    return
  if np.shape(segment_ids) != (B, S):
    raise ValueError(
      f"segment_ids: found shape {np.shape(segment_ids)}, expected {(B, S)}, of the keys"
    )
  if not jnp.issubdtype(dtype := jnp.asarray(segment_ids).dtype, jnp.integer):
    raise ValueError(f"segment_ids: found {dtype}, expected integers")


def _check_names(implementation: str, switch: str) -> None:
  """Also where dense attention runs, which has none of these names."""
  if implementation not in (names := get_args(Implementation)):
    raise NotImplementedError(f"implementation: found {implementation!r}, expected one of {names}")
  if switch not in ("sequence", "batch"):
    raise ValueError(f"switch: found {switch!r}, expected 'sequence' or 'batch'")
