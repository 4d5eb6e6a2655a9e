"""Block selection behind one function; see `select_blocks`."""

import jax.numpy as jnp

from pallas_kernels.common import spec
from pallas_kernels.sparse_topk import mosaic_gpu, mosaic_tpu, triton, xla
from pallas_kernels.sparse_topk import nodes as nodes_lib
from pallas_kernels.sparse_topk import rule as rules

Config = xla.XlaConfig | triton.TritonConfig | mosaic_tpu.TpuConfig | mosaic_gpu.MosaicGpuConfig


def select_blocks(
  q_BTNH,
  fine_BFKH,
  coarse_BCKH,
  *,
  rule: rules.Rule,
  num_slots: int,
  q_offset=0,
  start_BT=None,
  implementation: spec.Implementation = "auto",
  config: Config | None = None,
  interpret: bool | None = None,
  nodes: nodes_lib.Nodes | None = None,
):
  """Blocks that each query attends to, from compressed keys (MiniCPM4 section 2.1.2).

  fine_BFKH, coarse_BCKH: means of k at [s*j, s*j + p) and at 4 times both (`xla.compress`); entries
    that are incomplete in a query's past are never read. The coarse ones serve `rule.lse` "coarse".
  q_offset: int or int32 [] or [B], position of the first query; below 0 is padding.
  start_BT: position of the first token of the query's document, a multiple of `rule.alignment`
    (`rules.NOWHERE` = padding, which takes no block); None = 0.
  num_slots: bound of all positions, static.
  nodes: of a draft tree: positions and each query's own windows; q_offset is then the number of
    committed tokens. "triton" and "xla" serve it, reading common keys once for a row's queries.

  Returns ids [B, K, T, W] int32 on the row's grid, ascending, -1 = none (at the end), and counts
  [B, K, T]. W = rule.num_selected. Ties go to the lower block. No gradient. Work is
  O(T * num_slots / kernel_stride) with the causal half skipped when q_offset is a Python int;
  memory is one chunk's logits. `config` is of the implementation of its class; others that `auto`
  tries take their own. `interpret` is of the Mosaic ones: None = on a CPU.
  """
  tiles = spec.configs(
    "sparse_topk",
    implementation,
    config,
    xla=xla.XlaConfig,
    mosaic_gpu=mosaic_gpu.MosaicGpuConfig,
    triton=triton.TritonConfig,
    mosaic_tpu=mosaic_tpu.TpuConfig,
  )
  spec.check_shape("sparse_topk", "q", q_BTNH, (None,) * 4)
  B, T, N, H = q_BTNH.shape
  spec.check_shape("sparse_topk", "fine", fine_BFKH, (B, None, None, H))
  K = fine_BFKH.shape[2]
  spec.check_shape("sparse_topk", "coarse", coarse_BCKH, (B, None, K, H))
  spec.check_shape("sparse_topk", "start", start_BT, (B, T))
  spec.check_heads("sparse_topk", N, K)
  if B * T == 0:  # no backend has a program for nothing
    shape = (B, K, T)
    return jnp.zeros((*shape, rule.num_selected), jnp.int32), jnp.zeros(shape, jnp.int32)
  start_BT = jnp.zeros((B, T), jnp.int32) if start_BT is None else start_BT
  args = (q_BTNH, fine_BFKH, coarse_BCKH, q_offset, start_BT, rule, num_slots)
  if nodes is not None:
    own = [own.keys_BTRKH.shape[:2] for own in (nodes.fine, nodes.coarse)]
    for name, found in zip(("pos_BT", "fine", "coarse"), (nodes.pos_BT.shape, *own), strict=True):
      if found != (B, T):
        raise ValueError(f"nodes.{name}: found {found} rows and nodes, expected {(B, T)}, by q")
    serve = {
      "xla": lambda: xla.select_xla(*args, tiles["xla"], nodes),
      "triton": lambda: triton.select_triton(*args, tiles["triton"], nodes),
    }
    return spec.dispatch("sparse_topk of a tree's nodes", implementation, serve)
  return spec.dispatch(
    "sparse_topk",
    implementation,
    {
      "xla": lambda: xla.select_xla(*args, tiles["xla"]),
      "triton": lambda: triton.select_triton(*args, tiles["triton"]),  # the faster on an H200
      "mosaic_gpu": lambda: mosaic_gpu.select_mosaic_gpu(
        *args, tiles["mosaic_gpu"], interpret=interpret
      ),
      "mosaic_tpu": lambda: mosaic_tpu.select_tpu(*args, tiles["mosaic_tpu"], interpret=interpret),
    },
  )
