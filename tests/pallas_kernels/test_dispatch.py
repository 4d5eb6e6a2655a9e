"""Which server of an op is given the caller's config."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import gpu, interpret
from pallas_kernels.fp8_gemm import api as fp8
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
from pallas_kernels.w4a16_gemm import api as w4a16

T, BLOCK = 32, 16  # more queries than those whose blocks are gathered
RULE = rule.Rule(kernel_size=8, kernel_stride=4, block_size=BLOCK, local_blocks=1, topk=1)


def draw(*shape):
  return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def attend(config, **options):
  ids = jnp.arange(T, dtype=jnp.int32)[None, None, :, None] // BLOCK
  q, k, v = draw(1, T, 2, 8), draw(1, T, 1, 8), draw(1, T, 1, 8)
  sizes = dict(block_size=BLOCK, num_local=1)
  return attention.attend_blocks(q, k, v, ids, **sizes, config=config, **options)


def select(config, **options):
  q, fine = draw(1, 3 * BLOCK, 2, 8), draw(1, RULE.num_windows(3 * BLOCK), 1, 8)
  sizes = dict(rule=RULE, num_slots=3 * BLOCK)
  return topk.select_blocks(q, fine, fine, **sizes, config=config, **options)


def read(config, **options):
  ids = jnp.zeros((1, 1, 1, 1), jnp.int32)
  k, v = draw(1, T, 1, 8), draw(1, T, 1, 8)
  q, sizes = draw(1, 1, 2, 8), dict(block_size=BLOCK)
  return decode.decode_blocks(q, k, v, ids, **sizes, config=config, **options)


def multiply_int4(config, **options):
  codes = jnp.zeros((16, 8), jnp.uint8)
  return w4a16.matmul(draw(2, 32), codes, draw(1, 8), group_size=-1, config=config, **options)


def multiply_fp8(config, **options):
  x, w = (draw(*s).astype(jnp.float8_e4m3fn) for s in ((2, 128), (128, 8)))
  return fp8.matmul(x, draw(2, 1), w, draw(1, 1), config=config, **options)


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


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
def test_a_mosaic_server_is_told_whether_to_interpret(op, implementation, monkeypatch):
  """The call's word, else the config's, else None: the device decides."""
  told = []

  def ask(op, wanted, platform):
    told.append(wanted)
    raise NotImplementedError(platform)

  monkeypatch.setattr(interpret, "is_interpreted", ask)
  call, *servers = OPS[op]
  (kind,) = (kind for _, name, kind in servers if name.endswith(implementation[-3:]))
  pairs = [(None, None), (None, True), (kind(interpret=True), None), (kind(interpret=True), False)]
  for config, wanted in pairs:
    with pytest.raises(NotImplementedError, match=f"^{implementation[-3:]}$"):
      call(config, implementation=implementation, interpret=wanted)
  assert told == [None, True, True, False]


@pytest.mark.parametrize(
  "call, implementation, expected",
  [
    (attend, "xla", "None or pallas_kernels.sparse_attention.xla.XlaConfig"),
    (attend, "gather", "None"),
    (select, "xla", "None or pallas_kernels.sparse_topk.xla.XlaConfig"),
    (read, "triton", "None or pallas_kernels.sparse_decode.triton.TritonConfig"),
    (multiply_int4, "xla", "None"),
    (multiply_fp8, "ref", "None"),
  ],
)
def test_a_named_server_refuses_a_config_of_another(call, implementation, expected):
  """Nothing is tuned by tiles that nobody takes; `auto` wants one that some server takes."""
  config = decode_mosaic.MosaicGpuConfig()
  message = f"config: found {type(config).__module__}.MosaicGpuConfig, expected {expected} with "
  with pytest.raises(TypeError, match=message):
    call(config, implementation=implementation)
  call(None, implementation="auto")
  with pytest.raises(TypeError, match="found builtins.dict, expected None or .* .auto"):
    call({}, implementation="auto")


@pytest.mark.parametrize("module, found", [(None, False), (types.ModuleType("jax_triton"), True)])
def test_triton_is_there_where_it_can_be_imported(monkeypatch, module, found):
  monkeypatch.setitem(sys.modules, "jax_triton", module)  # None: an ImportError
  assert gpu.has_triton() is found


Q, KEYS, IDS = draw(1, T, 2, 8), draw(1, T, 1, 8), jnp.zeros((1, 1, T, 1), jnp.int32)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: attention.attend_blocks(Q, KEYS[..., :4], KEYS, IDS), "k: found .*any, any, 8"),
    (lambda: attention.attend_blocks(Q, KEYS, KEYS[:, 1:], IDS), "v: found .*1, 32, 1, any"),
    (lambda: attention.attend_blocks(Q, KEYS, KEYS, IDS[:, :, 1:]), "ids: found .*1, 1, 32, any"),
    (lambda: attention.attend_blocks(Q, KEYS, KEYS, IDS, IDS), "counts: found .*1, 1, 32.$"),
    (
      lambda: attention.attend_blocks(KEYS, Q, Q, IDS.repeat(2, 1)),
      "q: found 1 heads, expected a multiple of the 2 key heads",
    ),
    (lambda: attention.attend_blocks(Q, KEYS, KEYS, IDS, num_local=-1), "found 64, -1, expected"),
    (lambda: decode.decode_blocks(Q, KEYS, KEYS, IDS[0]), "sparse_decode: ids: found"),
    (lambda: decode.decode_blocks(Q, KEYS, KEYS, IDS, base_B=jnp.zeros(2)), "base: found .*.1.$"),
    (lambda: topk.select_blocks(Q, KEYS[..., :4], KEYS, rule=RULE, num_slots=T), "fine: found"),
    (lambda: topk.select_blocks(Q, KEYS, Q, rule=RULE, num_slots=T), "coarse: found"),
    (lambda: topk.select_blocks(Q[0], KEYS, KEYS, rule=RULE, num_slots=T), "q: found shape"),
  ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(call, message):
  with pytest.raises(ValueError, match=message):
    call()
