"""Which server of a sparse op is given the caller's config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_attention import api as attention
from pallas_kernels.sparse_attention import mosaic_gpu as attention_mosaic
from pallas_kernels.sparse_attention import mosaic_tpu as attention_tpu
from pallas_kernels.sparse_attention import triton as attention_triton
from pallas_kernels.sparse_attention import vjp
from pallas_kernels.sparse_attention import xla as attention_xla
from pallas_kernels.sparse_decode import api as decode
from pallas_kernels.sparse_decode import mosaic_gpu as decode_mosaic
from pallas_kernels.sparse_decode import mosaic_tpu as decode_tpu
from pallas_kernels.sparse_decode import triton as decode_triton
from pallas_kernels.sparse_topk import api as topk
from pallas_kernels.sparse_topk import mosaic_gpu as topk_mosaic
from pallas_kernels.sparse_topk import mosaic_tpu as topk_tpu
from pallas_kernels.sparse_topk import rule, xla
from pallas_kernels.sparse_topk import triton as topk_triton

T, BLOCK = 32, 16  # more queries than those whose blocks are gathered
RULE = rule.Rule(kernel_size=8, kernel_stride=4, block_size=BLOCK, local_blocks=1, topk=1)


def draw(*shape):
  return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def attend(config):
  ids = jnp.arange(T, dtype=jnp.int32)[None, None, :, None] // BLOCK
  q, k, v = draw(1, T, 2, 8), draw(1, T, 1, 8), draw(1, T, 1, 8)
  return attention.attend_blocks(q, k, v, ids, block_size=BLOCK, num_local=1, config=config)


def select(config):
  q, fine = draw(1, 3 * BLOCK, 2, 8), draw(1, RULE.num_windows(3 * BLOCK), 1, 8)
  return topk.select_blocks(q, fine, fine, rule=RULE, num_slots=3 * BLOCK, config=config)


def read(config):
  ids = jnp.zeros((1, 1, 1, 1), jnp.int32)
  k, v = draw(1, T, 1, 8), draw(1, T, 1, 8)
  return decode.decode_blocks(draw(1, 1, 2, 8), k, v, ids, block_size=BLOCK, config=config)


# op: call, then the module, function and class of each server with tiles of its own
OPS = {
  "sparse_attention": (
    attend,
    (attention_mosaic, "attend_mosaic_gpu", attention_mosaic.MosaicGpuConfig),
    (attention_triton, "attend_triton", attention_triton.TritonConfig),
    (attention_tpu, "attend_tpu", attention_tpu.TpuConfig),
    (vjp, "attend_xla", attention_xla.XlaConfig),
  ),
  "sparse_topk": (
    select,
    (topk_mosaic, "select_mosaic_gpu", topk_mosaic.MosaicGpuConfig),
    (topk_triton, "select_triton", topk_triton.TritonConfig),
    (topk_tpu, "select_tpu", topk_tpu.TpuConfig),
    (xla, "select_xla", xla.XlaConfig),
  ),
  "sparse_decode": (
    read,
    (decode_mosaic, "decode_mosaic_gpu", decode_mosaic.MosaicGpuConfig),
    (decode_triton, "decode_triton", decode_triton.TritonConfig),
    (decode_tpu, "decode_tpu", attention_tpu.TpuConfig),
  ),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_a_server_that_auto_tries_takes_no_config_of_another(op, backend, monkeypatch):
  """Each device's own server refuses, xla serves; the values are those without a config."""
  call, *servers = OPS[op]
  expected = call(None)
  given = {}

  def watch(module, name, is_kept):
    original = getattr(module, name)

    def server(*args, **options):
      given[name] = options["config"] if "config" in options else args[-1]
      if is_kept:
        return original(*args, **options)
      raise NotImplementedError("no such device here")

    monkeypatch.setattr(module, name, server)

  for module, name, _ in servers:
    watch(module, name, is_kept=module in (vjp, xla))
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  tried = [s for s in servers if ("tpu" in s[1]) == (backend == "tpu") or s[0] in (vjp, xla)]
  for _, _, config_class in servers:
    given.clear()
    config = config_class()
    found = call(config)
    assert given == {name: config if kind is config_class else None for _, name, kind in tried}
    for a, b in zip(found, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
