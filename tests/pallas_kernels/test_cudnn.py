"""The cuDNN attention path without a GPU: it lowers to cuDNN's calls, and its masks are right."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.flash import api, cudnn, ref

IDS = np.array([[1] * 50 + [2] * 70 + [0] * 8, [0] * 3 + [1] * 125])
PLAIN = np.array([[3] * 128, [1] * 100 + [0] * 28])  # a document a row, padding behind it


def arrays(dtype=jnp.bfloat16):
  rng = np.random.default_rng(0)
  shapes = ((2, 128, 8, 64), (2, 128, 2, 64), (2, 128, 2, 64))
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def attend(q, k, v, ids=None):
  more = {} if ids is None else dict(q_segment_ids_BT=ids, kv_segment_ids_BS=ids)
  return cudnn.flash_attention_cudnn(q, k, v, scale=0.125, **more)


@pytest.fixture
def gpu(monkeypatch):
  """jax asks the installed cuDNN for its version while tracing; here it is told 9.10."""
  private = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(private, "check_compute_capability", lambda capability: True)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def calls(fn, *args) -> list[str]:
  device = AbstractDevice("NVIDIA H100 80GB HBM3", 1, "gpu")
  with use_abstract_mesh(AbstractMesh((1,), ("d",), abstract_device=device)):
    lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
  return sorted(set(re.findall(r"custom_call @__cudnn\$(\w+)", lowered.as_text())))


@pytest.mark.skipif(
  jax.__version_info__ >= (0, 12), reason="jax 0.12 lowers cuDNN's calls beside a device only"
)
def test_lowers_to_the_fused_calls(gpu):
  q, k, v = arrays()
  assert calls(attend, q, k, v) == ["fmhaSoftmax"]
  # Rows of documents: a mask, or none where the rows are seen to need none.
  assert calls(attend, q, k, v, IDS) == ["fmhaScaleBiasSoftmax", "fmhaSoftmax"]

  def loss(q, k, v):
    return jnp.sum(api.flash_attention(q, k, v).astype(jnp.float32))  # auto

  backward = calls(jax.grad(loss, argnums=(0, 1, 2)), q, k, v)
  assert backward == ["fmhaSoftmax", "fmhaSoftmaxBackward"]


@pytest.mark.parametrize(
  "row, is_plain",
  [
    ([1, 1, 1, 1], True),
    ([7, 7, 0, 0], True),
    ([0, 0, 0, 0], True),
    ([1, 1, 2, 2], False),
    ([0, 1, 1, 1], False),
    ([1, 0, 0, 1], False),
  ],
)
def test_rows_that_need_no_mask(row, is_plain):
  assert bool(cudnn.is_one_run(np.array([[5, 5, 5, 5], row]))) == is_plain


KINDS = pytest.mark.parametrize(
  "ids", [None, IDS, PLAIN], ids=["causal", "packed", "one document a row"]
)


def check(ids):
  """Values and gradients against float32; only real rows have a gradient, as behind a loss mask."""
  qkv = arrays()
  more = {} if ids is None else dict(q_segment_ids_BT=ids, kv_segment_ids_BS=ids)
  keep = 1.0 if ids is None else (ids != 0)[:, :, None, None].astype(np.float32)

  def loss(function, *qkv):
    out = function(*qkv)
    return jnp.sum(keep * jnp.sin(out.astype(jnp.float32))), out

  def of(function, qkv):
    run = jax.value_and_grad(lambda *x: loss(function, *x), (0, 1, 2), has_aux=True)
    (_, out), grads = jax.jit(run)(*qkv)
    return out, grads

  out, grads = of(lambda *x: attend(*x, ids), qkv)
  floats = [x.astype(jnp.float32) for x in qkv]
  exact, want = of(lambda *x: ref.flash_attention_ref(*x, scale=0.125, **more), floats)
  np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)  # bfloat16
  if ids is not None:
    assert not np.any(np.asarray(out)[ids == 0])
  for a, b in zip(grads, want, strict=True):
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.06, rtol=0.02)


@KINDS
def test_masks_and_padding(gpu, monkeypatch, ids):
  """What cuDNN is asked for, computed by jax's own XLA form of the same function."""
  asked = jax.nn.dot_product_attention

  def by_xla(*args, implementation, **kwargs):
    assert implementation == "cudnn"
    return asked(*args, implementation="xla", **kwargs)

  monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
  check(ids)


@pytest.mark.gpu
@KINDS
def test_on_the_device(ids):
  check(ids)


@pytest.mark.parametrize(
  "change, reason",
  [
    (dict(dtype=jnp.float32), "expected one 16-bit float"),
    (dict(q_offset=3), "whole sequences only"),
    (dict(kv_length=5), "whole sequences only"),
    (dict(width=60), "head widths 60"),
  ],
)
def test_what_it_does_not_serve_is_refused_and_auto_takes_another(gpu, change, reason):
  q, k, v = arrays(change.pop("dtype", jnp.bfloat16))
  width = change.pop("width", 64)
  q, k, v = (x[..., :width] for x in (q, k, v))
  with pytest.raises(NotImplementedError, match=reason):
    api.flash_attention(q, k, v, implementation="cudnn", **change)
  assert jax.eval_shape(lambda: api.flash_attention(q, k, v, **change)).shape == q.shape


def test_a_machine_without_cudnn_takes_another(monkeypatch):
  """Found while tracing on a machine whose jax has a GPU but no cuDNN library."""
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  private = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(private, "cuda_versions", None)  # torch brings the library, for one
  q, k, v = arrays()
  with pytest.raises(NotImplementedError, match="cudnn: .*cuDNN"):
    api.flash_attention(q, k, v, implementation="cudnn")
  assert jax.eval_shape(lambda: api.flash_attention(q, k, v)).shape == q.shape
